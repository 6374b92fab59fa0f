"""Builds a replica's parts and answers its calls, like ``server/app.py`` but without listeners.

Ray Serve hands the calls over; see ``calls.py``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

import turret
from turret.fleet.follower import Channel, ReplicaLink
from turret.fleet.replica import ReplicaParts
from turret.fleet.serving import calls
from turret.fleet.serving.calls import CallContext, ServeContext
from turret.fleet.words import say
from turret.server import log, tracing
from turret.server.api.access import Shares, TokenReloader, TokenTable, authorize
from turret.server.api.gate import Backend, ServingGate
from turret.server.api.services import Services
from turret.server.basics.machine import see_only
from turret.server.config import Config
from turret.server.errors import UnavailableError
from turret.server.metrics import Metrics, add_aliases
from turret.server.metrics_server import MetricsServer
from turret.server.rpc import (
    CallInterceptor,
    HealthServicer,
    Servicer,
    authorization_of,
    current_call,
)
from turret.v1 import adapters_pb2, inference_pb2

_log = logging.getLogger(__name__)

_JOIN_SECONDS = 120.0
# Time limit on shutdown for exporting the last traces.
_FLUSH_SECONDS = 2.0
# Each replica serves its metrics on the first free one of this many consecutive ports.
_METRICS_PORTS = 64
_DESCRIPTORS = {
    "Inference": inference_pb2.DESCRIPTOR.services_by_name["Inference"],
    "Adapters": adapters_pb2.DESCRIPTOR.services_by_name["Adapters"],
}
_MESSAGES = {**vars(inference_pb2), **vars(adapters_pb2)}


class ReplicaServer:
    """A replica's server. Create it inside the running event loop; it does not start by itself.

    Args:
        config: The resolved configuration; its addresses are the fleet's.
        name: The replica's name, which no other replica has ever had.
        channel: The channel to the fleet's registry.
        stops_alone: Whether to serve nothing while the registry cannot be reached.

    Raises:
        OSError, ValueError: The token file cannot be used.
    """

    def __init__(
        self, config: Config, name: str, channel: Channel, *, stops_alone: bool = False
    ) -> None:
        self._config = config
        self.metrics = Metrics()
        add_aliases(self.metrics.registry, config.telemetry.metrics_aliases)
        if config.telemetry.otel:
            tracing.start(self.metrics.registry)
        self._gate = ServingGate(self._check_serving)
        token_file = config.security.token_file
        tokens = None if token_file is None else TokenTable.parse(token_file)
        self._watching: asyncio.Future[None] | None = None
        if token_file is not None and tokens is not None:
            reloader = TokenReloader(token_file, tokens)
            self._watching = asyncio.ensure_future(reloader.run())
        self.services = Services(
            gate=self._gate, metrics=self.metrics, tokens=tokens, shares=Shares.of(config)
        )
        self._interceptor = CallInterceptor(self.services)
        calls.check_with(self._interceptor)
        self._servicers: dict[str, Any] = {
            "Inference": Servicer(self.services.inference),
            "Adapters": Servicer(self.services.adapters),
        }
        self._health = HealthServicer(f"turret.v1.{name}" for name in self._servicers)
        self._parts = ReplicaParts(name, channel, stops_alone=stops_alone)
        self._metrics_server = self._serve_metrics()
        self._backend: Backend | None = None
        self._link: ReplicaLink | None = None

    async def start(self) -> None:
        """Loads the model, joins the fleet, and serves its state.

        Raises:
            OSError, ValueError, TurretError: The model or the fleet's state cannot be served.
        """
        config = self._config
        see_only(config.model.device)
        from turret.server.build import build_backend

        backend = await asyncio.to_thread(build_backend, config, self.metrics, replica=self._parts)
        self._backend = backend
        await backend.engine.start()
        self._link = self._parts.link(lambda: (self.num_waiting, self.num_running))
        await asyncio.to_thread(self._link.start, _JOIN_SECONDS)
        model = backend.model_info
        self.metrics.info(turret.__version__, model.name, model.dtype, model.quantization)
        self._gate.open(backend)
        _log.info("serving", extra=log.fields(replica=self._parts.name, model=model.name))

    @property
    def num_waiting(self) -> int:
        """The number of sequences that wait."""
        return 0 if self._backend is None else self._backend.engine.num_waiting

    @property
    def num_running(self) -> int:
        """The number of sequences that run."""
        return 0 if self._backend is None else self._backend.engine.num_open - self.num_waiting

    def check(self) -> None:
        """Raises UnavailableError if the replica can no longer serve and must be replaced."""
        if self._backend is None or self._backend.engine.is_dead:
            raise UnavailableError(say("ENGINE_FAILED"))
        if self._link is None or self._link.has_failed:
            raise UnavailableError(say("REPLICA_FAILED"))

    def _check_serving(self) -> None:
        # Reject calls until Serve has called ``check`` and replaced the replica.
        if self._backend is not None and self._backend.engine.is_dead:
            raise UnavailableError(say("ENGINE_FAILED"))
        if self._link is None or not self._link.is_serving:
            raise UnavailableError(say("REPLICA_CUT_OFF"))

    async def stop(self) -> None:
        """Accepts no further calls, lets running ones finish, and leaves the fleet."""
        self._gate.close(say("SHUTTING_DOWN"))
        if self._watching is not None:
            self._watching.cancel()
        if self._backend is not None:
            await self._backend.engine.drain(self._config.lifecycle.grace_seconds)
        if self._link is not None:
            await asyncio.to_thread(self._link.close)
        if self._backend is not None:
            await asyncio.to_thread(self._backend.close)
        self.services.adapters.close()
        await asyncio.to_thread(tracing.stop, _FLUSH_SECONDS)
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.close)

    def _serve_metrics(self) -> MetricsServer | None:
        """Serves metrics on the first port that no other replica of this machine uses."""
        address = self._config.listen.metrics_address
        if address is None:
            return None
        try:
            server = MetricsServer(
                self.metrics, address, self.services.tokens, num_ports=_METRICS_PORTS
            )
        except OSError as error:
            # A replica without metrics is better than none.
            said = log.fields(address=address, why=error.strerror)
            _log.warning("this replica's metrics cannot be read", extra=said)
            return None
        _log.info("metrics", extra=log.fields(address=server.address))
        return server

    # gRPC

    async def check_service(
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> health_pb2.HealthCheckResponse:
        """The ``grpc.health.v1`` status of a service; Serve's own checks call ``check``."""
        try:
            self._gate.enter()
            self._health.set_serving(True)
        except UnavailableError:
            self._health.set_serving(False)
        return await self._health.Check(request, context)

    async def answer(self, service: str, method: str, request: Any, inner: ServeContext) -> Any:
        """The answer to a call with one response. The answer of a failed call is empty."""
        context = CallContext(inner)
        call = getattr(self._servicers[service], method)
        answer = await self._run(service, method, context, request, lambda: call(request, context))
        kind = _DESCRIPTORS[service].methods_by_name[method].output_type.name
        return _MESSAGES[kind]() if answer is None else answer

    def answer_stream(
        self, service: str, method: str, request: Any, inner: ServeContext
    ) -> AsyncIterator[Any]:
        """The answers to a call with a stream of responses."""
        context = CallContext(inner)
        call = getattr(self._servicers[service], method)

        async def write_all() -> None:
            answers = call(request, context)
            try:
                async for message in answers:
                    await context.write(message)
            finally:
                await answers.aclose()

        return context.messages(lambda: self._run(service, method, context, request, write_all))

    async def _run(
        self,
        service: str,
        method: str,
        context: CallContext,
        request: Any,
        body: Callable[[], Any],
    ) -> Any:
        full = f"turret.v1.{service}"
        metadata = context.invocation_metadata()

        async def checked() -> Any:
            authorize(self.services.tokens, full, authorization_of(metadata))
            if isinstance(request, Message):
                current_call().receive(request.ByteSize())
            return await body()

        return await self._interceptor.run(f"/{full}/{method}", context, checked)
