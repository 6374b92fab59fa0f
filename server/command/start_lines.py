"""Messages of ``turret serve`` during startup: plain lines, or JSON as in the log."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import turret

if TYPE_CHECKING:
    from turret.server.command.flags import Settings

_REFUSED = "cannot start"


def refuse(
    found: Iterable[tuple[str, str]], *, is_json: bool, command: str = "turret serve"
) -> None:
    """Report why the server does not start, with one line per error."""
    _say(f"{command}: error", _REFUSED, found, is_json)


def note(found: Iterable[tuple[str, str]], *, is_json: bool, command: str = "turret serve") -> None:
    """Report likely mistakes that do not prevent the start."""
    _say(f"{command}: note", "a setting may be a mistake", found, is_json)


def introduce(settings: Settings[Any], config: Any) -> None:
    """Report the version and the settings."""
    with_defaults = config.log.verbose
    if config.log.log_format == "text":
        lines = settings.lines(config, with_defaults=with_defaults)
        said = "\n".join([f"turret {turret.__version__}", *lines])
        # A server continues to serve after the reader of its log has gone.
        with contextlib.suppress(BrokenPipeError):
            print(said, file=sys.stderr, flush=True)
        return
    import logging

    from turret.server import log

    found = settings.as_json(config, with_defaults=with_defaults)
    fields = log.fields(version=turret.__version__, settings=found)
    logging.getLogger(__name__).info("starting", extra=fields)


def _say(head: str, message: str, found: Iterable[tuple[str, str]], is_json: bool) -> None:
    if not is_json:
        for place, text in found:
            print(f"{head}: {place}: {text}" if place else f"{head}: {text}", file=sys.stderr)
        return
    import logging

    from turret.server import log

    log.configure(log_format="json")
    level = logging.ERROR if message == _REFUSED else logging.WARNING
    for place, text in found:
        reason = getattr(text, "reason", "")
        fields = log.fields(reason=reason, field=place, why=str(text))
        logging.getLogger(__name__).log(level, message, extra=fields)
