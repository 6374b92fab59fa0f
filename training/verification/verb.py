"""The command line of ``turret verify``. Heavy imports wait until it runs."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

from turret.server.basics.names import model_place
from turret.training.verbs import check_installed, with_errors
from turret.training.words import say

if TYPE_CHECKING:
    from turret.training.verification.checks import Verdict

_TOKEN_VARIABLE = "TURRET_TOKEN"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser], text: str) -> None:
    """Add the verb; ``text`` is its line in the help."""
    parser = subparsers.add_parser(
        "verify",
        help=text,
        description="Check over OpenAI's API that a server's answers with adapters match those of"
        " PEFT. The server must already have loaded the adapters. Exit code 1 means that at least"
        " one answer is wrong.",
    )
    parser.add_argument(
        "adapters",
        nargs="*",
        type=_adapter,
        metavar="[NAME=]DIR",
        help="directories of the adapters, with their names on the server (default: the"
        " directory's name); without any, only the base is checked",
    )
    parser.add_argument(
        "--against", required=True, metavar="URL", help="the server, such as http://localhost:8000"
    )
    parser.add_argument(
        "--model",
        type=model_place,
        metavar="DIR|ORG/NAME",
        help="the base model of the server (default: the bundled model)",
    )
    parser.add_argument(
        "--weights",
        choices=("nf4", "full"),
        help="weights of the base on the server (default: nf4 for turret, full for others)",
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="one prompt per line (default: six texts)"
    )
    parser.add_argument("--max-tokens", type=int, default=16, metavar="N", help="default: 16")
    parser.add_argument(
        "--token", metavar="TOKEN", help=f"bearer token (default: ${_TOKEN_VARIABLE})"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("-q", "--quiet", action="store_true", help="show no progress")
    parser.set_defaults(func=with_errors(_verify))


def _adapter(text: str) -> tuple[str, Path]:
    name, found, path = text.partition("=")
    return (name, Path(path)) if found else (Path(text).resolve().name, Path(text))


def _verify(args: argparse.Namespace) -> int:
    check_installed("peft")
    verdicts = _run(args)
    if args.json:
        from turret.clients.verbs.command import print_json

        print_json([{**dataclasses.asdict(v), "right": v.is_right} for v in verdicts])
    else:
        _print(verdicts)
    return 0 if all(verdict.is_right for verdict in verdicts) else 1


def _run(args: argparse.Namespace) -> list[Verdict]:
    from turret.server.command.entry import ending_at_interrupts
    from turret.training.verification.client import VerifiedServer
    from turret.training.words import RunError

    adapters = dict(args.adapters)
    for path in adapters.values():
        if not (path / "adapter_config.json").is_file():
            raise RunError(say("NOT_PEFT_FOLDER", path=path, file="adapter_config.json"))
    prompts = None
    if args.prompts is not None:
        lines = args.prompts.read_text(encoding="utf-8").splitlines()
        prompts = [line for line in lines if line.strip()]
        if not prompts:
            raise RunError(say("NO_PROMPTS", path=args.prompts))
    from turret.training.run.progress import training_progress

    with ending_at_interrupts("stopped"):
        from turret.training.base_model import find_base
        from turret.training.verification.checks import DEFAULT_PROMPTS, verify

    token = args.token or os.environ.get(_TOKEN_VARIABLE)
    with (
        VerifiedServer(args.against, token) as server,
        training_progress("verify", stays=False, is_quiet=args.quiet) as listen,
    ):
        if missing := sorted(adapters.keys() - server.names):
            choices = ", ".join(sorted(server.names))
            raise RunError(say("NOT_ON_SERVER", names=", ".join(missing), choices=choices))
        base = find_base(args.model)
        if server.digest not in (None, base.source.digest):
            raise RunError(say("OTHER_WEIGHTS_SERVED", url=args.against, name=base.source.name))
        return verify(
            server,
            base,
            args.weights or ("full" if server.digest is None else "nf4"),
            adapters,
            prompts=prompts or DEFAULT_PROMPTS,
            max_tokens=args.max_tokens,
            on_phase=lambda text: listen({"kind": "phase", "text": text}),
        )


def _print(verdicts: list[Verdict]) -> None:
    from turret.clients.verbs.tables import print_cells

    columns = {"adapter": "text", "matching tokens": "number", "error": "number"}
    columns |= {"bf16 PEFT": "number", "in a batch": "text", "reloaded": "text"}
    columns |= {"result": "text"}
    print_cells(columns, map(_cells, verdicts))


def _cells(verdict: Verdict) -> list[str]:
    if verdict.problem:
        return [verdict.name, "", "", "", "", "", verdict.problem]
    reloaded = "not tried" if verdict.reloaded is None else _differing(verdict.reloaded)
    result = "right" if verdict.is_right else "WRONG"
    if verdict.without_effect == ["*"]:
        result += ": answers like the base"
    elif verdict.without_effect:
        result += f": no effect of {', '.join(verdict.without_effect)}"
    return [
        verdict.name,
        f"{verdict.same} of {verdict.tokens}",
        f"{verdict.error:.4f}",
        f"{verdict.rounding:.4f}",
        _differing(verdict.mixed),
        reloaded,
        result,
    ]


def _differing(count: int) -> str:
    return f"{count} differ" if count else "same"
