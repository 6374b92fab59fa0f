"""What ``turret serve`` says before it serves: lines for people, or the log's own as JSON."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

_FLAG, _VARIABLE, _JSON = "--log-format", "TURRET_LOG_FORMAT", "json"


def wants_json(arguments: Sequence[str], environ: Mapping[str, str]) -> bool:
    """Whether a flag or a variable asks for JSON, in a command line that may make no sense."""
    said = environ.get(_VARIABLE, "")
    for word, after in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, equals, value = word.partition("=")
        if flag == _FLAG:
            said = value if equals else after
    return said == _JSON


def refuse(*problems: str, is_json: bool, command: str = "turret serve") -> None:
    """Say why nothing starts, a line each."""
    _say(f"{command}: error", "cannot start", problems, is_json=is_json)


def note(*notes: str, is_json: bool, command: str = "turret serve") -> None:
    """Say what looks like a mistake and keeps nothing from starting, a line each."""
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
