"""The application for Ray Serve: one deployment, which Serve starts, scales and stops.

A Ray Serve config file, which KubeRay's ``RayService`` applies, names the application:

    import_path: turret.fleet.serving.application:application
    args: {min_replicas: 2, max_replicas: 8}

All other settings are ``TURRET_…`` variables of the containers. The variables of the ingress are
those that ``python -m turret.fleet.serving.ingress`` prints.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc
import ray
from grpc_health.v1 import health_pb2
from ray import serve
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp, Receive, Scope, Send

from turret.fleet.config import RUNNING, WAITING, ClusterConfig, policy
from turret.fleet.serving.calls import from_client
from turret.fleet.serving.registry_actor import RayChannel, start_registry
from turret.fleet.serving.replica_server import ReplicaServer
from turret.server import log
from turret.server.basics.machine import available_cpus
from turret.server.basics.settings import Layer, load
from turret.server.command.flags import read_settings
from turret.server.config import Config
from turret.v1 import adapters_pb2, inference_pb2

# Serve queues calls beyond this number. --max-queued-requests is far lower, so turret rejects them
# first.
_MOST_ONGOING = 1 << 14


def _call(service: str, method: str, *, is_stream: bool) -> Any:
    """Make a method of the deployment. For a gRPC call, Serve calls the method of that name."""

    async def answer(self: Any, request: Any, grpc_context: Any) -> Any:
        return await self._server.answer(service, method, request, grpc_context)

    async def answer_stream(self: Any, request: Any, grpc_context: Any) -> AsyncIterator[Any]:
        async for message in self._server.answer_stream(service, method, request, grpc_context):
            yield message

    return answer_stream if is_stream else answer


_CALLS: Any = type(
    "_CALLS",
    (),
    {
        method.name: _call(service.name, method.name, is_stream=method.server_streaming)
        for file in (inference_pb2, adapters_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    },
)


@serve.ingress()
class Replica(_CALLS):
    """One engine, with the methods of turret.v1 and of gRPC's health service.

    Args:
        config: The fleet's configuration, with absolute paths.
    """

    async def __init__(self, config: ClusterConfig) -> None:  # type: ignore[misc]
        self._is_stopped = True
        level = logging.DEBUG if config.log.verbose else logging.INFO
        log.configure(level, log_format=config.log.log_format)
        name = serve.get_replica_context().replica_id.unique_id
        self._server = server = ReplicaServer(
            config, name, RayChannel(), stops_alone=config.fleet.stop_without_registry
        )
        self._config = config
        await server.start()
        self._is_stopped = False

    def __serve_build_asgi_app__(self) -> ASGIApp:
        from turret.server.http.server import application

        made = application(self._config.listen, self._server.services)

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                await made(from_client(scope), receive, send)
            elif scope["type"] == "lifespan":
                # The replica manages its own start and stop, so just answer the messages.
                for stage in ("startup", "shutdown"):
                    await receive()
                    await send({"type": f"lifespan.{stage}.complete"})

        return answer

    async def __del__(self) -> None:
        # Serve awaits this when it removes the replica, once its calls have ended or timed out.
        if not self._is_stopped:
            self._is_stopped = True
            await self._server.stop()

    async def check_health(self) -> None:
        self._server.check()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        server = self._server
        return {WAITING: float(server.num_waiting), RUNNING: float(server.num_running)}

    # grpc.health.v1.Health

    async def Check(self, request: health_pb2.HealthCheckRequest, grpc_context: Any) -> Any:
        return await self._server.check_service(request, grpc_context)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, grpc_context: Any
    ) -> AsyncIterator[Any]:
        # A watch would keep a replica from ending. Clients treat UNIMPLEMENTED as serving.
        grpc_context.set_code(grpc.StatusCode.UNIMPLEMENTED)
        grpc_context.set_details("a fleet's health cannot be watched; call Check")
        return
        yield


def deployment(config: ClusterConfig) -> serve.Application:
    """The deployment for Serve to keep running."""
    threads = config.model.threads or max(1, available_cpus() // config.fleet.most)
    options: dict[str, Any] = {"num_cpus": 1, "runtime_env": {"env_vars": _threads(threads)}}
    if num_devices(config):
        options |= {"num_gpus": 1}
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, threads=threads))
    scale: dict[str, Any] = {"num_replicas": config.fleet.fewest}
    if config.fleet.most > config.fleet.fewest:
        path = f"{policy.__module__}:{policy.__name__}"
        scale = {
            "autoscaling_config": {
                "min_replicas": config.fleet.fewest,
                "max_replicas": config.fleet.most,
                "upscale_delay_s": 1.0,
                "downscale_delay_s": 60.0,
                "metrics_interval_s": 1.0,
                "look_back_period_s": 2.0,
                "policy": {"policy_function": path},
            }
        }
    deploy = serve.deployment(
        name="turret",
        max_ongoing_requests=_MOST_ONGOING,
        ray_actor_options=options,
        # Check often: Serve notices even the death of a replica's process only at a health check.
        health_check_period_s=0.5,
        health_check_timeout_s=10.0,
        graceful_shutdown_timeout_s=config.lifecycle.grace_seconds + 5.0,
        logging_config=LoggingConfig(enable_access_log=False, log_level="WARNING"),
        **scale,
    )
    return deploy(Replica).bind(config)


def num_devices(config: Config) -> int:
    """The number of GPUs in the cluster; 0 if none should be used."""
    return 0 if config.model.device == "cpu" else int(ray.cluster_resources().get("GPU", 0))


def _threads(number: int) -> dict[str, str]:
    # torch reads OMP_NUM_THREADS when it is loaded, before any code of the replica runs.
    return {"OMP_NUM_THREADS": str(number), "PYTHONPATH": ":".join(filter(None, sys.path))}


def application(args: Mapping[str, Any]) -> serve.Application:
    """Starts the registry, or finds it, and describes the deployment.

    Args:
        args: The settings of ``FleetConfig`` other than ``ray_address``.

    Raises:
        SettingsError: A value or variable is invalid.
        UnavailableError: The registry does not start.
    """
    environment = read_settings(argparse.Namespace(), os.environ, ClusterConfig)
    given = Layer("args", {"fleet": {**args, "ray_address": "auto"}})
    config = load(ClusterConfig, (given, *environment.layers)).for_replicas()
    start_registry(config.state_dir, config.fleet.lease_seconds)
    return deployment(config)
