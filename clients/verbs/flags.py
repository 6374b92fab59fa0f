"""The flags for generation options, shared by the verbs that generate."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from turret.clients.messages.requests import GenerateOptions
from turret.clients.words import Text, say

_FLOATS = {
    "temperature": "0 is greedy (default: 1)",
    "top_p": "keep the likeliest tokens up to this probability",
    "min_p": "drop tokens below this share of the likeliest",
    "repetition_penalty": "divide logits of tokens seen",
    "presence_penalty": "subtract from logits of tokens generated",
    "frequency_penalty": "the same, per occurrence",
}
_INTS = {
    "top_k": "keep the k likeliest tokens",
    "seed": "make the answer repeatable",
    "max_tokens": "most tokens to generate (default: up to the context)",
    "min_tokens": "no stop condition applies before",
}
_ON_OFF = ("ignore_eos", "include_stop")
_CONSTRAINTS = ("json_schema", "json_object", "regex", "grammar", "choice")
# Environment variables that set the flags of the same name. Flags take precedence.
ADDRESS_VARIABLE = "TURRET_ADDRESS"
TOKEN_VARIABLE = "TURRET_TOKEN"
TLS_CA_VARIABLE = "TURRET_TLS_CA"
_VARIABLES = {"address": ADDRESS_VARIABLE, "token": TOKEN_VARIABLE, "tls_ca": TLS_CA_VARIABLE}
# Flags that set an argument of the Python client under another name.
_TYPED = {
    "stop_token_ids": "--stop-token-id",
    "adapters": "--adapter",
    "drain_seconds": "--wait",
    "pinned": "--pin",
    "prompt": "PROMPT",
    "inputs": "TEXT",
    "name": "NAME",
    "path": "PATH",
    "directory": "DIR",
    "ca": "--tls-ca",
    "certificate": "--tls-cert",
    "key": "--tls-key",
}
# Arguments that a flag of the same name sets, in any verb.
_SAME = {
    *(*_FLOATS, *_INTS, *_ON_OFF, *_CONSTRAINTS),
    *("stop", "top_n", "request_id", "address", "token", "timeout"),
    *("pooling", "normalize", "dimensions", "task", "expected_generation", "generation"),
    *("method", "residency", "combination", "rank", "energy", "density", "majority_sign_method"),
    *("precision",),
}


def generation_parser() -> argparse.ArgumentParser:
    """The flags, as a parent parser; unset ones leave the server's default."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("generation")
    for kind, flags in ((int, _INTS), (float, _FLOATS)):
        for name, text in flags.items():
            metavar = "N" if kind is int else "X"
            group.add_argument(_flag(name), type=kind, metavar=metavar, help=text)
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="text that ends the answer; repeatable"
    )
    group.add_argument(
        "--stop-token-id",
        dest="stop_token_ids",
        action="append",
        type=int,
        metavar="ID",
        help="token that ends the answer; repeatable",
    )
    for name, text in (
        ("--ignore-eos", "generate past the model's end tokens"),
        ("--include-stop", "keep the stop text in the answer"),
    ):
        group.add_argument(name, action="store_true", default=None, help=text)
    _add_constraints(parser)
    return parser


def _add_constraints(parser: argparse.ArgumentParser) -> None:
    # An exclusive group would make the usage too wide: argparse keeps it on one line.
    one = parser.add_argument_group("constraint on the answer, at most one")
    one.add_argument(
        "--json-schema", type=_text_or_file, metavar="FILE", help="JSON that matches this schema"
    )
    one.add_argument("--json-object", action="store_true", default=None, help="a JSON object")
    one.add_argument("--regex", metavar="REGEX", help="text that the whole expression matches")
    one.add_argument(
        "--grammar",
        type=file_text,
        metavar="FILE",
        help="text that this Lark or GBNF grammar describes",
    )
    one.add_argument(
        "--choice", action="append", metavar="TEXT", help="one of these texts; repeatable"
    )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _text_or_file(text: str) -> str:
    return text if text.lstrip().startswith("{") else file_text(text)


def file_text(path: str) -> str:
    """The text of a file, for the ``type`` of a flag."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(_unreadable(path, error)) from None


def unusable(flag: str, path: Path, error: OSError | UnicodeDecodeError) -> Text:
    """Reports a flag's file that cannot be read, or is not UTF-8."""
    return say("FLAG_PATH_UNUSABLE", flag=flag, problem=_unreadable(path, error))


def _unreadable(path: str | Path, error: OSError | UnicodeDecodeError) -> Text:
    if isinstance(error, OSError):
        return say("FILE_UNREADABLE", path=path, why=error.strerror)
    return say("PATH_UNUSABLE", path=path, problem=say("NOT_UTF8"))


def as_typed(argument: str, args: argparse.Namespace) -> str:
    """The flag, the positional or the environment variable that sets an argument of the client.

    An unknown argument stays as it is. Of a flag that is given several times, or of several texts,
    the number counts from 1.
    """
    found = re.fullmatch(r"(\w+)(?:\[(\d+)\](?:\.\w+)*)?", argument)
    if found is None or found[1] not in {*_SAME, *_TYPED}:
        return argument
    if found[1] == "adapters" and hasattr(args, "mixes"):
        name = "--mix"
    elif found[1] in _SAME:
        name = flag_of(found[1], args)
    elif (name := _TYPED[found[1]]) == "--tls-ca":
        name = flag_of("tls_ca", args)
    return name if found[2] is None else f"{name} {int(found[2]) + 1}"


def flag_of(name: str, args: argparse.Namespace) -> str:
    """The flag, or the environment variable that has set it."""
    variable, given = _VARIABLES.get(name), getattr(args, name, None)
    is_flag = given is not None and str(given) != os.environ.get(variable or "")
    return variable if variable and hasattr(args, name) and not is_flag else _flag(name)


def generation_options(args: argparse.Namespace) -> GenerateOptions:
    """The options that the flags set, adapters aside.

    Raises:
        ValueError: The answer is to be several things.
    """
    given = [_flag(name) for name in _CONSTRAINTS if getattr(args, name) is not None]
    if len(given) > 1:
        raise ValueError(say("FLAGS_CONFLICT", flags=", ".join(given)))
    return GenerateOptions(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        seed=args.seed,
        max_tokens=args.max_tokens,
        min_tokens=args.min_tokens,
        stop=args.stop,
        stop_token_ids=args.stop_token_ids,
        ignore_eos=args.ignore_eos,
        include_stop=args.include_stop,
        json_schema=args.json_schema,
        json_object=args.json_object,
        regex=args.regex,
        grammar=args.grammar,
        choice=args.choice,
    )
