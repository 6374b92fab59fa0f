"""gRPC and HTTP without sockets, with a real registry and fuser: bytes in, a code out."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from typing import Any

import grpc
from builders.registries import Registries
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from servers.fakes import MODEL_INFO, FakeEngine, FakeMerger, fake_backend
from servers.table_training import TableTraining

from turret.server.adapters.fuser import Fuser
from turret.server.adapters.state_dir import StateDir
from turret.server.api.gate import ServingGate
from turret.server.api.services import Services
from turret.server.api.training import Training
from turret.server.config import ListenConfig, SecurityConfig
from turret.server.http.server import HttpServer
from turret.server.rpc import CallInterceptor, HealthServicer, Servicer
from turret.v1 import adapters_pb2, inference_pb2, tinker_pb2, training_pb2

CALL_SECONDS = 20.0
# All methods; a fuzzer selects one by its position.
METHODS: tuple[Any, ...] = tuple(
    method
    for file, name in (
        (inference_pb2.DESCRIPTOR, "Inference"),
        (adapters_pb2.DESCRIPTOR, "Adapters"),
        (health_pb2.DESCRIPTOR, "Health"),
        (training_pb2.DESCRIPTOR, "Training"),
    )
    for method in file.services_by_name[name].methods
    # Watch never ends, and ignores its input.
    if method.name != "Watch"
)
_BY_NAME = {method.name: method for method in METHODS}
# All paths that take a JSON body; a fuzzer selects one by its position.
PATHS = (
    *("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/v1/embeddings"),
    *("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/classify", "/v1/responses"),
    *("/v1/messages", "/v1/messages/count_tokens"),
    *("/v1/pin_lora_adapter", "/v1/unpin_lora_adapter"),
)
_TINKER = "/api/v1"
PASS = f"{_TINKER}/forward_backward"
# The same for training; the body of ``PASS`` is a protobuf message instead.
TRAINING_PATHS = tuple(
    f"{_TINKER}/{name}"
    for name in (
        *("client/config", "client/dynamic_config", "telemetry", "create_session"),
        *("session_heartbeat", "retrieve_future", "cancel_future", "create_model", "get_info"),
        *("unload_model", "forward_backward", "optim_step", "save_weights"),
        *("save_weights_for_sampler", "save_weights_external", "load_weights"),
        *("create_sampling_session", "asample", "weights_info"),
    )
)
# Placeholders in bodies for training; the ids that replace them differ each time.
SESSION, MODEL = b"@session", b"@model"
# The maximum wait for a result; only results of invalid bodies take longer.
_RESULT_SECONDS = 0.3


class _Context:
    """The parts of gRPC's context that servicers use."""

    def __init__(self) -> None:
        self.status: grpc.StatusCode | None = None
        self.details = ""
        self.trailers: Any = ()
        self.answer: Any = None

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def time_remaining(self) -> float:
        return CALL_SECONDS

    def peer(self) -> str:
        return "ipv4:10.0.0.1:1"

    def code(self) -> grpc.StatusCode | None:
        return self.status

    def set_code(self, code: grpc.StatusCode) -> None:
        self.status = code

    def set_details(self, details: str) -> None:
        self.details = details

    def set_trailing_metadata(self, trailers: Any) -> None:
        self.trailers = trailers

    async def write(self, message: Message) -> None:
        message.SerializeToString()
        self.answer = message


class Protocols:
    """Answers calls one after the other. Close it at the end.

    Args:
        folder: The directory for the adapters and the state directory.
    """

    def __init__(self, folder: Path) -> None:
        self._loop = asyncio.new_event_loop()
        self._registries = Registries(folder)
        state = StateDir(folder / "state", 1 << 20)
        self.registry = self._registries(load="ab", state=state)
        services = Services(gate=ServingGate(), training=folder / "training")
        self._fuser = Fuser(self.registry, host_bytes=1 << 26, max_rank=64)
        self._adapters = services.adapters
        backend = fake_backend(FakeEngine(), self.registry, FakeMerger(), self._fuser)
        training = TableTraining(MODEL_INFO.vocab_size)
        services.gate.open(dataclasses.replace(backend, training=training))
        self._servicers: dict[str, Any] = {
            "Inference": Servicer(services.inference),
            "Adapters": Servicer(services.adapters),
        }
        assert services.tenants is not None
        self._tenants = services.tenants
        self._servicers["Training"] = Servicer(Training(self._tenants))
        listen = ListenConfig(http_address="127.0.0.1:0")

        async def make() -> HttpServer:
            return HttpServer(listen, SecurityConfig(), services)

        self._http = self._loop.run_until_complete(make())
        self._servicers["Health"] = HealthServicer(("turret.v1.Inference",))
        self._interceptor = CallInterceptor(services)
        self._app: Any = self._http._app

    def close(self) -> None:
        """End all pending work."""
        self._loop.run_until_complete(self._http.stop(0))
        self._adapters.close()
        self._fuser.close()
        self._registries.close()
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    def call(self, method: MethodDescriptor, messages: Iterable[bytes | Message]) -> str:
        """The name of the final status of a gRPC call.

        Args:
            method: One of ``METHODS``.
            messages: The sent messages; more than one only for a streaming method. Those of
                Training get the id of a new model, and the path of its checkpoint.
        """
        if method.containing_service.name == "Training":
            return self._loop.run_until_complete(self._call_training(method, messages))
        return self._loop.run_until_complete(self._call(method, messages))[0]

    async def _call_training(
        self, method: MethodDescriptor, messages: Iterable[bytes | Message]
    ) -> str:
        config = training_pb2.TrainingConfig(rank=1)
        create = training_pb2.CreateModelRequest(config=config)
        _, model = await self._call(_BY_NAME["CreateModel"], [create])
        save = training_pb2.SaveCheckpointRequest(model_id=model.model_id, name="a")
        _, saved = await self._call(_BY_NAME["SaveCheckpoint"], [save])
        ids = {"model_id": model.model_id, "path": saved.path}
        taken = {name: ids[name] for name in ids.keys() & method.input_type.fields_by_name.keys()}
        # In protobuf, the last value of a field wins, so these override the input's.
        head = GetMessageClass(method.input_type)(**taken).SerializeToString()
        sent = (each if isinstance(each, bytes) else each.SerializeToString() for each in messages)
        code, _ = await self._call(method, (each + head for each in sent))
        sessions, checkpoints = self._tenants.sessions, self._tenants.checkpoints
        for each in sessions.models(""):
            sessions.end(sessions.of(each))
        await sessions.close()
        for each in checkpoints.owned(""):
            await checkpoints.remove(each)
        return code

    async def _call(
        self, method: MethodDescriptor, messages: Iterable[bytes | Message]
    ) -> tuple[str, Any]:
        """The name of the final status, and the last answer."""
        kind: Any = GetMessageClass(method.input_type)

        servicer = self._servicers[method.containing_service.name]
        behaviour = getattr(servicer, method.name)
        handler = _handler(method, behaviour, kind.FromString)
        answer = self._interceptor._answer(f"/{method.containing_service.full_name}/x", handler)
        context = _Context()
        deserialize = answer.request_deserializer

        async def received() -> AsyncIterator[Any]:
            for each in messages:
                yield deserialize(each if isinstance(each, bytes) else each.SerializeToString())

        act = answer.stream_stream if answer.response_streaming else answer.stream_unary
        async with asyncio.timeout(CALL_SECONDS):
            result = await act(received(), context)
        if result is not None:
            result.SerializeToString()
        return (context.status or grpc.StatusCode.OK).name, context.answer

    def post(self, path: str, body: bytes) -> int:
        """The status of a POST over HTTP."""
        return self._loop.run_until_complete(self._post(path, body))[0]

    def train(self, calls: Iterable[tuple[str, bytes]]) -> list[int]:
        """The statuses of calls in a new session with a model, and of their results.

        Args:
            calls: Paths and bodies. ``SESSION`` and ``MODEL`` stand for ids in JSON; messages get
                the model's id and the next number.
        """
        return self._loop.run_until_complete(self._train(calls))

    async def _train(self, calls: Iterable[tuple[str, bytes]]) -> list[int]:
        session = (await self._asked("create_session", {}))["session_id"]
        model = {"session_id": session, "model_seq_id": 0, "base_model": "base"}
        promise = await self._asked("create_model", {**model, "lora_config": {"rank": 1}})
        model_id = (await self._asked("retrieve_future", promise))["model_id"]
        ids = {SESSION: session.encode(), MODEL: model_id.encode()}
        statuses, sessions = [], [session]
        for number, (path, sent) in enumerate(calls, 1):
            if path == PASS:
                # In protobuf, the last value of a field wins, so these override the input's.
                head = tinker_pb2.TinkerPass(model_id=model_id, seq_id=number)
                body, kind = sent + head.SerializeToString(), b"application/x-protobuf"
            else:
                body, kind = sent, b"application/json"
                for name, value in ids.items():
                    body = body.replace(name, value)
            status, answer = await self._post(path, body, kind)
            statuses.append(status)
            if path == f"{_TINKER}/create_session" and status == 200:
                sessions.append(json.loads(answer)["session_id"])
            if b"request_id" in answer and path != f"{_TINKER}/retrieve_future":
                result = asyncio.ensure_future(self._post(f"{_TINKER}/retrieve_future", answer))
                if (await asyncio.wait([result], timeout=_RESULT_SECONDS))[0]:
                    status, answer = await result
                    # The result of failed work has status 200, so count the server's failures as a
                    # second status, 500.
                    statuses += [status, *[500] * (b'"category":"server"' in answer)]
                result.cancel()
                await asyncio.wait([result])
        for each in sessions:
            await self._asked(f"sessions/{each}/finish", {})
        return statuses

    async def _asked(self, path: str, body: Mapping[str, object]) -> dict[str, Any]:
        status, answer = await self._post(f"{_TINKER}/{path}", json.dumps(body).encode())
        assert status == 200, answer
        return json.loads(answer)

    async def _post(
        self, path: str, body: bytes, kind: bytes = b"application/json"
    ) -> tuple[int, bytes]:
        statuses: list[int] = []
        answer = bytearray()
        waiting = [{"type": "http.request", "body": body, "more_body": False}]
        gone = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if waiting:
                return waiting.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
            elif message["type"] == "http.response.body":
                answer.extend(message.get("body", b""))

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"host", b"127.0.0.1"), (b"content-type", kind)],
            "client": ("10.0.0.1", 1),
            "server": ("10.0.0.2", 80),
        }
        async with asyncio.timeout(CALL_SECONDS):
            await self._app(scope, receive, send)
        assert len(statuses) == 1, "one request, one answer"
        return statuses[0], bytes(answer)

    def is_listed(self) -> bool:
        """Whether ``ListAdapters`` still answers in time with every accepted adapter."""
        start = time.monotonic()
        code = self.call(_BY_NAME["ListAdapters"], [b""])
        return code == "OK" and time.monotonic() - start < CALL_SECONDS


def _handler(method: MethodDescriptor, behaviour: Any, parse: Any) -> Any:
    """A handler like that of grpcio's generated code."""
    is_many, answers_many = method.client_streaming, method.server_streaming
    one = {(False, False): "unary_unary", (False, True): "unary_stream"}
    many = {(True, False): "stream_unary", (True, True): "stream_stream"}
    name = {**one, **many}[is_many, answers_many]
    make = getattr(grpc, f"{name}_rpc_method_handler")
    return make(behaviour, request_deserializer=parse, response_serializer=None)


def called(
    channel: grpc.Channel, method: MethodDescriptor, messages: Iterable[bytes], seconds: float
) -> str:
    """The name of the final status of a call to a real server with these bytes."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    start = channel.stream_stream(path, request_serializer=None, response_deserializer=None)
    call = start(iter(messages), timeout=seconds)
    try:
        for _ in call:
            pass
    except grpc.RpcError:
        return call.code().name
    return "OK"
