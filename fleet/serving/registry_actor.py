"""The fleet's registry as an actor, and a replica's channel to it."""

from __future__ import annotations

import logging
import time
import uuid
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorAlreadyExistsError, GetTimeoutError, RayError

from turret.fleet import protocol as p
from turret.fleet.follower import Channel
from turret.fleet.registry_host import FleetStore, RegistryHost
from turret.fleet.words import say
from turret.server.basics.files import replace_file
from turret.server.errors import TurretError, UnavailableError

_log = logging.getLogger(__name__)

NAMESPACE = "turret"
NAME = "turret-registry"
# Time limit of a call, in addition to the time that it waits on purpose.
_CALL_SECONDS = 10.0
# Time to wait until a registry that is ending releases the directory.
_LOCK_SECONDS = 15.0
# The number of calls is limited, because every waiting replica or caller takes a thread.
_MOST_CALLS = 512


class RegistryActor:
    """Hosts the registry. Errors are returned as values, because Ray would wrap exceptions.

    Args:
        state_dir: The fleet's state directory.
        lease_seconds: How long the registry waits for a silent replica.
        run: Identifies this actor; it stays the same if Ray restarts the actor.
    """

    def __init__(self, state_dir: str, lease_seconds: float, run: str) -> None:
        marker = Path(state_dir) / "registry-run"
        # The marker file contains the run, and the command that owns the fleet.
        said = marker.read_text().split() if marker.exists() else []
        is_first = said[:1] != [run]
        store = _open_store(Path(state_dir))
        self._marker, self._run = marker, run
        self._host = RegistryHost(store, lease_seconds=lease_seconds, is_first=is_first)
        self._state_dir = state_dir
        self._owner = None if is_first or len(said) < 2 else said[1]
        self._mark()

    def state_dir(self) -> str:
        """The fleet's state directory."""
        return self._state_dir

    def owner(self, command: str, takes_over: bool = False) -> str:
        """The command that ends the fleet when it stops: the last that took over, or the first."""
        if takes_over or self._owner is None:
            self._owner = command
            self._mark()
        return self._owner

    def _mark(self) -> None:
        """Saves what Ray's next start of this registry must know."""
        replace_file(self._marker, f"{self._run} {self._owner or ''}".encode())

    def call(self, *arguments: Any) -> tuple[Any, Exception | None]:
        """Call ``RegistryHost.call``; return its result and its error, one of them None."""
        try:
            return self._host.call(*arguments), None
        except (TurretError, ValueError, p.NotJoinedError) as error:
            return None, error.with_traceback(None)


def _open_store(path: Path) -> FleetStore:
    end = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            return FleetStore(path)
        except ValueError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def start_registry(state_dir: Path, lease_seconds: float) -> None:
    """Starts the one registry of the cluster, or finds it.

    Raises:
        UnavailableError: The registry does not start, or belongs to another fleet.
    """
    actor, is_new = _find_or_make(state_dir, lease_seconds)
    try:
        found = ray.get(actor.state_dir.remote(), timeout=_LOCK_SECONDS + 45.0)
    except RayError as error:
        if is_new:
            # Kill only a new actor. An existing one serves a fleet, and is only slow to answer.
            ray.kill(actor)
        cause = str(error).strip().rsplit("\n", 1)[-1]
        action = "start" if is_new else "answer"
        raise UnavailableError(say("REGISTRY_FAILED", action=action, cause=cause)) from None
    if found != str(state_dir):
        raise UnavailableError(say("FLEET_ELSEWHERE", state_dir=found))


def _find_or_make(state_dir: Path, lease_seconds: float) -> tuple[Any, bool]:
    """The registry's actor, and whether this call made it."""
    options: dict[str, Any] = {
        "name": NAME,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "max_restarts": -1,
        "max_concurrency": _MOST_CALLS,
        "num_cpus": 0,
        # Ray would record every call in its GCS, and clients can cause any number of them.
        "enable_task_events": False,
        # Run on Ray's head node, so that the loss of another machine does not affect the registry.
        "resources": {"node:__internal_head__": 0.001},
    }
    # Ray's types of actors do not know the class's methods, so this and RayChannel use Any.
    make: Any = ray.remote(RegistryActor)
    try:
        return ray.get_actor(NAME, namespace=NAMESPACE), False
    except ValueError:
        pass
    try:
        return make.options(**options).remote(str(state_dir), lease_seconds, uuid.uuid4().hex), True
    except ActorAlreadyExistsError:
        # Another command created the actor first.
        return ray.get_actor(NAME, namespace=NAMESPACE), False


class Ownership:
    """Whether the fleet ends with this command; a later command may have taken it over.

    Takes ownership if no other command has it.

    Attributes:
        is_own: Whether this command owned the fleet according to the registry's last answer.
    """

    def __init__(self) -> None:
        self._command = uuid.uuid4().hex
        self._is_taking = False
        self.is_own = False
        self._ask()

    def take(self) -> None:
        """Takes ownership, as soon as the registry can be reached."""
        self._is_taking = True
        self._ask()
        if self._is_taking:
            _log.warning("the previous command owns the fleet until the registry is back")

    def look(self) -> bool:
        """Whether this command owns the fleet or takes it over, by the registry's last answer."""
        self._ask()
        return self.is_own or self._is_taking

    def _ask(self) -> None:
        try:
            actor: Any = ray.get_actor(NAME, namespace=NAMESPACE)
            answer = actor.owner.remote(self._command, self._is_taking)
            found = ray.get(answer, timeout=_CALL_SECONDS)
        except (RayError, GetTimeoutError, ValueError):
            return
        self.is_own = bool(found == self._command)
        self._is_taking = False


def stop_registry() -> None:
    """Ends the registry of the cluster permanently."""
    try:
        ray.kill(ray.get_actor(NAME, namespace=NAMESPACE))
    except (RayError, ValueError):
        return


class RayChannel(Channel):
    """A ``Channel`` that finds the registry by name again whenever the connection is lost."""

    def __init__(self) -> None:
        self._actor: Any = None

    def call(self, wait_seconds: float, method: str, *arguments: Any) -> Any:
        try:
            if self._actor is None:
                self._actor = ray.get_actor(NAME, namespace=NAMESPACE)
            answer = self._actor.call.remote(wait_seconds, method, *arguments)
            value, error = ray.get(answer, timeout=wait_seconds + _CALL_SECONDS)
        except (RayError, GetTimeoutError, ValueError):
            self._actor = None
            raise UnavailableError(say("REGISTRY_AWAY")) from None
        if error is not None:
            raise error
        return value
