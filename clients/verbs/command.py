"""What the client verbs share: flags, the connection, errors, JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from turret.clients.calls.retries import RetryPolicy
from turret.clients.channel import DEFAULT_ADDRESS, Tls
from turret.clients.client import TurretClient
from turret.clients.errors import (
    DEADLINE,
    ELSEWHERE,
    LISTED,
    LOADING,
    TOKEN,
    AnswerCutError,
    AuthenticationError,
    DeadlineExceededError,
    InvalidArgumentError,
    NotFoundError,
    TurretRpcError,
    UnavailableError,
)
from turret.clients.messages.argument_names import renamed
from turret.clients.messages.mix import AdapterWeight
from turret.clients.unreached import in_flags
from turret.clients.verbs.flags import as_typed, mention_flags, name_flags

_DEFAULT_TIMEOUT_SECONDS = 600.0
# More than so many are only counted, unless --details is given.
_FEW_VIOLATIONS = 8
# The server's next step for an adapter with a classification head.
_CLASSIFY = "call Classify"
# And that for a mix without one.
_WRITE = "there are Generate and Score"
# And those that one type in place of a call's.
_TYPED_STEPS = {
    "unmerge it first": "`turret adapters unmerge` takes it out",
    "FORCE ends them": "--force ends them",
    "unpin it first": "`turret adapters unpin NAME` comes first",
}
# Environment variables that stand for the flags of the same name; the flags win.
ADDRESS_VARIABLE = "TURRET_ADDRESS"
TOKEN_VARIABLE = "TURRET_TOKEN"
TLS_CA_VARIABLE = "TURRET_TLS_CA"
_VARIABLES = {"address": ADDRESS_VARIABLE, "token": TOKEN_VARIABLE, "tls_ca": TLS_CA_VARIABLE}


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
    group.add_argument("--tls-cert", type=Path, metavar="FILE", help="PEM certificate to show")
    group.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM key of --tls-cert")
    group.add_argument("--tls-server-name", metavar="NAME", help="name in the server's certificate")
    group.add_argument(
        "--details", action="store_true", help="print a line for every field that a refusal names"
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
            print_error(_with_next_step(error, args), args)
            _print_details(error, args.details)
            return 1
        except BrokenPipeError:
            # Who read has enough; nothing may be written there when the process ends either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except (OSError, UnfinishedAnswerError) as error:
            print_error(error, args)
            return 1
        except (TypeError, ValueError) as error:
            print_error(error, args)
            return 2
        except KeyboardInterrupt:
            # Closing the client has cancelled the call; what was being written ends here.
            said: str = getattr(args, "stopped", "")
            print(f"\n{said}" if said else "", file=sys.stderr)
            return 130
        return 0

    return run


def _with_next_step(error: TurretRpcError, args: argparse.Namespace) -> TurretRpcError:
    """The error with what its reader may do about it, where that is not the server's to say."""
    if isinstance(error, AnswerCutError):
        return error
    if error.message.endswith(_CLASSIFY):
        verb = "turret eval --classify" if hasattr(args, "classify") else "turret classify -a NAME"
        said = f"{error.message.removesuffix(_CLASSIFY)}`{verb}`"
        return error.with_message(said, step=(_CLASSIFY, f"`{verb}`"))
    if error.message.endswith(_WRITE):
        step = "there are `turret generate` and `turret score`"
        return error.with_message(
            f"{error.message.removesuffix(_WRITE)}{step}", step=(_WRITE, step)
        )
    for step, typed in _TYPED_STEPS.items():
        if error.message.endswith(step):
            own = typed.replace("NAME", getattr(args, "name", "NAME"))
            return error.with_message(error.message.removesuffix(step) + own)
    if error.message.endswith(LOADING):
        said = error.message.removesuffix(LOADING)
        return error.with_message(f"{said}; `{_health(args)} --wait 600` returns when it serves")
    if error.message.endswith(ELSEWHERE):
        said = error.message.removesuffix(ELSEWHERE)
        return error.with_message(f"{said}; --address or {ADDRESS_VARIABLE} names that one")
    if isinstance(error, UnavailableError) and not error.reason:
        return error.with_message(in_flags(error.message, args.address))
    if error.code.name == "UNIMPLEMENTED" and not error.reason:
        return error.with_message(
            f"what answers at {args.address} does not know turret.v1 ({error.message}): another"
            " server or an older one, or a proxy on the way (http_proxy, no_proxy)"
        )
    if isinstance(error, DeadlineExceededError) and DEADLINE in error.message:
        said, allowed = error.message.rsplit(DEADLINE, 1)
        if args.timeout is not None:
            return error.with_message(f"{said}: --timeout {allowed}")
        seconds = allowed.partition(" ")[0]
        return error.with_message(f"{said}: --timeout allows more seconds than {seconds}")
    if error.reason == "ADAPTER_EXISTS" and hasattr(args, "name"):
        return error.with_message(f"{error.message.partition('; ')[0]}; {_name_is_taken(args)}")
    if isinstance(error, NotFoundError) and error.message.endswith(LISTED):
        said = error.message.removesuffix(LISTED)
        return error.with_message(
            f"{said}; `turret adapters list` shows what there is{_loads(error, args)}"
        )
    if isinstance(error, AuthenticationError) and error.message.endswith(TOKEN):
        said = error.message.removesuffix(TOKEN)
        return error.with_message(f"{said}; give it with --token, --token-from or {TOKEN_VARIABLE}")
    return error


def _loads(error: NotFoundError, args: argparse.Namespace) -> str:
    """How what is to answer comes to be there; its folder may lie below the adapter root already.

    Nothing of what the other verbs change, which has a name of its own.
    """
    name = error.metadata.get("adapters", "")
    if not name or "," in name or hasattr(args, "name"):
        return ""
    return f", `turret adapters load {name} PATH` registers a folder below the adapter root"


def _name_is_taken(args: argparse.Namespace) -> str:
    """What one may do about it: with a folder, replace what has the name; else remove that."""
    frees = f"`turret adapters unload {args.name}` frees the name"
    if getattr(args, "replace", None) is False:
        return f"--replace makes these its next generation, {frees}"
    if hasattr(args, "path"):
        command = f"turret adapters replace {args.name} {shlex.quote(args.path)}"
        return f"`{command}` makes these its next generation, {frees}"
    return frees


def _health(args: argparse.Namespace) -> str:
    """The command that asks the same server for its health; of TLS, flags are left out."""
    is_typed = args.address not in (DEFAULT_ADDRESS, os.environ.get(ADDRESS_VARIABLE))
    return f"turret health --address {args.address}" if is_typed else "turret health"


def _print_details(error: TurretRpcError, wanted: bool) -> None:
    if wanted:
        for field, why in ((each.field, each.description) for each in error.violations):
            # A star stands for fields that the server only counts.
            print(
                f"  {why if field in ('', '*') else f'{as_typed(field)}: {why}'}", file=sys.stderr
            )
        if error.request_id:
            print(f"  request id: {error.request_id}", file=sys.stderr)
    elif len(error.violations) > _FEW_VIOLATIONS:
        listed = sum(each.field not in ("", "*") for each in error.violations)
        total = int(error.metadata.get("violation_count", listed))
        which = f"all {total}" if total == listed else f"{listed} of {total}"
        print(f"  --details lists {which} fields at fault", file=sys.stderr)


def print_error(error: Exception, args: argparse.Namespace | None = None) -> None:
    """One line on standard error, with the flags' names for what they set.

    Args:
        error: What was raised.
        args: Where given, a flag that was not typed is called by the variable that stands for it.
    """
    sys.stdout.flush()
    # Of an answer that a server has cut the reader sees what came, and no call that failed.
    text = error.message if isinstance(error, AnswerCutError) else str(error)
    if isinstance(error, OSError) and error.strerror:
        named = "" if error.filename is None else f"{error.filename}: "
        text = f"{named}{error.strerror}"
    elif isinstance(error, TurretRpcError):
        text = renamed(text, (violation.field for violation in error.violations), as_typed)
        text = mention_flags(text) if isinstance(error, InvalidArgumentError) else text
        if hasattr(args, "mixes"):
            text = re.sub(r"--adapter(?![\w-])", "--mix", text)
    elif isinstance(error, TypeError | ValueError):
        text = name_flags(text)
    print(f"error: {text if args is None else _in_variables(text, args)}", file=sys.stderr)


def _in_variables(text: str, args: argparse.Namespace) -> str:
    """The text with the variable in place of the flag that it begins with, if that set it."""
    flag, _, rest = text.partition(":")
    name = flag.removeprefix("--").replace("-", "_")
    variable = _VARIABLES.get(name, "")
    given = getattr(args, name, None)
    is_typed = given is not None and str(given) != os.environ.get(variable)
    return text if not variable or is_typed else f"{variable}:{rest}"


def print_json(value: object) -> None:
    """Print a result, or a list of them, with the field names of the API."""
    print(json.dumps(value, default=_jsonable, ensure_ascii=False, indent=2))


def _jsonable(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"not JSON: {value!r}")


def positive_seconds(text: str) -> float:
    """A number of seconds above 0, for argparse."""
    try:
        seconds = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds") from None
    if not seconds > 0:
        raise argparse.ArgumentTypeError("must be more than 0")
    return seconds


def given_token(args: argparse.Namespace) -> str | None:
    """The token of the flags, else of the environment.

    Raises:
        OSError: Its file cannot be read.
    """
    if args.token_from is not None:
        try:
            return args.token_from.read_text(encoding="utf-8").strip()
        except OSError as error:
            why = error.strerror
        except UnicodeDecodeError:
            why = "is no UTF-8 text"
        raise OSError(
            f"--token-from {args.token_from}: {why}; it takes a file that holds the token alone"
        )
    return args.token or os.environ.get(TOKEN_VARIABLE)


def given_tls(args: argparse.Namespace) -> Tls | None:
    """What the flags say of TLS; None is none.

    Raises:
        OSError: A file cannot be read.
        ValueError: They do not fit together.
    """
    if args.tls or args.tls_ca or args.tls_cert or args.tls_key or args.tls_server_name:
        for name in ("tls_ca", "tls_cert", "tls_key"):
            path: Path | None = getattr(args, name)
            flag = f"--{name.replace('_', '-')}"
            if path is not None and not path.is_file():
                raise FileNotFoundError(f"{flag}: there is no file {path}")
            if path is not None and not os.access(path, os.R_OK):
                raise PermissionError(f"{flag}: may not read {path}")
        return Tls.from_files(
            ca=args.tls_ca,
            certificate=args.tls_cert,
            key=args.tls_key,
            server_name=args.tls_server_name,
        )
    return None


def _connect(args: argparse.Namespace) -> TurretClient:
    timeout = _DEFAULT_TIMEOUT_SECONDS if args.timeout is None else args.timeout
    # Who types a command wants to know at once that no server is there.
    policy = RetryPolicy(2, unreached=False)
    return TurretClient(
        args.address,
        token=given_token(args),
        tls=given_tls(args),
        timeout=timeout,
        max_retries=policy,
    )
