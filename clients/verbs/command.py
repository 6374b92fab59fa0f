"""The shared parts of the client verbs: the connection, texts, errors, JSON."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias

from turret.clients.calls.settings import RetryPolicy
from turret.clients.channel import Tls
from turret.clients.client import TurretClient
from turret.clients.errors import AnswerCutError, TurretRpcError
from turret.clients.hints import COMMAND_HINTS, hint_for
from turret.clients.messages.fields import ArgumentError
from turret.clients.verbs.flags import (
    DEFAULT_TIMEOUT_SECONDS,
    TOKEN_VARIABLE,
    add_connection_flags,
    as_typed,
)
from turret.clients.words import say

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


class UnfinishedAnswerError(Exception):
    """An answer, or a series of answers, that ended early because the server went away."""


def add_verb_parser(
    subparsers: Subparsers,
    name: str,
    text: str,
    func: Callable[[argparse.Namespace], int],
    *parents: argparse.ArgumentParser,
    description: str = "",
) -> argparse.ArgumentParser:
    """Add a verb with its flags and those of every verb.

    Args:
        subparsers: The command's subparsers.
        name: The name of the verb.
        text: Its line in the help.
        func: Runs it, and returns the exit code.
        *parents: Parsers of flags that it shares with others.
        description: The description in the help of the verb; if empty, ``text``.
    """
    parser = subparsers.add_parser(
        name,
        help=text,
        description=description or f"{text.capitalize()}.",
        parents=parents,
    )
    add_connection_flags(parser)
    parser.set_defaults(func=func, parser=parser)
    return parser


def text_argument(text: str) -> str:
    """The argument, or standard input if it is ``-``."""
    return sys.stdin.read() if text == "-" else text


def given_texts(args: argparse.Namespace) -> list[str]:
    """All texts of the arguments and the file, without empty lines.

    Raises:
        ValueError: There is no text.
    """
    texts: list[str] = []
    for text in args.texts:
        texts += _lines(sys.stdin.read()) if text == "-" else [text]
    texts += _lines(args.file or "")
    if not texts:
        raise ValueError(say("NO_TEXTS"))
    return texts


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def with_client(
    verb: Callable[[argparse.Namespace, TurretClient], int | None],
) -> Callable[[argparse.Namespace], int]:
    """Pass a client to a verb, and convert its errors to one line and an exit code.

    A verb returns another exit code than 0 if it has one. It may set ``stopped`` of its arguments
    to the line that is printed if Ctrl-C ends it.
    """

    def run(args: argparse.Namespace) -> int:
        try:
            with connect(args) as client:
                return verb(args, client) or 0
        except BrokenPipeError:
            # The command as a whole handles a reader that has closed the output.
            raise
        except (TurretRpcError, OSError, UnfinishedAnswerError) as error:
            print_error(error, args)
            return 1
        except (TypeError, ValueError) as error:
            print_error(error, args)
            return 2
        except KeyboardInterrupt:
            # Closing the client has cancelled the call. End the unfinished line.
            said: str = getattr(args, "stopped", "")
            print(f"\n{said}" if said else "", file=sys.stderr)
            return 130

    return run


def print_error(error: Exception, args: argparse.Namespace | None = None) -> None:
    """Print an error as one line on standard error, with the names of flags.

    Args:
        error: The error that was raised.
        args: The flags that were given.
    """
    with contextlib.suppress(OSError):
        print(end="", flush=True)
    print(f"error: {_line_of(error, args or argparse.Namespace())}", file=sys.stderr)


def _line_of(error: Exception, args: argparse.Namespace) -> str:
    if isinstance(error, AnswerCutError):
        # The answer itself is visible, so report only how it ended.
        return error.message
    if isinstance(error, TurretRpcError):
        key = error.reason or error.code.name
        hint = hint_for(key, error.metadata, COMMAND_HINTS, **vars(args))
        return error.described(hint, lambda field: as_typed(field, args))
    if isinstance(error, ArgumentError):
        return f"{as_typed(error.argument, args)}: {error.problem}"
    if isinstance(error, OSError) and error.strerror:
        named = "" if error.filename is None else f"{error.filename}: "
        return f"{named}{error.strerror}"
    return str(error)


def print_json(value: object) -> None:
    """Print a result, or a list of results, with the field names of the API."""
    print(json.dumps(value, default=_jsonable, ensure_ascii=False, indent=2))


def _jsonable(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"not JSON: {value!r}")


def given_token(args: argparse.Namespace) -> str | None:
    """The token from the flags or the environment."""
    return args.token or os.environ.get(TOKEN_VARIABLE)


def given_tls(args: argparse.Namespace) -> Tls | None:
    """The TLS settings from the flags; None if no flag sets any.

    Raises:
        ValueError: The settings are inconsistent.
    """
    pems = {"ca": args.tls_ca, "certificate": args.tls_cert, "key": args.tls_key}
    if not (args.tls or args.tls_server_name or any(pems.values())):
        return None
    return Tls(**pems, server_name=args.tls_server_name)


def connect(args: argparse.Namespace) -> TurretClient:
    """A client with the flags of the connection."""
    timeout = DEFAULT_TIMEOUT_SECONDS if args.timeout is None else args.timeout
    # On the command line, report an unreachable server at once.
    policy = RetryPolicy(2, unreached=False)
    return TurretClient(
        args.address,
        token=given_token(args),
        tls=given_tls(args),
        timeout=timeout,
        max_retries=policy,
    )
