"""``turret train init|plan|run|report|sweep|promote``, and ``turret model repair``.

Heavy imports wait until a verb runs.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.util
import logging
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from turret.training.words import say

# Packages of the `train` extra.
_PACKAGES = ("peft", "accelerate", "tensorboard")
_RANKS = (2, 4, 8, 16, 32)
_MAX_REPAIR_RANK = 1024


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser], text: str) -> None:
    """Add the verb; ``text`` is its line in the help."""
    from turret.clients.verbs.command import add_connection_flags
    from turret.clients.verbs.promote import add_promote

    parser = subparsers.add_parser("train", help=text)
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    text = "write a commented config"
    init = verbs.add_parser("init", help=text, description=f"{text.capitalize()}.")
    init.add_argument(
        "file",
        type=Path,
        nargs="?",
        default=Path("train.toml"),
        metavar="FILE",
        help="file to write (default: train.toml)",
    )
    init.set_defaults(func=with_errors(_init))
    plan = _add(verbs, "plan", "show what a run will do and cost", _plan)
    plan.add_argument("--measure", action="store_true", help="run two steps and measure the memory")
    plan.add_argument("--json", action="store_true", help="print JSON")
    run = _add(verbs, "run", "train an adapter", _run)
    add_connection_flags(run, "train on a server with --training (default: in this process)")
    how = run.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="continue a run that was stopped")
    how.add_argument(
        "--overwrite",
        action="store_true",
        help="first remove an earlier run from the output directory",
    )
    text = "write a run's report.html again"
    report = verbs.add_parser("report", help=text, description=f"{text.capitalize()}.")
    report.add_argument("run", type=Path, metavar="DIR", help="directory of the run")
    report.set_defaults(func=with_errors(_report))
    text = "train with several values of settings, and compare the results"
    sweep = _add(verbs, "sweep", text, _sweep, "--rank")
    sweep.add_argument(
        "--ranks",
        "--rank",
        action="extend",
        type=_ranks,
        metavar="N,N,…",
        help="ranks to train; --set TABLE.KEY=A,B,… varies any other setting in the same way"
        " (default: 2,4,8,16,32 unless another setting varies)",
    )
    sweep.add_argument(
        "--early-stop",
        action="store_true",
        help="stop all but the best third of the variants after 1/9 of the steps, and again after"
        " 1/3",
    )
    sweep.add_argument("--json", action="store_true", help="print JSON")
    add_connection_flags(sweep, "train the variants on a server with --training, up to 16 at once")
    add_promote(verbs, "replace a served adapter if a test set shows that the new one is better")


def _add(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    text: str,
    func: Callable[[argparse.Namespace], None],
    *left_out: str,
) -> argparse.ArgumentParser:
    """Add a verb that reads a config; ``left_out`` are flags that it does not have."""
    from turret.training.settings.flags import config_parser

    parents = [config_parser(*left_out)]
    usage = f"turret train {name} CONFIG [flags]"
    parser = verbs.add_parser(
        name, help=text, description=f"{text.capitalize()}.", parents=parents, usage=usage
    )
    parser.set_defaults(func=with_errors(func), parser=parser, address=None)
    return parser


def with_errors(
    verb: Callable[[argparse.Namespace], int | None],
) -> Callable[[argparse.Namespace], int]:
    """Convert a user's mistakes to a one-line error and an exit code.

    Args:
        verb: Runs a verb; returns its exit code, or None for 0.
    """

    def run(args: argparse.Namespace) -> int:
        from turret.clients.errors import TurretRpcError
        from turret.clients.fields import ArgumentError
        from turret.clients.verbs.command import print_error
        from turret.server.command.entry import exit_code, raising_terminated
        from turret.server.command.parser import EXIT_USAGE
        from turret.server.errors import TurretError
        from turret.training.settings.flags import described
        from turret.training.words import ConfigFileError, TrainingError

        # ``server/models/weights/nf4.py`` also silences this logger, but PEFT imports bitsandbytes
        # earlier.
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
        try:
            with raising_terminated():
                return verb(args) or 0
        except BrokenPipeError:
            # The command as a whole handles a reader that has closed the output.
            raise
        except OSError as error:
            where = "" if error.filename is None else f"{error.filename}: "
            how = _how_to_go_on(args)
            print(f"error: {where}{error.strerror or error}{how}", file=sys.stderr)
            return 1
        except (TrainingError, TurretError) as error:
            for line in described(args, error):
                print(f"error: {line}", file=sys.stderr)
            return EXIT_USAGE if isinstance(error, ConfigFileError) else 1
        except (TurretRpcError, ArgumentError) as error:
            print_error(error, args)
            if how := _how_to_go_on(args):
                print(f"stopped{how}", file=sys.stderr)
            return 1
        except KeyboardInterrupt as interrupt:
            # Overwrite the ^C that the terminal echoed.
            anew = "\r\x1b[K" if sys.stderr.isatty() else ""
            print(f"{anew}stopped{_how_to_go_on(args)}", file=sys.stderr)
            return exit_code(interrupt)

    return run


def _how_to_go_on(args: argparse.Namespace) -> str:
    """The end of a message about an interrupted verb: how to continue."""
    how: str = getattr(args, "how_to_go_on", str)()
    return how and f"; {how}"


def _init(args: argparse.Namespace) -> None:
    from turret.training.settings import render_commented
    from turret.training.words import RunError

    try:
        with args.file.open("x", encoding="utf-8") as file:
            file.write(render_commented())
    except FileExistsError:
        if args.file.is_dir():
            raise RunError(say("PATH_IS_A_DIRECTORY", path=args.file)) from None
        raise RunError(say("PATH_EXISTS", path=args.file)) from None
    except FileNotFoundError:
        raise RunError(say("PATH_MISSING", path=args.file.parent)) from None
    print(
        f"wrote {args.file}; set data.train in it (now train.jsonl) to your examples, then run:"
        f" turret train plan {shlex.quote(str(args.file))}"
    )


def _ranks(text: str) -> tuple[int, ...]:
    from turret.training.settings.flags import whole

    ranks = (whole(part.strip(), 1, 1 << 16) for part in text.split(","))
    return tuple(dict.fromkeys(ranks))


def _read(args: argparse.Namespace) -> Any:
    """Read and check the config and its base."""
    check_installed(*_PACKAGES)
    from turret.training.settings import read_config
    from turret.training.settings.flags import given

    config = read_config(args.config, args.set, given(args))
    _check(args, [config])
    return config


def _read_variants(args: argparse.Namespace) -> Any:
    """Read and check the variants of a sweep and their bases."""
    check_installed(*_PACKAGES)
    from turret.training.settings.flags import given
    from turret.training.settings.variants import read_variants, varies

    overrides = list(args.set)
    if args.ranks is not None or not any(map(varies, overrides)):
        args.ranks = args.ranks or _RANKS
        overrides.append(f"method.rank={list(args.ranks)}")
    variants = read_variants(args.config, overrides, given(args))
    _check(args, [variant.config for variant in variants], compares=True)
    return variants


def check_installed(*packages: str) -> None:
    """Reject a verb if some of its packages, which the extra ``train`` adds, are missing."""
    from turret.server.basics.names import how_to_add
    from turret.training.words import RunError

    if missing := [module for module in packages if not importlib.util.find_spec(module)]:
        raise RunError(say("NOT_INSTALLED", packages=", ".join(missing), step=how_to_add("train")))


def _check(args: argparse.Namespace, configs: Sequence[Any], *, compares: bool = False) -> None:
    """Check configs and their bases, before torch is loaded."""
    from turret.server.basics.machine import use_threads
    from turret.training.examples import check_compared, read_files
    from turret.training.settings.checks import check_bases, check_inputs, check_served

    folder = args.config.parent
    use_threads(args.threads, is_background=True, niceness=args.nice)
    for config in configs:
        check_inputs(config, folder)
        if args.address is not None:
            check_served(config)
    # The files are read again together with the base. Reading them here as well reports a bad line
    # at once, before the base is loaded or fetched from the hub.
    for data in dict.fromkeys(config.data for config in configs):
        files = read_files(data, folder)
        if compares:
            check_compared(files, data)
    check_bases(configs, folder)


def _load(args: argparse.Namespace, module: str) -> None:
    """Import a module that loads torch, which takes seconds; Ctrl-C ends it without a traceback."""
    from turret.server.command.entry import ending_at_interrupts

    with ending_at_interrupts(f"stopped{_how_to_go_on(args)}"):
        importlib.import_module(module)


def _connect(args: argparse.Namespace) -> Any:
    """A client of the server that trains; its calls have no time limit without ``--timeout``."""
    from turret.clients.verbs.command import connect

    if args.timeout is None:
        args.timeout = math.inf
    return connect(args)


def _served(args: argparse.Namespace) -> Any:
    """The model of the server that trains; None without a server.

    Raises:
        RunError: The server does not train.
        TurretRpcError: The server cannot be reached, or the token lacks a role.
    """
    from turret.clients.errors import TurretRpcError
    from turret.training.words import RunError

    if args.address is None:
        return None
    with _connect(args) as client:
        try:
            client.training.list_models()
        except TurretRpcError as error:
            if error.code.name != "UNIMPLEMENTED":
                raise
            raise RunError(say("SERVER_DOES_NOT_TRAIN", address=args.address)) from None
        return client.get_model()


@contextlib.contextmanager
def _engines(args: argparse.Namespace) -> Iterator[Any]:
    """Yield a function that opens the engine of a run."""
    if args.address is None:
        from turret.training.in_process_engine import in_process_engines

        with in_process_engines() as open_engine:
            yield open_engine
        return

    from turret.training.server_engine import ServerEngine

    connect = functools.partial(_connect, args)
    yield functools.partial(ServerEngine, address=args.address, connect=connect)


def _resolve(args: argparse.Namespace, config: Any, served: Any = None) -> Any:
    _load(args, "turret.training.trainer")
    from turret.training.settings.resolve import resolve

    resolved = resolve(config, args.config.parent, served)
    for note in resolved.notes:
        print(f"note: {note}", file=sys.stderr)
    return resolved


def _plan(args: argparse.Namespace) -> None:
    config = _read(args)

    from turret.training.run.progress import training_progress

    with training_progress("plan", stays=False, is_quiet=args.quiet) as listen:
        listen({"kind": "phase", "text": "reading the base model and the data"})
        resolved = _resolve(args, config)

        from turret.training.plan import make_plan

        listen({"kind": "phase", "text": "estimating the memory"})
        plan = make_plan(resolved)
    # Print outside the bar, which redirects standard output to standard error.
    if not args.json:
        from turret.clients.verbs.tables import terminal

        plan.print(terminal())
    peak = None
    if args.measure:
        with training_progress("plan", stays=False, is_quiet=args.quiet) as listen:
            listen({"kind": "phase", "text": "measuring the memory of two steps"})
            peak = plan.peak()
    if args.json:
        from turret.clients.verbs.command import print_json

        print_json({**plan.figures(), "measured_peak": peak})
    elif peak is not None:
        print(plan.compared(peak))


def _sweep(args: argparse.Namespace) -> None:
    variants = _read_variants(args)
    folder = args.config.parent
    _check_sweep(args, variants)
    args.how_to_go_on = lambda: _how_a_sweep_goes_on(
        [folder / each.config.run.output for each in variants]
    )
    hint = "; use --ranks to choose others" if args.ranks is _RANKS else ""
    print(f"a run for each {_axes(variants)}{hint}", file=sys.stderr)
    from rich.table import Table

    from turret.clients.verbs.tables import terminal
    from turret.training.run.progress import training_progress
    from turret.training.settings.variants import shown, shown_key

    served = _served(args)
    announce = functools.partial(training_progress, is_quiet=args.quiet)
    with announce("sweep") as listen:
        listen({"kind": "phase", "text": "reading the base model"})
        _load(args, "turret.training.sweep")
        from turret.training.run import RunFolder
        from turret.training.sweep import sweep
    with _engines(args) as open_engine:
        results = sweep(
            variants, folder, announce, open_engine, served, stops_early=args.early_stop
        )
    if args.json:
        from turret.clients.verbs.command import print_json

        print_json([result.figures() for result in results])
        return
    columns = ("steps", "validation loss", "trained weights", "adapter", "products", "seconds")
    table = Table(*map(shown_key, variants[0].settings), *columns)
    for result in results:
        table.add_row(
            *map(shown, result.settings.values()),
            str(result.steps),
            f"{result.validation_loss:.4f}",
            f"{result.num_parameters:,}",
            f"{result.file_bytes / 1e6:.2f} MB",
            f"+{result.relative_multiply_adds:.1%}",
            f"{result.seconds:.0f}",
        )
    terminal().print(table)
    # Compare the losses as the table shows them; among equal ones, the first variant wins.
    finished = [each for each in results if RunFolder(Path(each.output)).is_finished]
    best = min(finished, key=lambda result: round(result.validation_loss, 4))
    title = variants[results.index(best)].title
    print(f"{title} has the lowest validation loss", best.what_next, sep="\n")


def _axes(variants: Sequence[Any]) -> str:
    """The settings that vary, with their values: ``rank (2, 4) and seed (0, 1)``."""
    from turret.training.settings.variants import shown, shown_key

    values = {
        key: dict.fromkeys(shown(variant.settings[key]) for variant in variants)
        for key in variants[0].settings
    }
    return " and ".join(f"{shown_key(key)} ({', '.join(found)})" for key, found in values.items())


def _check_sweep(args: argparse.Namespace, variants: Sequence[Any]) -> None:
    """Check the output directories of all variants, before the first one is trained."""
    from turret.training.run import RunFolder
    from turret.training.words import RunError

    for variant in variants:
        run = RunFolder(args.config.parent / variant.config.run.output)
        if RunFolder(run.path.parent).facts.exists():
            raise RunError(say("OUTPUT_IS_A_RUN", path=run.path.parent))
        if run.facts.exists():
            run.check_place(is_served=args.address is not None)
        else:
            run.check(resume=False, overwrite=False)


def _how_a_sweep_goes_on(outputs: Sequence[Path]) -> str:
    from turret.training.run import RunFolder

    runs = [RunFolder(output) for output in outputs]
    has_some = any(run.is_finished or run.newest_checkpoint for run in runs)
    if has_some:
        return "the same command continues and skips finished variants"
    begun = any(run.facts.exists() for run in runs)
    return "no variant has a checkpoint, so the same command starts again" if begun else ""


def _run(args: argparse.Namespace) -> None:
    from turret.training.run import RunFolder

    config = _read(args)
    output = RunFolder((args.config.parent / config.run.output).resolve())
    output.check(resume=args.resume, overwrite=args.overwrite)
    args.how_to_go_on = output.how_to_go_on
    if args.resume:
        output.check_place(is_served=args.address is not None)
    served = _served(args)

    from turret.training.run.progress import training_progress

    with output.held(), training_progress(is_quiet=args.quiet) as listen:
        listen({"kind": "phase", "text": "reading the base model and the data"})
        resolved = _resolve(args, config, served)

        from turret.training.report import write_report
        from turret.training.trainer import Trainer

        with _engines(args) as open_engine:
            trainer = Trainer(resolved, listen, open_engine)
            result = trainer.run(resume=args.resume, overwrite=args.overwrite)
    report = write_report(result.folder)
    if sys.stdout.isatty() and not args.quiet:
        # The trainer's last note has already shown the path of the adapter.
        print(f"report:    {report}")
    else:
        print(result.folder.adapter, report, sep="\n")


def _report(args: argparse.Namespace) -> None:
    from turret.training.report import write_report
    from turret.training.run import RunFolder

    print(write_report(RunFolder(args.run)))


def add_repair(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``turret model repair``."""
    from turret.server.basics.names import model_place

    parser = subparsers.add_parser(
        "repair",
        help="make an adapter that corrects part of a model's quantisation error",
        description="Make a LoRA that approximates the difference between the weights in a model's"
        " files and the quantised ones. In a mix, it brings the base closer to the files.",
    )
    parser.add_argument(
        "model",
        metavar="DIR|ORG/NAME|FILE",
        type=model_place,
        nargs="?",
        help="as for turret serve (default: the bundled model)",
    )
    parser.add_argument(
        "--text",
        type=Path,
        required=True,
        metavar="FILE",
        help="a text like those that the model will read; its first 8192 tokens are used",
    )
    parser.add_argument("--rank", type=_rank, default=32, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="directory for the adapter"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="show no progress")
    parser.set_defaults(func=with_errors(_repair))


def _rank(text: str) -> int:
    from turret.training.settings.flags import whole

    return whole(text, 1, _MAX_REPAIR_RANK)


def _repair(args: argparse.Namespace) -> None:
    from turret.server.basics.files import unreadable
    from turret.server.command.entry import ending_at_interrupts
    from turret.training.words import ConfigError, RunError

    check_installed("peft")
    output: Path = args.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunError(say("PATH_EXISTS", path=output))
    try:
        text = args.text.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError.of("--text", unreadable(args.text, error)) from None
    if not text.strip():
        raise ConfigError.of("--text", say("NO_TOKENS"))

    from turret.training.run.progress import training_progress

    with training_progress("repair", stays=False, is_quiet=args.quiet) as listen:
        with ending_at_interrupts("stopped"):
            from turret.training.base_model import find_base
            from turret.training.repair import repair
        made = repair(
            find_base(args.model),
            output,
            rank=args.rank,
            text=text,
            progress=lambda text: listen({"kind": "phase", "text": text}),
        )
    print(
        f"{output}: a LoRA of {made.num_modules} modules; it reduces the error of their weights"
        f" from {made.before:.1%} to {made.after:.1%}"
    )
