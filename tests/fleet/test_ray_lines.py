"""The lines of Ray's processes that are dropped, and those that are not."""

from __future__ import annotations

import pytest

from turret.fleet.serving.ray_cluster import LineFilter, cause

# The output of Ray 2.60 and Python 3.11.
NOISE = """\
Task exception was never retrieved
future: <Task finished name='Task-63' coro=<ProxyResponseGenerator._await_response() done, defined \
at /x/ray/serve/_private/proxy_response_generator.py:164> exception=RequestCancelledError('3eb0')>
Traceback (most recent call last):
  File "/x/ray/serve/_private/proxy_response_generator.py", line 165, in _await_response
    return await self._response
           ^^^^^^^^^^^^^^^^^^^^
  File "/x/ray/serve/handle.py", line 556, in __await__
    raise RequestCancelledError(self.request_id) from None
ray.serve.exceptions.RequestCancelledError: Request 3eb0 was cancelled.""".splitlines()
OTHER = [
    "Task exception was never retrieved",
    "future: <Task finished name='Task-1' coro=<work() done> exception=KeyError(1)>",
    "Traceback (most recent call last):",
    '  File "/x/y.py", line 1, in work',
    "KeyError: 1",
]
ENDS = (
    "Task ServeController.graceful_shutdown failed. There are infinite retries remaining, so the"
    " task will be retried. Error: The actor is dead because it was killed by `ray.kill`."
)
DIES = (
    "Task ServeController.graceful_shutdown failed. There are infinite retries remaining, so the"
    " task will be retried. Error: The actor is dead because its node has died."
)
OPENS = (
    "WARNING 2026-11-27 08:00:00,123 controller 4242 -- HTTPOptions.host='127.0.0.1' won't accept"
    " connections from HAProxy on other nodes; cross-node routing will fail with connection"
    " refused. Set host to '0.0.0.0' or omit it to use the HAProxy-mode default."
)


def test_only_lines_about_cancelled_calls_are_dropped() -> None:
    lines = LineFilter(lambda: False)
    said = ["before", *NOISE, *NOISE, *OTHER, "Traceback (most recent call last):", "  after"]
    kept = ["before", *OTHER, "Traceback (most recent call last):", "  after"]
    assert lines.kept("a", "ProxyActor", said) == kept


def test_lines_arrive_in_any_chunks_and_from_several_processes() -> None:
    lines = LineFilter(lambda: False)
    shown: dict[str, list[str]] = {"a": [], "b": []}
    for noise, other in zip([*NOISE, "end"], [*OTHER, *["more"] * 5], strict=True):
        shown["a"] += lines.kept("a", "ProxyActor", [noise])
        shown["b"] += lines.kept("b", "ProxyActor", [other])
    assert shown == {"a": ["end"], "b": [*OTHER, *["more"] * 5]}


def test_an_incomplete_block_hides_no_later_line() -> None:
    lines = LineFilter(lambda: False)
    assert lines.kept("a", None, [*NOISE[:4], *OTHER]) == OTHER


def test_the_requested_end_of_a_controller_is_not_reported() -> None:
    lines = LineFilter(lambda: False)
    assert lines.kept("raylet", None, [ENDS, DIES]) == [DIES]


def test_advice_for_several_machines_is_dropped_on_one_machine() -> None:
    assert LineFilter(lambda: False, has_others=False).kept("a", None, [OPENS, DIES]) == [DIES]
    assert LineFilter(lambda: False, has_others=True).kept("a", None, [OPENS]) == [OPENS]


def test_lines_of_the_ingress_are_kept_until_the_fleet_stops() -> None:
    stops = False
    lines = LineFilter(lambda: stops)
    said = ["HAProxy graceful reload failed: HAProxy crashed during startup: exit code 1"]
    assert lines.kept("a", "HAProxyManager", said) == said
    stops = True
    assert lines.kept("a", "HAProxyManager", said) == []
    assert lines.kept("b", "ProxyActor", said) == said


_REMOTE = (
    "\x1b[36mray::HAProxyManager.ready()\x1b[39m (pid=5, ip=127.0.0.2)\n"
    '  File "/x/haproxy.py", line 2107, in _reload_haproxy\n    await task\n'
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("No node has a GPU.", "No node has a GPU."),
        (
            f"it failed. Error:\n{_REMOTE}turret.server.errors.InvalidRequestError: model: x",
            "model: x",
        ),
        (
            f"{_REMOTE}KeyError: 'a'\n\nDuring that:\n{_REMOTE}RuntimeError: at the end\n",
            "at the end",
        ),
        (
            f"{_REMOTE}RuntimeError: HAProxy crashed: [NOTICE] (5) : version\n"
            "[ALERT]    (5) : config : socket path 'x' too long (max 97)\n[ALERT]  (5) : Fatal",
            "config : socket path 'x' too long (max 97)",
        ),
        (f"{_REMOTE}gone\n", "gone"),
    ],
)
def test_the_last_line_of_a_traceback_is_reported(text: str, said: str) -> None:
    assert cause(text) == said
