"""What the client verbs share: flags, the connection, errors, JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from turret.clients.calls.settings import RetryPolicy
from turret.clients.channel import DEFAULT_ADDRESS, Tls
from turret.clients.client import TurretClient
from turret.clients.errors import COUNTED, AnswerCutError, TurretRpcError
from turret.clients.hints import hint_for
from turret.clients.messages.fields import ArgumentError
from turret.clients.messages.mix import AdapterWeight
from turret.clients.verbs.flags import (
    ADDRESS_VARIABLE,
    TLS_CA_VARIABLE,
    TOKEN_VARIABLE,
    as_typed,
    flag_of,
    unusable,
)
from turret.clients.verbs.hints import HINTS
from turret.clients.words import say

_DEFAULT_TIMEOUT_SECONDS = 600.0
# Longer lists of violations are only counted, unless --details is given.
_FEW_VIOLATIONS = 8


class UnfinishedAnswerError(Exception):
    """An answer, or a round of them, whose server went away before its end."""


def connection_parser() -> argparse.ArgumentParser:
    """The flags of every verb, as a parent parser."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("connection")
    group.add_argument(
        "--address",
        default=os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS,
        metavar="HOST:PORT",
        help=f"default: ${ADDRESS_VARIABLE}, or {DEFAULT_ADDRESS}",
    )
    token = group.add_mutually_exclusive_group()
    token.add_argument(
        "--token",
        help=f"bearer token; process lists may show it to other users (default: ${TOKEN_VARIABLE})",
    )
    token.add_argument("--token-from", type=Path, metavar="FILE", help="file that holds the token")
    group.add_argument("--tls", action="store_true", help="use TLS, with the system's roots")
    group.add_argument(
        "--tls-ca",
        type=Path,
        default=os.environ.get(TLS_CA_VARIABLE) or None,
        metavar="FILE",
        help=f"PEM roots; implies --tls (default: ${TLS_CA_VARIABLE})",
    )
    group.add_argument(
        "--tls-cert", type=Path, metavar="FILE", help="PEM certificate of the client"
    )
    group.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM key of --tls-cert")
    group.add_argument(
        "--tls-server-name", metavar="NAME", help="name expected in the server's certificate"
    )
    group.add_argument(
        "--details", action="store_true", help="print a line for every field that an error reports"
    )
    group.add_argument(
        "--timeout",
        type=positive_seconds,
        metavar="SECONDS",
        help=f"deadline of a call (default: none for streams, else {_DEFAULT_TIMEOUT_SECONDS:g})",
    )
    return parser


def json_parser() -> argparse.ArgumentParser:
    """``--json``, as a parent parser."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def adapter_parser(*, required: bool = False) -> argparse.ArgumentParser:
    """``--adapter``, as a parent parser."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "-a",
        "--adapter",
        dest="adapters",
        action="append",
        type=adapter_weight,
        default=[],
        required=required,
        metavar="NAME[@GENERATION][=WEIGHT]",
        help="an adapter; repeat for a mix",
    )
    return parser


def adapter_weight(text: str) -> AdapterWeight:
    """:meth:`AdapterWeight.parse` for argparse, which hides the text of a ``ValueError``."""
    try:
        return AdapterWeight.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def text_argument(text: str) -> str:
    """The argument, or standard input if it is ``-``."""
    return sys.stdin.read() if text == "-" else text


def with_client(
    verb: Callable[[argparse.Namespace, TurretClient], None],
) -> Callable[[argparse.Namespace], int]:
    """Give a verb its client, and turn its errors into one line and an exit code.

    A verb that Ctrl-C ends may have put its last words into ``stopped`` of its arguments.
    """

    def run(args: argparse.Namespace) -> int:
        try:
            with _connect(args) as client:
                verb(args, client)
        except TurretRpcError as error:
            print_error(error, args)
            _print_details(error, args)
            return 1
        except BrokenPipeError:
            # The reader has closed the output. Nothing may be written there at exit either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except (OSError, UnfinishedAnswerError) as error:
            print_error(error, args)
            return 1
        except (TypeError, ValueError) as error:
            print_error(error, args)
            return 2
        except KeyboardInterrupt:
            # Closing the client has cancelled the call. End the line that was being written.
            said: str = getattr(args, "stopped", "")
            print(f"\n{said}" if said else "", file=sys.stderr)
            return 130
        return 0

    return run


def _print_details(error: TurretRpcError, args: argparse.Namespace) -> None:
    if args.details:
        for each in error.violations:
            field = "" if each.field in ("", COUNTED) else f"{as_typed(each.field, args)}: "
            print(f"  {field}{each.description}", file=sys.stderr)
        if error.request_id:
            print(f"  request id: {error.request_id}", file=sys.stderr)
    elif len(error.violations) > _FEW_VIOLATIONS:
        listed = sum(each.field not in ("", COUNTED) for each in error.violations)
        total = int(error.metadata.get("violation_count", listed))
        which = f"all {total}" if total == listed else f"{listed} of {total}"
        print(f"  --details lists {which} fields at fault", file=sys.stderr)


def print_error(
    error: Exception, args: argparse.Namespace | None = None, hints: Mapping[str, str] = HINTS
) -> None:
    """Print an error as one line on standard error, in the flags' names.

    Args:
        error: What was raised.
        args: The flags that were given.
        hints: What to do next, by the reason of the error.
    """
    sys.stdout.flush()
    print(f"error: {_line_of(error, args or argparse.Namespace(), hints)}", file=sys.stderr)


def _line_of(error: Exception, args: argparse.Namespace, hints: Mapping[str, str]) -> str:
    if isinstance(error, AnswerCutError):
        # The answer itself is visible, so report only how it ended.
        return error.message
    if isinstance(error, TurretRpcError):
        return error.described(hint_of(error, args, hints), lambda field: as_typed(field, args))
    if isinstance(error, ArgumentError):
        return f"{as_typed(error.argument, args)}: {error.problem}"
    if isinstance(error, OSError) and error.strerror:
        named = "" if error.filename is None else f"{error.filename}: "
        return f"{named}{error.strerror}"
    return str(error)


def hint_of(
    error: TurretRpcError, args: argparse.Namespace, hints: Mapping[str, str] = HINTS
) -> str:
    """What to do next about an error; empty if nothing is sure to help."""
    return hint_for(error.reason or error.code.name, error.metadata, hints, **vars(args))


def print_json(value: object) -> None:
    """Print a result, or a list of them, with the field names of the API."""
    print(json.dumps(value, default=_jsonable, ensure_ascii=False, indent=2))


def _jsonable(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"not JSON: {value!r}")


def positive_seconds(text: str) -> float:
    """A number of seconds above 0, for argparse."""
    try:
        seconds = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(say("NOT_SECONDS", value=text)) from None
    if not seconds > 0:
        raise argparse.ArgumentTypeError(say("NOT_ABOVE", bound=0, value=text))
    return seconds


def given_token(args: argparse.Namespace) -> str | None:
    """The token of the flags, else of the environment.

    Raises:
        OSError: Its file cannot be read.
    """
    if args.token_from is not None:
        try:
            return args.token_from.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise OSError(unusable("--token-from", args.token_from, error)) from None
    return args.token or os.environ.get(TOKEN_VARIABLE)


def given_tls(args: argparse.Namespace) -> Tls | None:
    """The TLS settings of the flags; None without any.

    Raises:
        OSError: A file cannot be read.
        ValueError: They do not fit together.
    """
    if args.tls or args.tls_ca or args.tls_cert or args.tls_key or args.tls_server_name:
        for name in ("tls_ca", "tls_cert", "tls_key"):
            path: Path | None = getattr(args, name)
            if path is not None:
                try:
                    path.read_bytes()
                except OSError as error:
                    raise OSError(unusable(flag_of(name, args), path, error)) from None
        return Tls.from_files(
            ca=args.tls_ca,
            certificate=args.tls_cert,
            key=args.tls_key,
            server_name=args.tls_server_name,
        )
    return None


def _connect(args: argparse.Namespace) -> TurretClient:
    timeout = _DEFAULT_TIMEOUT_SECONDS if args.timeout is None else args.timeout
    # On the command line, report an unreachable server at once.
    policy = RetryPolicy(2, unreached=False)
    return TurretClient(
        args.address,
        token=given_token(args),
        tls=given_tls(args),
        timeout=timeout,
        max_retries=policy,
    )
