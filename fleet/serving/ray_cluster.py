"""Starts or joins Ray, and configures Ray Serve's ingress for a fleet.

Ray Serve configures its HAProxy from its processes' environment variables. All of them must be set
before Ray is imported.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turret.fleet.config import FleetConfig
from turret.fleet.serving import fleet_folder
from turret.fleet.serving.fleet_folder import FleetFolder
from turret.fleet.serving.ingress import LOOPBACK, ingress_environment, joined_folder, write_haproxy
from turret.fleet.words import say
from turret.server.basics.files import replace_file
from turret.server.errors import UnavailableError

CLUSTER_FILE = "cluster.json"
# Serve's ports that two fleets on one machine must not share.
_PORTS = (
    *("HAPROXY_METRICS", "HAPROXY_STATS", "FALLBACK_PROXY_HTTP", "FALLBACK_PROXY_GRPC"),
    # The lowest ports of replicas. If all fleets used the same ports, an ingress could send calls
    # for a dead replica to a new replica of another fleet.
    *("DIRECT_INGRESS_MIN_HTTP", "DIRECT_INGRESS_MIN_GRPC"),
)
# Signals that end a fleet. ``serve.py`` defers them while Ray starts.
STOPPING = (signal.SIGTERM, signal.SIGINT)
# Range from which the ports of ``_PORTS`` are chosen. Ports that the kernel gives to connections or
# that Ray's workers use could be taken before Serve listens.
_FREE_PORTS = range(20_000, 30_000)
_OBJECT_STORE_BYTES = 100 << 20
_CONNECT_SECONDS = 5.0
# Ray's names for processes that a cluster on one machine cannot lose.
_CENTRAL = ("gcs_server", "raylet")
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


@dataclass(frozen=True, slots=True)
class RayCluster:
    """A Ray cluster in which this process runs a fleet.

    Attributes:
        folder: The folder of the cluster's files if it was started here, else None.
        address: The address of Ray's global control service (GCS) if the cluster was started here,
            else empty.
    """

    folder: FleetFolder | None
    address: str

    @classmethod
    def open(
        cls, config: FleetConfig, host: str, state_dir: Path, is_stopping: Callable[[], bool]
    ) -> RayCluster:
        """Starts Ray as child processes, on loopback and with a token, or joins a running cluster.

        Args:
            config: The configuration; ``ray_address`` is that of the cluster to join, or None to
                start one.
            host: The host on which the fleet listens.
            state_dir: The fleet's state directory.
            is_stopping: See ``LineFilter``.

        Raises:
            UnavailableError: No cluster can be joined or started; the message gives the reason.
        """
        if config.ray_address is not None:
            _check_listens(config.ray_address)
        folder = _make_folder(state_dir) if config.ray_address is None else None
        try:
            found = cls._open(config, host, folder, is_stopping)
        except Exception as error:
            # Catch all exceptions, because Ray has no specific class for a node that does not
            # start.
            if folder is not None:
                folder.remove()
            if isinstance(error, UnavailableError):
                raise
            if isinstance(error, ConnectionError) and config.ray_address is not None:
                why = say("RAY_NOT_JOINED", address=config.ray_address, cause=error)
                raise UnavailableError(why) from None
            raise UnavailableError(say("RAY_FAILED", cause=error)) from None
        return cls(folder, "" if folder is None else str(found["gcs_address"]))

    @staticmethod
    def _open(
        config: FleetConfig, host: str, folder: FleetFolder | None, is_stopping: Callable[[], bool]
    ) -> Any:
        """Start or join Ray, and return its context."""
        path = joined_folder() if folder is None else folder.path
        write_haproxy(path, None if folder is None else host)
        environment = ingress_environment(path)
        if folder is not None:
            # Without a token, anyone who can reach a port of Ray can execute code.
            environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
            # Serve's default ports may be in use by another fleet on this machine.
            ports = zip(_PORTS, _free_ports(), strict=False)
            environment |= {f"RAY_SERVE_{name}_PORT": str(port) for name, port in ports}
        os.environ.update(environment)
        import ray

        _print_through(LineFilter(is_stopping, has_others=folder is None))
        with _apart():
            if folder is None:
                variables = {"env_vars": environment}
                return _init(ray, is_local=False, address=config.ray_address, runtime_env=variables)
            return _init(
                ray,
                is_local=True,
                address="local",
                num_cpus=config.most,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                _node_ip_address=LOOPBACK,
                _temp_dir=str(path / "ray"),
            )

    def publish(self, state_dir: Path) -> None:
        """Lets other commands find a cluster that was started here.

        Call this once the fleet's registry holds the state directory, because another fleet may be
        starting on the same directory.
        """
        if self.folder is not None:
            said = {"address": self.address, "token": os.environ["RAY_AUTH_TOKEN"]}
            replace_file(state_dir / CLUSTER_FILE, json.dumps(said).encode())

    def dead_process(self) -> str:
        """The name of a central Ray process, started here, that has died, or ""."""
        from ray._private import worker

        node: Any = worker._global_node
        if self.folder is None or node is None:
            return ""
        return next((kind for kind, _ in node.dead_processes() if kind in _CENTRAL), "")

    def kill(self, state_dir: Path) -> None:
        """Kills a cluster that was started here and that Ray can no longer shut down."""
        # psutil is a dependency of Ray.
        import psutil

        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._remove(state_dir)

    def close(self, state_dir: Path) -> None:
        """Disconnects from the cluster, and ends it if it was started here."""
        import ray

        ray.shutdown()
        self._remove(state_dir)

    def _remove(self, state_dir: Path) -> None:
        if self.folder is not None:
            # The directory may belong to another fleet.
            with contextlib.suppress(OSError, ValueError, KeyError):
                if _cluster_of(state_dir)["token"] == os.environ["RAY_AUTH_TOKEN"]:
                    (state_dir / CLUSTER_FILE).unlink()
            self.folder.remove()


def join_as_guest(ray_address: str | None, state_dir: Path | None) -> None:
    """Connects to a running cluster, by its address or by the file in a state directory.

    Without either, and without ``RAY_ADDRESS``, this joins the cluster of the one fleet that this
    user has started on this machine, or else the cluster that Ray finds.

    Raises:
        UnavailableError: There is no cluster, or this user has several fleets.
    """
    if ray_address is None and state_dir is None and not os.environ.get("RAY_ADDRESS"):
        started = fleet_folder.state_dirs()
        if len(started) > 1:
            shown = ", ".join(map(str, started))
            raise UnavailableError(say("FLEETS_MANY", count=len(started), state_dirs=shown))
        state_dir = next(iter(started), None)
    is_local = ray_address is None and state_dir is not None
    if ray_address is None and state_dir is not None:
        # While a fleet starts, there is no file yet, or only the file of a killed fleet.
        is_starting = state_dir.absolute() in fleet_folder.state_dirs()
        starting = say("FLEET_STARTING", state_dir=state_dir)
        try:
            said = _cluster_of(state_dir)
        except OSError:
            missing = say("FLEET_MISSING", state_dir=state_dir)
            raise UnavailableError(starting if is_starting else missing) from None
        ray_address = str(said["address"])
        try:
            _check_listens(ray_address)
        except UnavailableError:
            killed = say("FLEET_KILLED", state_dir=state_dir)
            raise UnavailableError(starting if is_starting else killed) from None
        os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": said["token"]})
    elif ray_address is not None:
        _check_listens(ray_address)
    import ray

    try:
        _init(ray, is_local=is_local, address=ray_address or "auto")
    except ConnectionError as error:
        away = say("RAY_NOT_JOINED", address=ray_address, cause=error)
        raise UnavailableError(away if ray_address else say("FLEET_NOT_JOINED")) from error
    except (RuntimeError, ValueError) as error:
        raise UnavailableError(say("RAY_FAILED", cause=error)) from None


def _cluster_of(state_dir: Path) -> dict[str, str]:
    """The address and the token that ``RayCluster.publish`` wrote."""
    return json.loads((state_dir / CLUSTER_FILE).read_bytes())


def _check_listens(address: str) -> None:
    """Raises UnavailableError if nothing listens at ``HOST:PORT``; Ray would retry for minutes."""
    host, _, port = address.rpartition(":")
    if not host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except (OSError, UnicodeError) as error:
        cause = getattr(error, "strerror", None) or error
        raise UnavailableError(say("RAY_NOT_JOINED", address=address, cause=cause)) from None


def _make_folder(state_dir: Path) -> FleetFolder:
    try:
        return FleetFolder.make(state_dir)
    except OSError as error:
        cause = f"{error.filename}: {error.strerror}"
        raise UnavailableError(say("SOCKET_FOLDER", cause=cause)) from None


def _free_ports() -> Iterator[int]:
    """Different ports that nobody listens on now."""
    for port in random.sample(_FREE_PORTS, len(_FREE_PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
        yield port


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Lets only this process shut down the processes that Ray starts.

    Each of Ray's processes gets its own process group, so a signal that a terminal or ``timeout``
    sends to this process's group does not reach them. Unlike this process, they do not block
    SIGTERM. Ray's own SIGTERM handler is not installed, because it would end this process during
    startup.
    """
    from ray._private import services, utils

    patched: Any = (services, utils)
    popen, set_handler = services.ConsolePopen, utils.set_sigterm_handler
    # On other systems, Ray ends its processes through their group.
    own = {"process_group": 0} if sys.platform == "linux" else {}

    def start(*arguments: Any, preexec_fn: Callable[[], None] | None = None, **keys: Any) -> Any:
        def begin() -> None:
            if preexec_fn is not None:
                preexec_fn()
            # Ray blocks SIGINT on purpose, because terminals send it to the whole group.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

        return popen(*arguments, preexec_fn=begin, **own, **keys)

    patched[0].ConsolePopen = start
    patched[1].set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        patched[0].ConsolePopen = popen
        patched[1].set_sigterm_handler = set_handler


def _print_through(lines: LineFilter) -> None:
    """Filter what Ray's processes print. Call this before ``ray.init``, which binds the printer."""
    from ray._private import ray_logging, worker

    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
        colours: Any = ray_logging
        # Print Ray's counts of repeated lines without colour.
        colours._color = str
    patched: Any = worker
    show = patched.print_to_stdstream

    def show_kept(data: dict[str, Any], ignore_prefix: bool) -> None:
        source = data.get("ip"), data.get("pid"), data.get("is_err")
        if kept := lines.kept(source, data.get("actor_name"), data["lines"]):
            show({**data, "lines": kept}, ignore_prefix)

    patched.print_to_stdstream = show_kept


def _init(ray: Any, *, is_local: bool, **arguments: Any) -> Any:
    """Initialises Ray.

    Args:
        ray: The package.
        is_local: Whether a command of turret starts Ray, or has started it, on ``LOOPBACK``. Ray
            would replace that with an address that other machines can reach, and listen on every
            interface.
        arguments: The arguments of ``ray.init``.
    """
    from ray._private import services

    patched: Any = services
    resolve = services.resolve_ip_for_localhost
    if is_local:
        patched.resolve_ip_for_localhost = str
    try:
        return ray.init(logging_level="WARNING", namespace="turret", **arguments)
    finally:
        patched.resolve_ip_for_localhost = resolve


def cause(text: str) -> str:
    """The last message if the text is a traceback from another process, else the whole text."""
    text = _COLOUR.sub("", text)
    if '  File "' not in text:
        return text
    found = _ALERT.search(text) or next(reversed([*_RAISED.finditer(text)]), None)
    return found[1] if found else text.strip().splitlines()[-1]


class LineFilter:
    """Drops lines of Ray's processes that would only confuse an operator.

    Args:
        is_stopping: Whether the fleet is being stopped. Lines of the ingress are then dropped,
            because its pending work fails.
        has_others: Whether the fleet may use other machines.
    """

    def __init__(self, is_stopping: Callable[[], bool], has_others: bool = True) -> None:
        self._is_stopping = is_stopping
        self._left_out = [_CONTROLLER_ENDS] if has_others else [_CONTROLLER_ENDS, _ONE_MACHINE]
        # Source → a line that matches the first pattern of ``_CANCELLED``. If the next line matches
        # the second one, both are dropped.
        self._held: dict[object, str] = {}
        # Sources that are printing the traceback after these two lines, which is dropped, too.
        self._inside: set[object] = set()

    def kept(self, source: object, actor: str | None, lines: Sequence[str]) -> list[str]:
        """The lines to show.

        Args:
            source: Identifies the stream of the lines.
            actor: The class of the actor that printed the lines, if any.
            lines: The next lines of that stream.
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
