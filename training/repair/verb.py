"""The command line of ``turret model repair``. Heavy imports wait until it runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from turret.server.basics.files import unreadable
from turret.server.basics.names import model_place
from turret.training.settings.flags import whole
from turret.training.verbs import check_installed, with_errors
from turret.training.words import say

_MOST = 1024


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
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
    return whole(text, 1, _MOST)


def _repair(args: argparse.Namespace) -> None:
    from turret.server.command.interrupts import ending_at_interrupts
    from turret.training.errors import ConfigError, RunError

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
            from turret.training.repair.residual import repair
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
