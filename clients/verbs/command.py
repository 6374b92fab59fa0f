"""The shared parts of the client verbs: flags, the connection, texts, errors, JSON."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from turret.clients.calls import RetryPolicy
from turret.clients.channel import DEFAULT_ADDRESS, Tls
from turret.clients.client import TurretClient
from turret.clients.errors import COMMAND_HINTS, AnswerCutError, TurretRpcError, hint_for
from turret.clients.fields import ArgumentError
from turret.clients.requests import AdapterWeight, GenerateOptions
from turret.clients.words import say

DEFAULT_TIMEOUT_SECONDS = 600.0
TOKEN_VARIABLE = "TURRET_TOKEN"
# Destinations of flags that an environment variable may set. Flags take precedence.
_VARIABLES = {"address": "TURRET_ADDRESS", "token": TOKEN_VARIABLE}
# Arguments of the Python client → the destinations of their flags, if these have other names.
_DESTINATIONS = {
    "adapters": "mixes",
    "inputs": "texts",
    "ca": "tls_ca",
    "certificate": "tls_cert",
    "key": "tls_key",
}
_T = TypeVar("_T")
# Arguments of argparse's add_argument, by a flag's names or a positional's destination.
Flags = Mapping[str, Mapping[str, Any]]


def flag(text: str, **options: Any) -> Mapping[str, Any]:
    """A flag's arguments for argparse's ``add_argument``; ``text`` is its help."""
    return {"help": text, **options}


def adapter_weight(text: str) -> AdapterWeight:
    """:meth:`AdapterWeight.parse` for argparse, which hides the text of a ``ValueError``."""
    try:
        return AdapterWeight.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive_seconds(text: str) -> float:
    """A number of seconds above 0, for argparse."""
    try:
        seconds = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(say("NOT_SECONDS", value=text)) from None
    if not seconds > 0:
        raise argparse.ArgumentTypeError(say("NOT_ABOVE", bound=0, value=text))
    return seconds


def file_bytes(path: str) -> bytes:
    """The content of a file, for the ``type`` of a flag."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        text = say("FILE_UNREADABLE", path=path, why=error.strerror)
        raise argparse.ArgumentTypeError(text) from None


def file_text(path: str) -> str:
    """The text of a file, for the ``type`` of a flag."""
    try:
        return file_bytes(path).decode()
    except UnicodeDecodeError:
        text = say("PATH_UNUSABLE", path=path, problem=say("NOT_UTF8"))
        raise argparse.ArgumentTypeError(text) from None


def _token(path: str) -> str:
    return file_text(path).strip()


def _text_or_file(text: str) -> str:
    return text if text.lstrip().startswith("{") else file_text(text)


_COUNT: Mapping[str, Any] = {"type": int, "metavar": "N"}
_NUMBER: Mapping[str, Any] = {"type": float, "metavar": "X"}
_SWITCH: Mapping[str, Any] = {"action": "store_true", "default": None}
_PEM: Mapping[str, Any] = {"type": file_bytes, "metavar": "FILE"}

ADAPTER = "-a --adapter"
SHARED_FLAGS: Flags = {
    ADAPTER: flag(
        "an adapter; repeat for a mix",
        dest="adapters",
        action="append",
        type=adapter_weight,
        default=[],
        metavar="NAME[@GENERATION][=WEIGHT]",
    ),
    "prompt": flag("text; - reads standard input", metavar="PROMPT"),
    "texts": flag("text; - reads standard input, one text per line", nargs="*", metavar="TEXT"),
    "--file": flag(
        "file with one text per line, used after the TEXT arguments", type=file_text, metavar="FILE"
    ),
    "--request-id": flag("id of the request in the server's log", metavar="ID"),
    "--json": flag("print JSON", action="store_true"),
}
REQUIRED_ADAPTER: Flags = {ADAPTER: {**SHARED_FLAGS[ADAPTER], "required": True, "default": None}}
# If a flag is not given, the server's default applies.
GENERATION_FLAGS: Flags = {
    "--top-k": flag("keep the N likeliest tokens", **_COUNT),
    "--seed": flag("make the answer repeatable", **_COUNT),
    "--max-tokens": flag("maximum number of tokens (default: up to the context)", **_COUNT),
    "--min-tokens": flag("number of tokens before stop conditions apply", **_COUNT),
    "--temperature": flag("sampling temperature; 0 is greedy (default: 1)", **_NUMBER),
    "--top-p": flag("keep the likeliest tokens up to this total probability", **_NUMBER),
    "--min-p": flag("drop tokens below this share of the highest probability", **_NUMBER),
    "--repetition-penalty": flag("divide the logits of earlier tokens by X", **_NUMBER),
    "--presence-penalty": flag("subtract X from the logits of generated tokens", **_NUMBER),
    "--frequency-penalty": flag("subtract X from a token's logit per occurrence", **_NUMBER),
    "--stop": flag("text that ends the answer; repeatable", action="append", metavar="TEXT"),
    "--stop-token-id": flag(
        "token that ends the answer; repeatable",
        dest="stop_token_ids",
        action="append",
        type=int,
        metavar="ID",
    ),
    "--ignore-eos": flag("generate past the model's end tokens", **_SWITCH),
    "--include-stop": flag("keep the stop text in the answer", **_SWITCH),
}
# An exclusive group would make the usage too wide: argparse keeps it on one line.
CONSTRAINT_FLAGS: Flags = {
    "--json-schema": flag("JSON that matches this schema", type=_text_or_file, metavar="FILE"),
    "--json-object": flag("a JSON object", **_SWITCH),
    "--regex": flag("text that matches this expression as a whole", metavar="REGEX"),
    "--grammar": flag(
        "text that this Lark or GBNF grammar describes", type=file_text, metavar="FILE"
    ),
    "--choice": flag("one of these texts; repeatable", action="append", metavar="TEXT"),
}


GENERATION_GROUPS: Mapping[str, Flags] = {
    "generation": GENERATION_FLAGS,
    "constraint on the answer, at most one": CONSTRAINT_FLAGS,
}


def shared(*names: str) -> Flags:
    """Some of the shared flags."""
    return {name: SHARED_FLAGS[name] for name in names}


def add_connection_flags(parser: argparse.ArgumentParser, server: str = "") -> None:
    """Add the connection flags, which every verb has.

    Args:
        parser: The verb's parser.
        server: For a verb that also works without a server, the help of ``--server``, which takes
            the place of ``--address``.
    """
    variable = os.environ.get
    group = parser.add_argument_group("connection")
    if server:
        group.add_argument("--server", dest="address", metavar="HOST:PORT", help=server)
    else:
        group.add_argument(
            "--address",
            default=variable("TURRET_ADDRESS") or DEFAULT_ADDRESS,
            metavar="HOST:PORT",
            help=f"default: $TURRET_ADDRESS, or {DEFAULT_ADDRESS}",
        )
    token = group.add_mutually_exclusive_group()
    token.add_argument(
        "--token",
        help=f"bearer token; process lists may show it to other users (default: ${TOKEN_VARIABLE})",
    )
    token.add_argument(
        "--token-from", dest="token", type=_token, metavar="FILE", help="file that holds the token"
    )
    group.add_argument(
        "--tls", action="store_true", help="use TLS, with the system's root certificates"
    )
    group.add_argument(
        "--tls-ca",
        **_PEM,
        default=variable("TURRET_TLS_CA") or None,
        help="PEM root certificates; implies --tls (default: $TURRET_TLS_CA)",
    )
    group.add_argument("--tls-cert", **_PEM, help="PEM certificate of the client")
    group.add_argument("--tls-key", **_PEM, help="PEM key of --tls-cert")
    group.add_argument(
        "--tls-server-name", metavar="NAME", help="name expected in the server's certificate"
    )
    group.add_argument(
        "--timeout",
        type=positive_seconds,
        metavar="SECONDS",
        help=f"deadline of a call (default: none for streams, else {DEFAULT_TIMEOUT_SECONDS:g})",
    )


def as_typed(argument: str, args: argparse.Namespace) -> str:
    """The flag, the positional or the environment variable that sets an argument of the client.

    Returns an argument unchanged if no flag of the verb sets it. For an item of a list, the result
    has the number of the item, counted from 1: ``--adapter 1``, or ``--adapter 1 weight``.
    """
    found = re.fullmatch(r"(\w+)(?:\[(\d+)\](?:\.(\w+))*)?", argument)
    if found is None or not hasattr(args, "parser"):
        return argument
    destinations = (found[1], _DESTINATIONS.get(found[1]))
    for action in args.parser._actions:
        if action.dest in destinations:
            name = flag_of(str(action.dest), args) if action.option_strings else action.metavar
            number = "" if found[2] is None else f" {int(found[2]) + 1}"
            return name + number + (" weight" if found[3] == "weight" else "")
    return argument


def flag_of(destination: str, args: argparse.Namespace) -> str:
    """The flag for a destination, or the environment variable if that sets the value."""
    variable, given = _VARIABLES.get(destination), getattr(args, destination)
    if variable and (given is None or str(given) == os.environ.get(variable)):
        return variable
    actions = (each for each in args.parser._actions if each.dest == destination)
    return next(actions).option_strings[-1]


def call_with_flags(method: Callable[..., _T], args: argparse.Namespace, **values: Any) -> _T:
    """Call a client's method with the flags that have the names of its arguments.

    Args:
        method: A method of a client.
        args: The flags.
        **values: Other arguments.
    """
    names = inspect.signature(method).parameters.keys() & vars(args).keys()
    return method(**{name: getattr(args, name) for name in names} | values)


def generation_options(args: argparse.Namespace) -> GenerateOptions:
    """The options that the flags set."""
    names = GenerateOptions.__annotations__.keys() & vars(args).keys()
    return GenerateOptions(**{name: getattr(args, name) for name in names})


Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


class UnfinishedAnswerError(Exception):
    """An answer, or a series of answers, that ended early because the server went away."""


def add_verb_parser(
    subparsers: Subparsers,
    name: str,
    text: str,
    run: Callable[[argparse.Namespace, TurretClient], int | None],
    flags: Flags,
    groups: Mapping[str, Flags] | None = None,
    description: str = "",
) -> argparse.ArgumentParser:
    """Add a verb with its flags and those of every verb.

    Args:
        subparsers: The command's subparsers.
        name: The name of the verb.
        text: Its line in the help.
        run: Runs it with a client; see ``with_client``.
        flags: Its flags.
        groups: Further flags, by the titles of their groups in the help.
        description: The description in the help of the verb; if empty, ``text``.
    """
    parser = subparsers.add_parser(
        name, help=text, description=description or f"{text.capitalize()}."
    )
    for title, table in {"": flags, **(groups or {})}.items():
        group = parser.add_argument_group(title) if title else parser
        for names, options in table.items():
            group.add_argument(*names.split(), **options)
    add_connection_flags(parser)
    parser.set_defaults(func=with_client(run), parser=parser)
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

    A verb returns an exit code, or None for 0. It may set ``args.stopped`` to the line that is
    printed if Ctrl-C ends the verb.
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


def print_error(error: Exception, args: argparse.Namespace) -> None:
    """Print an error as one line on standard error, with the names of flags.

    Args:
        error: The error that was raised.
        args: The flags that were given.
    """
    with contextlib.suppress(OSError):
        print(end="", flush=True)
    print(f"error: {_line_of(error, args)}", file=sys.stderr)


def _line_of(error: Exception, args: argparse.Namespace) -> str:
    if isinstance(error, AnswerCutError):
        # The answer itself is visible, so report only how it ended.
        return error.message
    if isinstance(error, TurretRpcError):
        key = error.reason or error.code.name
        hint = hint_for(key, error.metadata, COMMAND_HINTS)
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
    """A client with the settings of the connection flags."""
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
