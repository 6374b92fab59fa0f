"""Shell completion for ``turret``, which argcomplete derives from the parser."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import Any

import argcomplete
from argcomplete.completers import ChoicesCompleter, FilesCompleter, SuppressCompleter
from argcomplete.shell_integration import shellcode

# Placeholders that the help uses for paths.
_PATHS = ("FILE", "DIR", "PATH", "FILE.svg", "CONFIG")
_ADAPTER_ARGUMENTS = ("adapters", "mixes")
# Verbs in which NAME is the name of a new adapter.
_VERBS_WITH_NEW_NAME = ("turret adapters load", "turret adapters fuse")
# A zsh without a configuration has not loaded its completion system, so the script loads it.
_ZSH = "#compdef turret\n(( ${+functions[compdef]} )) || { autoload -U compinit && compinit; }\n"
# Timeout of the call that lists the server's adapters. It usually takes 0.15 s. Without an answer,
# no names are suggested.
_TIMEOUT_SECONDS = 1.0


def script(shell: str) -> str:
    """The script that makes a shell (``bash``, ``zsh`` or ``fish``) complete the command."""
    code = shellcode(["turret"], shell=shell)
    return f"{_ZSH}{code}" if shell == "zsh" else code


def verb_of_line() -> str | None:
    """The verb of the line to complete, for its flags; None for a line without a verb."""
    words = os.environ.get("COMP_LINE", "").split()
    return words[1] if len(words) > 1 else None


def complete(parser: argparse.ArgumentParser, offers: Mapping[str, Sequence[str]]) -> None:
    """Write the completions of the line in the environment, and end the process.

    Args:
        parser: The parser, with the flags of the line's verb.
        offers: Values of flags for which the parser has no choices, by ``VERB:--FLAG``.
    """
    _prepare(parser, offers)
    argcomplete.autocomplete(
        parser, always_complete_options="long", default_completer=SuppressCompleter()
    )


def _prepare(parser: argparse.ArgumentParser, offers: Mapping[str, Sequence[str]]) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                _prepare(child, offers)
            continue
        flag = action.option_strings[-1] if action.option_strings else ""
        open_values = offers.get(f"{parser.prog.partition(' ')[2]}:{flag}")
        shown = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
        is_adapter = not flag and action.dest == "name" and parser.prog not in _VERBS_WITH_NEW_NAME
        completer: Any = None
        if open_values or shown.startswith("{"):
            completer = ChoicesCompleter(
                dict.fromkeys(open_values or shown.strip("{}").split(","), "")
            )
        elif is_adapter or action.dest in _ADAPTER_ARGUMENTS:
            completer = _adapters
        # A placeholder may have several parts, as in DIR|ORG/NAME or NAME=PATH.
        elif {shown.replace("=", "|").split("|")[0], shown.rpartition("=")[2]} & {*_PATHS}:
            completer = FilesCompleter()
        if completer is not None:
            setattr(action, "completer", completer)  # noqa: B010 -- argcomplete's own way


def _adapters(parsed_args: argparse.Namespace, **_: object) -> list[str]:
    """The names of the adapters on the server to which the line refers."""
    from turret.clients.errors import TurretRpcError
    from turret.clients.verbs.command import connect

    parsed_args.timeout = _TIMEOUT_SECONDS
    try:
        with connect(parsed_args) as client:
            return [adapter.name for adapter in client.adapters.list()]
    except (TurretRpcError, OSError, ValueError):
        return []
