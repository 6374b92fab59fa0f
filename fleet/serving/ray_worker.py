"""What each of Ray's worker processes runs before its first task: two corrections of Ray Serve.

Ray Serve has no setting for either. ``ingress_environment`` names ``prepare`` to Ray, so that it
runs on every machine of the cluster, whoever starts Serve.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import ray
from ray.serve._private.grpc_util import gRPCGenericServer
from ray.serve._private.haproxy import HAProxyApi

from turret.fleet.serving.ray_cluster import LOOPBACK

_log = logging.getLogger(__name__)

_PAUSE_SECONDS = 0.2
_watching: set[asyncio.Task[None]] = set()


def prepare() -> None:
    """Corrects Ray Serve in this process."""
    if ray.util.get_node_ip_address() == LOOPBACK:
        _listen_locally()
    _keep_haproxy()


def _listen_locally() -> None:
    """Opens gRPC ports on loopback that Serve would open on every interface.

    Replicas and Serve's fallback proxy answer turret's calls there, past the ingress. When Ray's
    own address is loopback there is no other machine that needs them.
    """
    # Replicas have a second server for calls between deployments, of the class below Serve's own.
    server: Any = gRPCGenericServer.__mro__[1]
    add = server.add_insecure_port

    def add_local(self: Any, address: str) -> int:
        port: int = add(self, address.replace("[::]", "127.0.0.1"))
        return port

    server.add_insecure_port = add_local


def _keep_haproxy() -> None:
    """Starts HAProxy again as soon as it dies.

    Serve asks three times, ten seconds apart, before it replaces a dead HAProxy.
    """
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
