"""Messages of ``turret serve`` before it serves: plain lines, or JSON as in the log."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

_FLAG, _VARIABLE, _JSON = "--log-format", "TURRET_LOG_FORMAT", "json"


def wants_json(arguments: Sequence[str], environ: Mapping[str, str]) -> bool:
    """Whether a flag or a variable asks for JSON, even if the command line is invalid."""
    said = environ.get(_VARIABLE, "")
    for word, after in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, equals, value = word.partition("=")
        if flag == _FLAG:
            said = value if equals else after
    return said == _JSON


def refuse(*problems: str, is_json: bool, command: str = "turret serve") -> None:
    """Report why the server does not start, one line per reason."""
    _say(f"{command}: error", "cannot start", problems, is_json=is_json)


def note(*notes: str, is_json: bool, command: str = "turret serve") -> None:
    """Report likely mistakes that do not keep the server from starting, one line each."""
    _say(f"{command}: note", "a setting may be a mistake", notes, is_json=is_json)


def _say(head: str, message: str, reasons: Sequence[str], *, is_json: bool) -> None:
    if not is_json:
        for reason in reasons:
            print(f"{head}: {reason}", file=sys.stderr)
        return
    import logging

    from turret.server import log

    log.configure(log_format="json")
    level = logging.ERROR if head.endswith("error") else logging.WARNING
    for reason in reasons:
        logging.getLogger(__name__).log(level, message, extra=log.fields(reason=reason))
