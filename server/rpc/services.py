"""The services over gRPC: the control plane, the data plane, health."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from turret.server.api.admin import Adapters
from turret.server.api.call import Call
from turret.server.api.inference import Inference
from turret.server.api.training import Training
from turret.server.rpc.interceptor import current_call
from turret.v1 import adapters_pb2

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
