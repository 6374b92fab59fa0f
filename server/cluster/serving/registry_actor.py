"""The fleet's registry as an actor, and the way to it from a replica."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple

import ray
from ray.exceptions import GetTimeoutError, RayError

from turret.server.basics.durable_file import replace_file
from turret.server.cluster import messages as m
from turret.server.cluster.fleet_store import FleetStore
from turret.server.cluster.registry_host import RegistryHost
from turret.server.errors import TurretError, UnavailableError

NAMESPACE = "turret"
NAME = "turret-registry"
# Beyond what a call waits for on purpose.
_CALL_SECONDS = 10.0
# For the directory of a registry that is still ending.
_LOCK_SECONDS = 15.0
# Each waiting replica and caller takes a thread.
_MOST_CALLS = 512

_Arguments = TypeVarTuple("_Arguments")
_T = TypeVar("_T")


class RegistryActor:
    """Hosts the registry. Errors travel as values: Ray would wrap them beyond recognition.

    Args:
        state_dir: The fleet's.
        lease_seconds: How long a silent replica is waited for.
        run: Another one for each actor that is started, the same when Ray starts it again.
    """

    def __init__(self, state_dir: str, lease_seconds: float, run: str) -> None:
        marker = Path(state_dir) / "registry-run"
        is_first = not marker.exists() or marker.read_text() != run
        store = _open_store(Path(state_dir), is_first=is_first)
        replace_file(marker, run.encode())
        self._host = RegistryHost(store, lease_seconds=lease_seconds, is_first=is_first)
        self._state_dir = state_dir
        self._owner: str | None = None

    def state_dir(self) -> str:
        """The fleet's."""
        return self._state_dir

    def owner(self, command: str, takes_over: bool = False) -> str:
        """Which command ends the fleet when it ends: the one that says so last, or the only one."""
        if takes_over or self._owner is None:
            self._owner = command
        return self._owner

    def call(self, method: str, *arguments: Any) -> tuple[Any, Exception | None]:
        """What a method of ``RegistryHost`` returns, or raises."""
        try:
            return getattr(self._host, method)(*arguments), None
        except (TurretError, ValueError, m.NotJoinedError) as error:
            return None, error.with_traceback(None)


def _open_store(path: Path, *, is_first: bool) -> FleetStore:
    end = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            return FleetStore(path, is_first=is_first)
        except ValueError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def start_registry(state_dir: Path, lease_seconds: float) -> None:
    """Starts the one registry of the cluster, or finds it.

    Raises:
        UnavailableError: It does not start, or is another fleet's; says why.
    """
    options: dict[str, Any] = {
        "name": NAME,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "max_restarts": -1,
        "max_concurrency": _MOST_CALLS,
        "num_cpus": 0,
        # Where Ray's own truth is: no other machine takes the registry with it.
        "resources": {"node:__internal_head__": 0.001},
    }
    # Ray's types of actors know no method of the class, hence Any here and in RayChannel, where the
    # host's own methods say what is sent and what comes back.
    make: Any = ray.remote(RegistryActor)
    actor: Any = make.options(**options).remote(str(state_dir), lease_seconds, uuid.uuid4().hex)
    try:
        found = ray.get(actor.state_dir.remote(), timeout=_LOCK_SECONDS + 45.0)
    except RayError as error:
        ray.kill(actor)
        cause = str(error).strip().rsplit("\n", 1)[-1]
        raise UnavailableError(f"the fleet's registry does not start: {cause}") from None
    if found != str(state_dir):
        raise UnavailableError(f"this Ray cluster has a fleet already, on --state-dir {found}")


class Ownership:
    """Whether this command ends the fleet when it ends; one that was run later may have taken it.

    Takes it, where no other command has it.
    """

    def __init__(self) -> None:
        self._command = uuid.uuid4().hex
        self.is_own = False
        self.is_own = self._ask(False)

    def take(self) -> None:
        """From now on it is this command's."""
        self.is_own = self._ask(True)

    def look(self) -> bool:
        """Whether it is; as it was, if the registry is away."""
        self.is_own = self._ask(False)
        return self.is_own

    def _ask(self, takes_over: bool) -> bool:
        try:
            actor: Any = ray.get_actor(NAME, namespace=NAMESPACE)
            found = ray.get(actor.owner.remote(self._command, takes_over), timeout=_CALL_SECONDS)
        except (RayError, GetTimeoutError, ValueError):
            return self.is_own
        return bool(found == self._command)


def stop_registry() -> None:
    """Ends the registry of the cluster, for good."""
    try:
        ray.kill(ray.get_actor(NAME, namespace=NAMESPACE))
    except (RayError, ValueError):
        return


class RayChannel:
    """See ``Channel``; finds the registry by its name whenever it was lost."""

    def __init__(self) -> None:
        self._actor: Any = None

    def join(self, join: m.Join) -> m.Joined:
        return self._call(0.0, RegistryHost.join, join)

    def report(self, report: m.Report, wait_seconds: float) -> m.News:
        return self._call(wait_seconds, RegistryHost.report, report, wait_seconds)

    def submit(self, proposal: m.Proposal) -> str:
        return self._call(0.0, RegistryHost.submit, proposal)

    def outcome(self, operation: str, wait_seconds: float) -> m.Outcome | None:
        return self._call(wait_seconds, RegistryHost.outcome, operation, wait_seconds)

    def cancel(self, operation: str, error: TurretError) -> None:
        self._call(0.0, RegistryHost.cancel, operation, error)

    def leave(self, replica: str) -> None:
        self._call(0.0, RegistryHost.leave, replica)

    def usage(self, name: str = "") -> Mapping[str, Mapping[str, m.Usage]]:
        return self._call(0.0, RegistryHost.usage, name)

    def status(self) -> m.FleetStatus:
        return self._call(0.0, RegistryHost.status)

    def _call(
        self,
        waits: float,
        method: Callable[[RegistryHost, *_Arguments], _T],
        *arguments: *_Arguments,
    ) -> _T:
        try:
            if self._actor is None:
                self._actor = ray.get_actor(NAME, namespace=NAMESPACE)
            answer = self._actor.call.remote(method.__name__, *arguments)
            value, error = ray.get(answer, timeout=waits + _CALL_SECONDS)
        except (RayError, GetTimeoutError, ValueError) as lost:
            self._actor = None
            raise UnavailableError(
                f"the fleet's registry cannot be reached ({type(lost).__name__}); adapters are"
                " served on, and can be changed when it is back"
            ) from None
        if error is not None:
            raise error
        return value
