"""Filters the output of Ray's processes: it drops lines that only look like failures."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

# Ray prints this when a caller disconnects before a replica was assigned: Serve cancels the call
# and never retrieves the exception of its task.
_CANCELLED = (
    re.compile(r"Task exception was never retrieved$"),
    re.compile(
        r"future: <Task .*ProxyResponseGenerator\._await_response\(\).*RequestCancelledError"
    ),
)
_CANCELLED_ENDS = "ray.serve.exceptions.RequestCancelledError:"
# When asked to shut down, Serve's controller kills itself before it has answered.
_CONTROLLER_ENDS = re.compile(
    r"Task ServeController\.graceful_shutdown failed\. .*was killed by `ray\.kill`", re.DOTALL
)
# The advice in this warning would open a fleet on one machine to other machines.
_ONE_MACHINE = re.compile(
    r".*HTTPOptions\.host=\S+ won't accept connections from HAProxy on other nodes"
)
_INGRESS = "HAProxyManager"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# The last line of a traceback, and HAProxy's first message about a problem.
_RAISED = re.compile(r"^(?:[\w.]+\.)?\w*(?:Error|Exception|Exit): *(\S.*)$", re.MULTILINE)
_ALERT = re.compile(r"^\[ALERT\][^:]*: (.*)$", re.MULTILINE)


def cause(text: str) -> str:
    """The last message of a traceback from another process, as Ray reports it; otherwise all."""
    text = _COLOUR.sub("", text)
    if '  File "' not in text:
        return text
    found = _ALERT.search(text) or next(reversed([*_RAISED.finditer(text)]), None)
    return found[1] if found else text.strip().splitlines()[-1]


class LineFilter:
    """Filters the lines of all processes as they arrive.

    Args:
        is_stopping: Whether the fleet is being stopped. The ingress then fails at whatever it was
            about to do.
        has_others: Whether the fleet may have other machines.
    """

    def __init__(self, is_stopping: Callable[[], bool], has_others: bool = True) -> None:
        self._is_stopping = is_stopping
        self._left_out = [_CONTROLLER_ENDS] if has_others else [_CONTROLLER_ENDS, _ONE_MACHINE]
        # By source: a line that may begin a message to leave out.
        self._held: dict[object, str] = {}
        self._inside: set[object] = set()

    def kept(self, source: object, actor: str | None, lines: Sequence[str]) -> list[str]:
        """The lines to show.

        Args:
            source: Stands for the stream that the lines come from.
            actor: The class of the actor that they are of, if of any.
            lines: The next ones of that stream.
        """
        if actor == _INGRESS and self._is_stopping():
            return []
        return [shown for line in lines for shown in self._take(source, line)]

    def _take(self, source: object, line: str) -> list[str]:
        if source in self._inside:
            is_last = line.startswith(_CANCELLED_ENDS)
            if not is_last and line.startswith((" ", "Traceback ")):
                return []
            self._inside.remove(source)
            if is_last:
                return []
        held = self._held.pop(source, None)
        if held is not None and _CANCELLED[1].match(line):
            self._inside.add(source)
            return []
        before = [] if held is None else [held]
        if _CANCELLED[0].match(line):
            self._held[source] = line
            return before
        return before if any(one.match(line) for one in self._left_out) else [*before, line]
