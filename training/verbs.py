"""``turret train``: ``init``, ``run``. Heavy imports wait until a verb runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Short flags for the keys that are changed most.
_FLAGS = {
    "--model": ("base.model", "DIR"),
    "--method": ("method.name", "NAME"),
    "--rank": ("method.rank", "N"),
    "--train": ("data.train", "FILE"),
    "--output": ("run.output", "DIR"),
    "--steps": ("run.steps", "N"),
    "--seed": ("run.seed", "N"),
    "--learning-rate": ("optimizer.learning_rate", "RATE"),
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser("train", help="train an adapter")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    init = verbs.add_parser("init", help="write a commented config")
    init.add_argument("file", type=Path, nargs="?", default=Path("train.toml"), metavar="FILE")
    init.set_defaults(func=_with_errors(_init))
    run = verbs.add_parser("run", help="train", parents=[_config_parser()])
    how = run.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    how.add_argument("--overwrite", action="store_true", help="remove a run that is there")
    run.set_defaults(func=_with_errors(_run))
    report = verbs.add_parser("report", help="write a run's report.html again")
    report.add_argument("run", type=Path, metavar="DIR", help="directory of the run")
    report.set_defaults(func=_with_errors(_report))


def _config_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="TOML file (turret train init)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="TABLE.KEY=VALUE",
        help="override a key; repeat for more",
    )
    for flag, (key, metavar) in _FLAGS.items():
        parser.add_argument(flag, metavar=metavar, help=f"--set {key}={metavar}")
    return parser


def _with_errors(verb: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], int]:
    """Turn what the user can get wrong into one line and an exit code."""

    def run(args: argparse.Namespace) -> int:
        from turret.server.errors import TurretError
        from turret.training.errors import TrainingError

        try:
            verb(args)
        except (TrainingError, TurretError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except ModuleNotFoundError as error:
            if error.name not in ("peft", "accelerate"):
                raise
            print("error: training needs an extra: pip install 'turret[train]'", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("\nstopped; --resume goes on from the last checkpoint", file=sys.stderr)
            return 130
        return 0

    return run


def _init(args: argparse.Namespace) -> None:
    from turret.training.config_file import render_commented

    with args.file.open("x", encoding="utf-8") as file:
        file.write(render_commented())
    print(f"{args.file}: set data.train, then: turret train plan {args.file}")


def _resolve(args: argparse.Namespace) -> Any:
    from turret.training.config_file import read_config
    from turret.training.resolve import resolve

    overrides = list(args.set)
    for flag, (key, _) in _FLAGS.items():
        value = getattr(args, flag[2:].replace("-", "_"))
        if value is not None:
            overrides.append(f"{key}={value}")
    resolved = resolve(read_config(args.config, overrides), args.config.parent)
    for note in resolved.notes:
        print(f"note: {note}", file=sys.stderr)
    return resolved


def _run(args: argparse.Namespace) -> None:
    from turret.training.progress import training_progress
    from turret.training.report.html_report import write_report
    from turret.training.trainer import Trainer

    resolved = _resolve(args)
    with training_progress(resolved.config.run.steps) as listen:
        result = Trainer(resolved, listen).run(resume=args.resume, overwrite=args.overwrite)
    print(result.folder.adapter)
    print(write_report(result.folder))


def _report(args: argparse.Namespace) -> None:
    from turret.training.report.html_report import write_report
    from turret.training.run_folder import RunFolder

    print(write_report(RunFolder(args.run)))
