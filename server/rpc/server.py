"""gRPC: the services, the listeners (data plane, optional admin plane), TLS, health, reflection."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from turret.server import log
from turret.server.api.access import WatchedFiles
from turret.server.api.admin import Adapters
from turret.server.api.call import Call
from turret.server.api.inference import Inference
from turret.server.api.limits import MAX_MESSAGE_BYTES
from turret.server.api.services import Services
from turret.server.api.training import Training
from turret.server.basics.files import read_regular
from turret.server.config import ListenConfig, SecurityConfig
from turret.server.rpc.interceptor import (
    MOST_CALLS,
    MOST_CALLS_PER_CONNECTION,
    CallInterceptor,
    current_call,
)
from turret.server.words import say
from turret.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
)

_log = logging.getLogger(__name__)

INFERENCE_SERVICE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
ADAPTERS_SERVICE = adapters_pb2.DESCRIPTOR.services_by_name["Adapters"].full_name
TRAINING_SERVICE = training_pb2.DESCRIPTOR.services_by_name["Training"].full_name

# Do not limit responses, because clients choose how much they ask for and have their own limits.
_UNLIMITED = -1

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _UNLIMITED),
    # With this option, a second server on the same port would silently take half of the calls.
    ("grpc.so_reuseport", 0),
    # Calls that the event loop has not accepted yet. By default, gRPC cancels some of them if there
    # are 1,000 or more. --max-queued-requests limits waiting requests instead, and rejected
    # requests get an answer.
    ("grpc.server.max_pending_requests", MOST_CALLS),
    ("grpc.server.max_pending_requests_hard_limit", MOST_CALLS),
    # Calls that a client resets at once also count until this process has ended them, and calls of
    # other connections wait behind them.
    ("grpc.max_concurrent_streams", MOST_CALLS_PER_CONNECTION),
    # Calls may send 64 KiB before the server reads their message (see ``Arrivals``). By default
    # gRPC raises this to megabytes on fast connections.
    ("grpc.http2.bdp_probe", 0),
    # Close connections after this long without a call; clients reconnect by themselves.
    ("grpc.max_connection_idle_ms", 300_000),
    # Time limit for the TLS handshake and the first bytes of HTTP/2.
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_metadata_size", 8 << 10),
    ("grpc.absolute_max_metadata_size", 16 << 10),
    # Detect within a minute and a half that a client has vanished.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Clients may ping idle connections every 10 s, as load balancers often require. turret's own
    # clients ping during calls. Pings may arrive a little closer together than they were sent.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)


def _add_reflection(names: tuple[str, ...], server: grpc.aio.Server) -> None:
    """Offers reflection as v1alpha, and as v1, which has the same messages under another name."""
    reflection.enable_server_reflection(names, server)
    servicer: Any = reflection.aio.ReflectionServicer(names)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handlers = {"ServerReflectionInfo": handler}
    v1 = grpc.method_handlers_generic_handler("grpc.reflection.v1.ServerReflection", handlers)
    server.add_generic_rpc_handlers((v1,))


def _certificates(security: SecurityConfig) -> Any:
    assert security.tls_cert is not None
    assert security.tls_key is not None
    authorities = security.tls_client_ca
    return grpc.ssl_server_certificate_configuration(
        [(read_regular(security.tls_key), read_regular(security.tls_cert))],
        root_certificates=read_regular(authorities) if authorities else None,
    )


def read_credentials(security: SecurityConfig) -> grpc.ServerCredentials | None:
    """TLS credentials, mutual with ``--tls-client-ca``; None for plain text.

    The files are read again when they have changed, at the next connection.

    Raises:
        OSError: A file cannot be read.
    """
    if security.tls_cert is None or security.tls_key is None:
        return None
    authorities = security.tls_client_ca
    paths = [p for p in (security.tls_cert, security.tls_key, authorities) if p is not None]
    files = WatchedFiles(paths, lambda: _certificates(security), "certificates")

    def fetch() -> Any:
        """The certificates for the next connection; None if they have not changed."""
        return files.newest if files.look() else None

    return grpc.dynamic_ssl_server_credentials(
        files.newest, fetch, require_client_authentication=authorities is not None
    )


class RpcServer:
    """The gRPC server. It starts before the model is loaded and reports that it is starting.

    Create and use it inside the running event loop.

    Args:
        listen: Addresses. Without an admin address, the Adapters service uses the main one.
        security: TLS files; its token file is read by the caller.
        services: The services that answer.
    """

    def __init__(self, listen: ListenConfig, security: SecurityConfig, services: Services) -> None:
        most = services.most_connections
        self._options = (*_OPTIONS, ("grpc.max_allowed_incoming_connections", most))
        # Without --training, the server has no Training service.
        self._tenants = services.tenants
        own = () if self._tenants is None else (TRAINING_SERVICE,)
        self._main = (INFERENCE_SERVICE, *own)
        self.health = HealthServicer((*self._main, ADAPTERS_SERVICE))
        self._listen = listen
        self._security = security
        self._interceptor = CallInterceptor(services)
        self._inference: Any = Servicer(services.inference)
        self._adapters: Any = Servicer(services.adapters)
        self._training: Any = None if self._tenants is None else Servicer(Training(self._tenants))
        self._listeners: list[tuple[grpc.aio.Server, str]] = []

    @property
    def address(self) -> str:
        """The address of the Inference service, with the actual port."""
        return self._listeners[0][1]

    @property
    def admin_address(self) -> str:
        """The address of the Adapters service."""
        return self._listeners[-1][1]

    async def start(self) -> None:
        """Bind and listen.

        Raises:
            OSError: An address cannot be bound, or the TLS files do not match each other.
        """
        if self._tenants is not None:
            self._tenants.start()
        if self._listen.admin_address is None:
            await self._serve(self._listen.address, (*self._main, ADAPTERS_SERVICE))
            return
        await self._serve(self._listen.address, self._main)
        try:
            await self._serve(self._listen.admin_address, (ADAPTERS_SERVICE,))
        except OSError:
            await self.stop(0)
            raise

    async def _serve(self, address: str, services: tuple[str, ...]) -> None:
        server = grpc.aio.server(interceptors=[self._interceptor], options=self._options)
        if INFERENCE_SERVICE in services:
            inference_pb2_grpc.add_InferenceServicer_to_server(self._inference, server)
        if ADAPTERS_SERVICE in services:
            adapters_pb2_grpc.add_AdaptersServicer_to_server(self._adapters, server)
        if TRAINING_SERVICE in services:
            training_pb2_grpc.add_TrainingServicer_to_server(self._training, server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        _add_reflection((*services, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        # Read the files for each listener, because a credentials object works for only one.
        credentials = read_credentials(self._security)
        try:
            if credentials is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, credentials)
        except RuntimeError as error:
            await server.stop(None)
            raise OSError(say("ADDRESS_UNUSABLE", value=address, why=str(error))) from None
        is_unix = address.startswith("unix:")
        bound = address if is_unix else f"{address.rpartition(':')[0]}:{port}"
        await server.start()
        self._listeners.append((server, bound))
        _log.info("listening", extra=log.fields(address=bound, services=",".join(services)))

    async def stop(self, grace_seconds: float) -> None:
        """Accept no further calls, and cancel those that still run after the grace period."""
        self.health.close()
        await asyncio.gather(*(server.stop(grace_seconds) for server, _ in self._listeners))
        if self._tenants is not None:
            await self._tenants.stop()


# The services of turret.v1.

_Method = Callable[[Any, Any, Call], Any]
_ADAPTERS: dict[str, _Method] = {
    "LoadAdapter": Adapters.load,
    "UploadAdapter": Adapters.upload,
    "ReplaceAdapter": Adapters.replace,
    "RollbackAdapter": Adapters.rollback,
    "SetAlias": Adapters.set_alias,
    "DeleteAlias": Adapters.delete_alias,
    "ListAliases": lambda api, _, call: adapters_pb2.ListAliasesResponse(aliases=api.aliases()),
    "GetAdapter": Adapters.get,
    "ListAdapters": Adapters.list_page,
    "UnloadAdapter": Adapters.unload,
    "PinAdapter": Adapters.pin,
    "UnpinAdapter": Adapters.unpin,
    "ExportAdapter": Adapters.export,
    "FuseAdapters": Adapters.fuse,
    "MergeAdapters": Adapters.merge,
    "UnmergeAdapters": lambda api, _, call: api.unmerge(call),
    "GetMergeState": lambda api, _, call: api.merge_state(),
}
_TRAINING: dict[str, _Method] = {
    "CreateModel": Training.create_model,
    "ListModels": lambda api, _, call: api.list_models(call),
    "DeleteModel": Training.delete_model,
    "ForwardBackward": Training.forward_backward,
    "OptimStep": Training.optim_step,
    "SaveCheckpoint": Training.save_checkpoint,
    "LoadCheckpoint": Training.load_checkpoint,
    "ListCheckpoints": lambda api, _, call: api.list_checkpoints(call),
    "ExportCheckpoint": Training.export_checkpoint,
    "DeleteCheckpoint": Training.delete_checkpoint,
    "PublishModel": Training.publish_model,
}
_INFERENCE: dict[str, _Method] = {
    "Generate": Inference.generate_whole,
    "GenerateStream": Inference.generate,
    "Score": Inference.score,
    "Embed": Inference.embed,
    "EmbedStream": Inference.embed_stream,
    "Classify": Inference.classify,
    "Tokenize": Inference.tokenize,
    "GetModel": lambda api, _, call: api.model(),
}
# The methods of ``server/api`` by the names of the services and their RPCs.
METHODS: Mapping[str, Mapping[str, _Method]] = {
    "Adapters": _ADAPTERS,
    "Inference": _INFERENCE,
    "Training": _TRAINING,
}


class Servicer:
    """A gRPC servicer that passes every call to a service of ``server/api``.

    Args:
        api: The service.
    """

    def __init__(self, api: Adapters | Inference | Training) -> None:
        for name, method in METHODS[type(api).__name__].items():
            setattr(self, name, _handler(api, method))


def _handler(api: Adapters | Inference | Training, method: _Method) -> Callable[[Any, Any], Any]:
    if inspect.isasyncgenfunction(method):
        return lambda request, _: method(api, request, current_call())

    async def answer(request: Any, _: Any) -> Any:
        answer = method(api, request, current_call())
        # Drop our reference so that the message is freed once it is converted.
        del request
        return await answer if inspect.isawaitable(answer) else answer

    return answer


# The health service, ``grpc.health.v1``.
#
# grpcio's own asyncio servicer drops all watchers of a service when one of them leaves, and keeps
# watchers open while the server stops. This servicer does neither.


SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthServicer(health_pb2_grpc.HealthServicer):
    """Reports the same status for all services, because all of them depend on the engine.

    Args:
        services: Full service names. The empty name, which stands for the whole server, is always
            included.
    """

    def __init__(self, services: Iterable[str]) -> None:
        self._services = {"", *services}
        self._status = NOT_SERVING
        self._is_closed = False
        self._changed = asyncio.Event()

    def set_serving(self, serving: bool) -> None:
        """Set the status for later checks, and notify all watchers."""
        self._status = SERVING if serving else NOT_SERVING
        # Every change has its own event, so even a slow watcher always sees the latest status.
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def close(self) -> None:
        """Set NOT_SERVING permanently. Watchers are notified, and their calls end."""
        self._is_closed = True
        self.set_serving(False)

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in self._services:
            # Set the status instead of raising: see CallInterceptor.run.
            context.set_code(grpc.StatusCode.NOT_FOUND)
            context.set_details("unknown service")
        return health_pb2.HealthCheckResponse(status=self._status)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        last = None
        while True:
            changed = self._changed
            status = self._status if request.service in self._services else _UNKNOWN
            if status != last:
                yield health_pb2.HealthCheckResponse(status=status)
                last = status
            if self._is_closed:
                return
            await changed.wait()
