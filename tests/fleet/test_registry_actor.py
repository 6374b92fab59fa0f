"""The registry's actor and its ownership, on a simulated Ray."""

from __future__ import annotations

import importlib.util
import logging
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from turret.server.errors import UnavailableError

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
        named: The actor with the name.
        made: All actors that were created here, in order.
        killed: The killed actors.
        before_make: Runs when an actor is created, before its name is checked.
        silent: The failure of actors that are created here.
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
    """A separate copy of the module on the simulated Ray, so that others still use it on Ray."""
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
    # Once it owns the fleet, it behaves like any other owner.
    later = module.Ownership()
    later.take()
    assert not new.look()
    assert not caplog.text


def end(actor: Any) -> None:
    """End a registry like the end of its process."""
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
