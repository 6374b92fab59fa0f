"""The ``turret`` command.

Imports are lazy: a verb loads only its own modules, and help loads none.
"""

from __future__ import annotations

import argparse
import errno
import faulthandler
import gc
import logging
import os
import pkgutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import turret
from turret.server.command.entry import EXIT_INTERRUPTED
from turret.server.command.parser import EXIT_USAGE, CommandParser

EXIT_FAILED = 1
EXIT_BROKEN_PIPE = 141
# If only these TURRET variables are set, the check for misspelt ones need not be loaded.
_CLIENT_VARIABLES = ("TURRET_ADDRESS", "TURRET_TOKEN", "TURRET_TLS_CA")
Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
_METHOD_NAMES = "turret.training.settings:METHOD_NAMES"


def _serve(args: argparse.Namespace) -> int:
    from turret.server import log
    from turret.server.basics.machine import use_threads
    from turret.server.command.flags import resolved
    from turret.server.command.preflight import problems
    from turret.server.command.start_lines import introduce, refuse

    _collect_rarely()
    if not (found := resolved(args, "turret serve")):
        return EXIT_USAGE
    settings, config = found
    is_json = config.log.log_format == "json"
    if found := problems(config):
        refuse(settings.placed(found), is_json=is_json)
        return EXIT_FAILED
    use_threads(config.model.threads)
    level = logging.DEBUG if config.log.verbose else logging.INFO
    log.configure(level, log_format=config.log.log_format)
    if hasattr(signal, "SIGUSR1"):
        # SIGUSR1 prints the stacks of a server that hangs, and lets it continue.
        faulthandler.register(signal.SIGUSR1, all_threads=True)
    introduce(settings, config)

    import asyncio

    from turret.server.app import App

    async def serve() -> int:
        return await App(config, on_loaded=_freeze_heap).run()

    return asyncio.run(serve())


def _config_show(args: argparse.Namespace) -> int:
    from turret.server.command.flags import resolved

    if not (found := resolved(args, "turret config show")):
        return EXIT_USAGE
    settings, config = found
    if not args.json:
        print(*settings.lines(config, with_defaults=True), sep="\n")
        return 0
    from turret.clients.verbs.command import print_json

    print_json(settings.as_json(config, with_defaults=True))
    return 0


def _compile(args: argparse.Namespace) -> int:
    from turret.server.command.flags import resolved
    from turret.server.command.preflight import problems
    from turret.server.command.start_lines import refuse

    if not (found := resolved(args, "turret compile")):
        return EXIT_USAGE
    settings, config = found
    # The settings may be those of the machine with the GPU, so do not check their device here.
    config = replace(config, model=replace(config.model, device="auto"))
    if found := problems(config, may_run=True):
        refuse(settings.placed(found), is_json=False, command="turret compile")
        return EXIT_FAILED
    from turret.server.build import compile_kernels
    from turret.server.errors import TurretError

    try:
        compile_kernels(config, args.compute_capability)
    except (TurretError, OSError, ValueError) as error:
        refuse([("", str(error))], is_json=False, command="turret compile")
        return EXIT_FAILED
    return 0


def _capability(text: str) -> int:
    """A compute capability such as 9.0, as Triton writes it: 90."""
    from turret.server.basics.machine import LEAST_CAPABILITY
    from turret.server.words import say

    major, _, minor = text.partition(".")
    if not (major.isdecimal() and minor.isdecimal()):
        raise argparse.ArgumentTypeError(say("NOT_A_CAPABILITY", value=text))
    if (int(major), int(minor)) < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        raise argparse.ArgumentTypeError(say("TOO_SMALL", least=least, value=text))
    return 10 * int(major) + int(minor)


def _leave(code: int) -> NoReturn:
    """End the process without the interpreter's own cleanup.

    A thread that loads a model or reads from a dead disk must not keep a stopped server alive, and
    must not lose the modules that it uses. Libraries that look for leaked objects at exit, such as
    nanobind, would also add their reports to the log.
    """
    logging.shutdown()
    os._exit(code)


def _demo(args: argparse.Namespace) -> int:
    from turret.server.basics.settings import split_address
    from turret.server.command.start_lines import refuse

    for flag in ("address", "metrics_address", "http_address"):
        try:
            split_address(getattr(args, flag))
        except ValueError as error:
            place = f"--{flag.replace('_', '-')}"
            refuse([(place, str(error))], is_json=False, command="turret demo")
            return EXIT_USAGE
    from turret.server.demo import run_demo

    return run_demo(
        examples=args.examples,
        address=args.address,
        metrics_address=args.metrics_address,
        http_address=args.http_address,
        is_once=args.once,
    )


def _completion(args: argparse.Namespace) -> int:
    from turret.server.command.completion import script

    print(script(args.shell), end="")
    return 0


def complete() -> None:
    """Write the completions of the command line that a shell passes in the environment."""
    from turret.server.command.completion import complete as offer
    from turret.server.command.completion import verb_of_line

    names = pkgutil.resolve_name(_METHOD_NAMES)
    offers: dict[str, tuple[str, ...]]
    offers = {f"train {verb}:--method": names for verb in ("plan", "run", "sweep")}
    offers["serve:--device"] = ("auto", "cpu", "cuda")
    offer(build_parser(verb_of_line() or ""), offers)


def _collect_rarely() -> None:
    """Collect garbage less often.

    While libraries load, collections would take a tenth of the processor time of a start. Later,
    adapters, which consist of many small objects, would trigger them often. Full collections still
    run every 20 million objects, so that reference cycles from requests do not accumulate.
    """
    gc.set_threshold(100_000, 20, 10)


def _freeze_heap() -> None:
    """Exclude permanent objects from garbage collection.

    A full collection walks half a million objects of torch and transformers, and blocks engine
    steps meanwhile. Frozen objects are not walked.
    """
    gc.collect()
    gc.freeze()


def _add_serve(subparsers: Subparsers, text: str) -> None:
    from turret.server.command.flags import add_flags

    parser = subparsers.add_parser(
        "serve",
        help=text,
        description="Run the server until SIGTERM or SIGINT. Every flag is also a key of --config"
        " and an environment variable: --max-rank is adapters.max_rank and TURRET_MAX_RANK.",
    )
    add_flags(parser)
    parser.set_defaults(func=_serve)


def _add_config(subparsers: Subparsers, text: str) -> None:
    from turret.server.command.flags import add_flags

    about = "print every setting of turret serve, and where it comes from"
    parser = subparsers.add_parser("config", help=text)
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    show = verbs.add_parser("show", help=about, description=f"{about.capitalize()}.")
    show.add_argument("--json", action="store_true", help="print JSON")
    add_flags(show)
    show.set_defaults(func=_config_show)


def _add_compile(subparsers: Subparsers, text: str) -> None:
    from turret.server.command.flags import add_flags

    parser = subparsers.add_parser(
        "compile",
        help=text,
        description="Compile the kernels that `turret serve` with the same model and sizes would"
        " compile at startup on an NVIDIA GPU, and store them where it looks for them. This needs"
        " no GPU, so an image can contain them.",
    )
    parser.add_argument(
        "--compute-capability",
        type=_capability,
        nargs="+",
        required=True,
        metavar="N.N",
        help="compute capability of the GPUs, for example 8.0 (A100) 8.9 (L4) 9.0 (H100)",
    )
    add_flags(parser)
    parser.set_defaults(func=_compile)


def _add_demo(subparsers: Subparsers, text: str) -> None:
    parser = subparsers.add_parser(
        "demo",
        help=text,
        description="Start a server with the example adapters on the bundled model, send one "
        "batch that mixes all of them, show answers and metrics, and keep serving until Ctrl-C.",
    )
    parser.add_argument(
        "--examples",
        type=Path,
        metavar="DIR",
        help="folder with adapters/ and prompts.jsonl (default: the checkout's)",
    )
    for flag in ("--address", "--metrics-address", "--http-address"):
        parser.add_argument(
            flag, default="127.0.0.1:0", metavar="HOST:PORT", help="default: a free port"
        )
    parser.add_argument(
        "--once",
        action="store_true",
        default=os.environ.get("DEMO_ONCE", "") not in ("", "0"),
        help="stop after showing everything (default if DEMO_ONCE=1 is set)",
    )
    parser.set_defaults(func=_demo)


def _add_completion(subparsers: Subparsers, text: str) -> None:
    parser = subparsers.add_parser(
        "completion",
        help=text,
        description="Print a script for a shell, for example: source <(turret completion bash).",
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    parser.set_defaults(func=_completion)


# Verb → its line in the help, and the function that adds it, or the function's name if its module
# is imported only when the verb is used. The server never imports the fleet and the trainer. The
# order is that of the help.
_OWN_VERBS: Mapping[str, tuple[str, str | Callable[[Subparsers, str], None]]] = {
    "serve": ("run the server", _add_serve),
    "config": ("show the settings of a server, and where each comes from", _add_config),
    "model": (
        "show how a base model is served, or make an adapter that corrects its rounding",
        "turret.server.command.model_verb:add_parser",
    ),
    "compile": ("compile the kernels for a GPU ahead of time, on any machine", _add_compile),
    "cluster": ("run many replicas as one server, or show them", "turret.fleet.verb:add_parser"),
    "demo": ("serve the example adapters and send them one mixed batch", _add_demo),
    "completion": ("print a script that completes this command in a shell", _add_completion),
}
_TRAINING = {
    "train": ("train an adapter", "turret.training.verbs:add_parser"),
    "convert": (
        "convert an adapter of an unsupported method to a supported form",
        "turret.training.conversion.verb:add_parser",
    ),
    "verify": (
        "check that a server's answers with adapters match those of PEFT",
        "turret.training.verification.verb:add_parser",
    ),
}


def build_parser(verb: str | None) -> argparse.ArgumentParser:
    """The command's parser.

    Args:
        verb: The verb whose flags are needed. Other verbs get only a name and a line of help. None
            adds all flags of all verbs.
    """
    from turret.clients.verbs import VERBS

    parser = CommandParser(
        prog="turret", description="Serve many adapters of many methods on one 4-bit base model."
    )
    parser.verbs_below = _verbs_below
    parser.add_argument("-V", "--version", action="version", version=f"turret {turret.__version__}")
    # The type is Any because the type of subparsers is invariant: verbs expect subparsers of
    # ArgumentParser, and would not accept those of CommandParser.
    subparsers: Any = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (text, add) in {**_OWN_VERBS, **VERBS, **_TRAINING}.items():
        if verb not in (None, name):
            subparsers.add_parser(name, help=text)
        else:
            add = pkgutil.resolve_name(add) if isinstance(add, str) else add
            add(subparsers, text)
    return parser


def _verbs_below() -> dict[str, str]:
    """The subcommands of all verbs: name → whole command."""
    found: dict[str, str] = {}
    waiting = [build_parser(None)]
    for parser in waiting:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                waiting += action.choices.values()
                if parser.prog != "turret":
                    found |= {name: f"{parser.prog} {name}" for name in action.choices}
    return found


def main(argv: Sequence[str] | None = None, *, catches_interrupts: bool = False) -> int:
    """Run a command.

    Args:
        argv: The command's arguments; None uses those of the process.
        catches_interrupts: Make Ctrl-C raise KeyboardInterrupt as soon as the verb can handle it.

    Returns:
        The exit code of the command.
    """
    if argv is not None:
        # Another program called this function.
        return _run(argv, catches_interrupts)
    code = _with_streams(lambda: _run(sys.argv[1:], catches_interrupts))
    if sys.argv[1:2] == ["serve"] or "torch" in sys.modules or code == EXIT_INTERRUPTED:
        _leave(code)
    return code


def _with_streams(run: Callable[[], int]) -> int:
    """Run a command, and write the rest of its output.

    Args:
        run: The command.

    Returns:
        The exit code of the command or of its SystemExit, or 1 if output was lost.
    """
    code = 0
    try:
        try:
            code = run()
        except SystemExit as end:
            # The parser has already printed the reason.
            if isinstance(end.code, str):
                raise
            code = end.code or 0
        print(end="", flush=True)
        return code
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        # When the interpreter ends, it writes the rest again. Discard it, because another error
        # would print a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            # The reader of the output has closed it, which is not an error.
            return code or EXIT_BROKEN_PIPE
        if code == 0:
            print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)
        return EXIT_FAILED


def _interrupt(*_: object) -> None:
    """End a call to a server cleanly. A second Ctrl-C ends it at once.

    A second exception during the cleanup after the first one could leave gRPC waiting forever.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise KeyboardInterrupt


def _note_variables(verb: str) -> None:
    """Warn about variables that look misspelt; verbs that serve do this themselves."""
    if not any(n.startswith("TURRET_") and n not in _CLIENT_VARIABLES for n in os.environ):
        return
    from turret.server.command.flags import unknown_variables
    from turret.server.command.start_lines import note

    note(unknown_variables(os.environ), is_json=False, command=f"turret {verb}")


def _run(arguments: Sequence[str], catches_interrupts: bool) -> int:
    from turret.clients.verbs import VERBS

    verb = arguments[0] if arguments else ""
    try:
        args = build_parser(verb).parse_args(arguments)
        if catches_interrupts:
            ends = verb in VERBS and verb != "chat"
            signal.signal(signal.SIGINT, _interrupt if ends else signal.default_int_handler)
        if verb in VERBS or verb in _TRAINING:
            _note_variables(verb)
        code: int = args.func(args)
        return code
    except KeyboardInterrupt:
        # The interrupt came during imports, or in a verb that needs no cleanup.
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
