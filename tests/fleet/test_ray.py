"""The fleet on Ray: the worker's setup, lines of its processes, the registry's actor."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from said import says

from turret.fleet.serving import serve
from turret.fleet.serving.ray_cluster import LineFilter, cause
from turret.server.errors import UnavailableError

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray")

# Checks the corrections of ``ingress.prepare`` in a worker's process: limits of bodies and
# messages, checks before messages arrive, ports on loopback only that no other process has, and a
# new HAProxy if one dies.
_PREPARED = """
import asyncio, sys
import grpc.aio
import ray.util
from ray._private import ray_constants
from ray.serve._private import grpc_util
from ray.serve._private.direct_ingress_http_util import ASGIDIReceiveProxy
from ray.serve._private.haproxy import HAProxyApi
from ray.serve.config import gRPCOptions
from turret.fleet.serving import ingress
from turret.fleet.serving.ingress import ingress_environment
from pathlib import Path

hook = ingress_environment(Path("/"))[ray_constants.WORKER_PROCESS_SETUP_HOOK_ENV_VAR]
assert hook == f"{ingress.__name__}.{ingress.prepare.__name__}"


class Process:
    returncode = None

    def __init__(self):
        self.over = asyncio.Event()

    async def wait(self):
        await self.over.wait()
        return self.returncode

    def kill(self):
        self.returncode = -9
        self.over.set()


started = []


async def start(self, *arguments):
    await asyncio.sleep(0.3 if arguments else 0.0)
    started.append(Process())
    return started[-1]


HAProxyApi._start_and_wait_for_haproxy = start
ray.util.get_node_ip_address = lambda: ingress.LOOPBACK
ingress.prepare()


# The number of parts of a body that are read although the handler takes none.
async def read_ahead():
    parts = 0

    async def receive():
        nonlocal parts
        parts += 1
        await asyncio.sleep(0)
        return {"type": "http.request", "body": b"x", "more_body": True}

    proxy = ASGIDIReceiveProxy({"type": "http"}, receive, asyncio.get_running_loop())
    task = proxy.fetch_until_disconnect_task()
    done, _ = await asyncio.wait([task], timeout=0.05)
    assert not done
    ahead = parts
    assert (await proxy())["body"] == b"x"
    task.cancel()
    return ahead


async def main():
    assert await read_ahead() == 2
    received = [v for n, v in grpc_util.DEFAULT_GRPC_SERVER_OPTIONS if "receive" in n]
    assert received == [4 << 20], received
    assert ("grpc.http2.bdp_probe", 0) in grpc_util.DEFAULT_GRPC_SERVER_OPTIONS
    server = grpc_util.gRPCGenericServer(lambda **_: None)
    unary = grpc.unary_unary_rpc_method_handler(None)
    # The changed handler starts before its message has arrived, and checks the call.
    assert server._override_method_handler("/turret.v1.Inference/Score", unary).request_streaming
    plain = grpc.aio.server()
    for each in (server, plain):
        port = each.add_insecure_port("[::]:0")
        listening = Path("/proc/net/tcp6").read_text() + Path("/proc/net/tcp").read_text()
        heard = [l.split()[1] for l in listening.splitlines() if f":{port:04X} 0" in l]
        assert heard and {h[-13:-5] for h in heard} == {"0100007F"}, heard

    # A replica cannot take a port of another fleet.
    replica = {"event_loop": asyncio.get_running_loop(), "enable_so_reuseport": False}
    taken = gRPCOptions(port=port)
    try:
        await grpc_util.start_grpc_server(lambda **_: None, taken, **replica)
    except RuntimeError:
        pass
    else:
        raise AssertionError("two servers share a port")

    api = HAProxyApi.__new__(HAProxyApi)
    api._old_procs = []
    api._proc = await api._start_and_wait_for_haproxy()
    api._proc.kill()
    await asyncio.sleep(0.1)
    assert len(started) == 2 and api._proc is started[1], started
    # A reload ends the old process before the new one is known.
    async def reload():
        api._proc = await api._start_and_wait_for_haproxy("-sf")

    reloading = asyncio.ensure_future(reload())
    await asyncio.sleep(0.1)
    started[1].kill()
    await reloading
    await asyncio.sleep(0.5)
    assert len(started) == 3 and api._proc is started[2], started
    await api.stop()
    await asyncio.sleep(0.5)
    assert len(started) == 3 and started[2].returncode == -9, started
    print("done")


asyncio.run(main())
"""


@needs_ray
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_listens_on_loopback_and_keeps_its_haproxy() -> None:
    done = subprocess.run([sys.executable, "-c", _PREPARED], capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr


@needs_ray
def test_ray_still_calls_the_patched_function() -> None:
    found = importlib.util.find_spec("ray")
    assert found is not None
    assert found.origin is not None
    folder = Path(found.origin).with_name("_private")
    call = "services.resolve_ip_for_localhost(_node_ip_address)"
    assert call in (folder / "worker.py").read_text()
    assert "bootstrap_host = resolve_ip_for_localhost(host)" in (folder / "services.py").read_text()


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


_MODULE = "turret.fleet.serving.registry_actor"


class RayError(Exception):
    pass


class GetTimeoutError(RayError, TimeoutError):
    pass


class ActorAlreadyExistsError(ValueError, RayError):
    pass


class Method:
    """A method of an actor; ``ray.get`` waits for its call."""

    def __init__(self, call: Callable[..., object]) -> None:
        self._call = call

    def remote(self, *arguments: object) -> Callable[[], object]:
        return lambda: self._call(*arguments)


class Handle:
    """An actor that answers, unless it is dead or silent."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.silent: RayError | None = None

    def __getattr__(self, name: str) -> Method:
        def call(*arguments: object) -> object:
            if self.silent is not None:
                raise self.silent
            return getattr(self.actor, name)(*arguments)

        return Method(call)


class StubRay(types.ModuleType):
    """The parts of Ray that the module uses.

    Attributes:
        named: The actor that has the registry's name, or None.
        made: All actors that were created here, in order.
        killed: The killed actors.
        before_make: Runs when an actor is created, before its name is checked.
        silent: The error that newly created actors raise instead of answering, or None.
    """

    def __init__(self) -> None:
        super().__init__("ray")
        self.named: Handle | None = None
        self.made: list[Handle] = []
        self.killed: list[Handle] = []
        self.before_make: Callable[[], None] = lambda: None
        self.silent: RayError | None = None

    def get_actor(self, name: str, *, namespace: str) -> Handle:
        assert (name, namespace) == ("turret-registry", "turret")
        if self.named is None:
            raise ValueError("no such actor")
        return self.named

    def remote(self, kind: Callable[..., object]) -> types.SimpleNamespace:
        def options(**chosen: object) -> types.SimpleNamespace:
            assert chosen["lifetime"] == "detached"
            return types.SimpleNamespace(remote=lambda *given: self._make(kind, *given))

        return types.SimpleNamespace(options=options)

    def _make(self, kind: Callable[..., object], *given: object) -> Handle:
        self.before_make()
        if self.named is not None:
            raise ActorAlreadyExistsError("taken")
        self.named = Handle(None if self.silent is not None else kind(*given))
        self.named.silent = self.silent
        self.made.append(self.named)
        return self.named

    def get(self, answer: Callable[[], object], *, timeout: float) -> object:
        assert timeout > 0
        return answer()

    def kill(self, actor: Handle) -> None:
        self.killed.append(actor)
        if actor is self.named:
            self.named = None


@pytest.fixture
def ray() -> StubRay:
    return StubRay()


@pytest.fixture
def module(ray: StubRay, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A separate copy of the module on the simulated Ray; other tests keep the real one."""
    exceptions = types.ModuleType("ray.exceptions")
    vars(exceptions).update(
        RayError=RayError,
        GetTimeoutError=GetTimeoutError,
        ActorAlreadyExistsError=ActorAlreadyExistsError,
    )
    spec = importlib.util.find_spec(_MODULE)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as only_here:
        only_here.setitem(sys.modules, "ray", ray)
        only_here.setitem(sys.modules, "ray.exceptions", exceptions)
        spec.loader.exec_module(made)
    return made


class Serving:
    """The registry of a running fleet."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir

    def state_dir(self) -> str:
        return str(self._state_dir)


def test_an_unresponsive_registry_of_a_running_fleet_is_not_ended(
    ray: StubRay, module: Any, tmp_path: Path
) -> None:
    ray.named = running = Handle(Serving(tmp_path))
    running.silent = GetTimeoutError("timed out")
    with pytest.raises(UnavailableError) as refused:
        module.start_registry(tmp_path, 5.0)
    assert refused.value.metadata == {"action": "answer", "cause": "timed out"}
    running.silent = None
    module.start_registry(tmp_path, 5.0)
    with pytest.raises(UnavailableError) as refused:
        module.start_registry(tmp_path / "other", 5.0)
    assert refused.value.metadata == {"state_dir": str(tmp_path)}
    assert (ray.named, ray.made, ray.killed) == (running, [], [])


def test_a_registry_created_by_this_command_is_ended_if_it_does_not_start(
    ray: StubRay, module: Any, tmp_path: Path
) -> None:
    ray.silent = RayError("The actor died:\nValueError: the directory is another server's")
    with pytest.raises(UnavailableError) as refused:
        module.start_registry(tmp_path, 5.0)
    why = "ValueError: the directory is another server's"
    assert refused.value.metadata == {"action": "start", "cause": why}
    assert ray.killed == ray.made
    ray.silent = None
    module.start_registry(tmp_path, 5.0)
    assert ray.named is ray.made[1]


def test_a_registry_created_concurrently_by_another_command_is_found(
    ray: StubRay, module: Any, tmp_path: Path
) -> None:
    others = Handle(Serving(tmp_path))
    others.silent = GetTimeoutError("timed out")

    def make() -> None:
        ray.named = others

    ray.before_make = make
    with pytest.raises(UnavailableError) as refused:
        module.start_registry(tmp_path, 5.0)
    assert refused.value.metadata["action"] == "answer"
    assert (ray.named, ray.killed) == (others, [])


def test_a_command_takes_over_the_fleet_once_the_registry_is_back(
    ray: StubRay, module: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module.start_registry(tmp_path, 5.0)
    registry = ray.made[0]
    old, new = module.Ownership(), module.Ownership()
    assert (old.is_own, new.is_own, new.look()) == (True, False, False)
    for away in ("no name", "no answer"):
        ray.named = None if away == "no name" else registry
        registry.silent = GetTimeoutError("timed out")
        with caplog.at_level(logging.WARNING):
            new.take()
        assert "the previous command owns the fleet" in caplog.text
        caplog.clear()
        # The command continues, and does not end a fleet that it does not own yet.
        assert new.look()
        assert not new.is_own
        # The old command still owns the fleet.
        assert old.look()
    ray.named, registry.silent = registry, None
    assert new.look()
    assert new.is_own
    assert not old.look()
    assert not old.is_own
    # Once the new command owns the fleet, it behaves like any other owner.
    later = module.Ownership()
    later.take()
    assert not new.look()
    assert not caplog.text


def end(actor: Any) -> None:
    """Release what the end of a registry's process would release."""
    actor._host.close()
    actor._host._registry._store.close()


def test_a_restarted_registry_knows_the_owner_of_the_fleet(module: Any, tmp_path: Path) -> None:
    first = module.RegistryActor(str(tmp_path), 5.0, "run")
    assert first.owner("old") == "old"
    assert first.owner("new", True) == "new"
    end(first)
    again = module.RegistryActor(str(tmp_path), 5.0, "run")
    assert again.owner("old") == "new"
    end(again)
    # Another fleet on the directory does not know this one's owner.
    another = module.RegistryActor(str(tmp_path), 5.0, "another")
    assert another.owner("old") == "old"
    end(another)


def test_a_fleet_without_an_application_stops_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    status = types.SimpleNamespace(applications={})
    fake = types.SimpleNamespace(serve=types.SimpleNamespace(status=lambda: status))
    monkeypatch.setitem(sys.modules, "ray", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(serve, "_START_SECONDS", 0.3)
    with pytest.raises(UnavailableError, check=says("REPLICAS_NOT_STARTED")):
        serve._wait_until_up(threading.Event())
