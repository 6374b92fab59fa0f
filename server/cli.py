"""The ``turret`` command. Imports are lazy: a client verb loads no torch."""

from __future__ import annotations

import argparse
import faulthandler
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import turret

EXIT_USAGE = 2
_OWN_VERBS = ("serve", "health", "demo")


def _serve(args: argparse.Namespace) -> int:
    from turret.server import log
    from turret.server.flags import config_from_args

    try:
        config = config_from_args(args)
    except ValueError as error:
        print(f"turret serve: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    log.configure(logging.DEBUG if args.verbose else logging.INFO)
    if hasattr(signal, "SIGUSR1"):
        # For a server that hangs: says where, and goes on.
        faulthandler.register(signal.SIGUSR1, all_threads=True)
    print(f"turret {turret.__version__}\n{config.describe()}", file=sys.stderr, flush=True)

    import asyncio

    from turret.server.app import App

    async def serve() -> int:
        return await App(config, on_loaded=_freeze_heap).run()

    code = asyncio.run(serve())
    # A thread in the middle of a load or of a read from a dead disk must neither keep a stopped
    # server alive nor be torn down under its feet.
    if threading.active_count() > 1:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _health(args: argparse.Namespace) -> int:
    from turret.server.probe import is_serving

    try:
        serving, detail = is_serving(
            args.address,
            args.service,
            timeout_seconds=args.timeout,
            tls_ca=args.tls_ca,
            tls_cert=args.tls_cert,
            tls_key=args.tls_key,
        )
    except OSError as error:
        serving, detail = False, str(error)
    print(detail, file=sys.stdout if serving else sys.stderr)
    return 0 if serving else 1


def _demo(args: argparse.Namespace) -> int:
    from turret.server.demo import run_demo

    return run_demo(
        examples=args.examples,
        address=args.address,
        metrics_address=args.metrics_address,
        is_once=args.once,
    )


def _freeze_heap() -> None:
    """Have the garbage collector pass over what stays for ever, and look less often.

    A full collection walks half a million objects of torch's and transformers', during which no
    engine step runs, and adapters, made of many small objects, bring it about again and again.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


def _add_serve(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from turret.server.flags import add_flags

    parser = subparsers.add_parser(
        "serve", help="run the server", description="Run the server until SIGTERM or SIGINT."
    )
    add_flags(parser)
    parser.add_argument("--verbose", action="store_true", help="log details too")
    parser.set_defaults(func=_serve)


def _add_health(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "health",
        help="exit 0 if a server is serving, 1 if not",
        description="Ask a server's health service; for container health checks.",
    )
    parser.add_argument("--address", default="127.0.0.1:50051", metavar="HOST:PORT")
    parser.add_argument(
        "--service", default="", help="full service name (default: the whole server)"
    )
    parser.add_argument("--timeout", type=float, default=5.0, metavar="SECONDS")
    parser.add_argument("--tls-ca", metavar="PATH", help="PEM authorities; turns TLS on")
    parser.add_argument("--tls-cert", metavar="PATH", help="PEM client certificate (mTLS)")
    parser.add_argument("--tls-key", metavar="PATH", help="PEM client key (mTLS)")
    parser.set_defaults(func=_health)


def _add_demo(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="serve the example adapters and send them one mixed batch",
        description="Start a server with the example adapters on the embedded model, send one "
        "batch that mixes all of them, show answers and metrics, and serve on until Ctrl-C.",
    )
    parser.add_argument(
        "--examples",
        type=Path,
        metavar="DIR",
        help="folder with adapters/ and prompts.jsonl (default: the checkout's)",
    )
    for flag in ("--address", "--metrics-address"):
        parser.add_argument(
            flag, default="127.0.0.1:0", metavar="HOST:PORT", help="default: a free port"
        )
    parser.add_argument(
        "--once",
        action="store_true",
        default=os.environ.get("DEMO_ONCE", "") not in ("", "0"),
        help="stop when everything is shown (default if DEMO_ONCE=1 is set)",
    )
    parser.set_defaults(func=_demo)


def build_parser(verb: str | None) -> argparse.ArgumentParser:
    """The parser of the whole command, or of one of the server's own verbs where that suffices."""
    parser = argparse.ArgumentParser(
        prog="turret", description="Many adapters of many methods on one 4-bit base model."
    )
    parser.add_argument("--version", action="version", version=f"turret {turret.__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_serve(subparsers)
    _add_health(subparsers)
    _add_demo(subparsers)
    if verb not in _OWN_VERBS:
        from turret.clients.verbs import add_verbs
        from turret.training.verbs import add_parser as add_train

        add_verbs(subparsers)
        add_train(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = build_parser(arguments[0] if arguments else None).parse_args(arguments)
    return args.func(args)


if __name__ == "__main__":
    sys.exit(main())
