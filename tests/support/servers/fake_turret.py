"""A server with canned answers behind the real protocol, for tests of clients."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health_pb2_grpc

from turret.server import errors
from turret.server.api.call import fault_of
from turret.server.rpc import to_rich_status
from turret.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc

FOREVER = "forever"
# For prompts that end in one of these words, the server truncates the answer or disappears.
CUT, GONE = "cut", "gone"
# A path with this ending, or a config file with this content, stands for an adapter's current
# weights.
SAME = "same"
PEFT_FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(range(256)) * 2000}


def refuse(context: grpc.ServicerContext, error: errors.TurretError) -> NoReturn:
    """End the call with an error, like a server."""
    fault = fault_of(error)
    details = to_rich_status(fault).SerializeToString()
    context.set_trailing_metadata((("grpc-status-details-bin", details), ("x-request-id", "r-7")))
    context.abort(grpc.StatusCode[fault.code.name], fault.message)
    raise AssertionError("abort never returns")


def lose(context: grpc.ServicerContext) -> NoReturn:
    """End the call like a connection that broke."""
    context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
    raise AssertionError("abort never returns")


def start(
    *services: object,
    address: str = "127.0.0.1:0",
    credentials: grpc.ServerCredentials | None = None,
) -> tuple[grpc.Server, str]:
    """A started gRPC server, and its address."""
    server: Any = grpc.server(futures.ThreadPoolExecutor(4))
    for service in services:
        for kind, add in _ADDERS.items():
            if isinstance(service, kind):
                add(service, server)
    if credentials is None:
        port = server.add_insecure_port(address)
    else:
        port = server.add_secure_port(address, credentials)
    server.start()
    return server, f"127.0.0.1:{port}"


@contextmanager
def serving(*services: object, credentials: grpc.ServerCredentials | None = None) -> Iterator[str]:
    """Run a gRPC server until the block ends; yields its address."""
    server, address = start(*services, credentials=credentials)
    try:
        yield address
    finally:
        server.stop(0).wait()


_ADDERS: dict[type, Any] = {
    inference_pb2_grpc.InferenceServicer: inference_pb2_grpc.add_InferenceServicer_to_server,
    adapters_pb2_grpc.AdaptersServicer: adapters_pb2_grpc.add_AdaptersServicer_to_server,
    health_pb2_grpc.HealthServicer: health_pb2_grpc.add_HealthServicer_to_server,
}


class FakeInference(inference_pb2_grpc.InferenceServicer):
    """Answers with the prompt's words; knows the adapters of the other service."""

    def __init__(self, adapters: dict[str, adapters_pb2.Adapter]) -> None:
        self.adapters = adapters
        self.requests: list = []
        self.metadata: dict[str, object] = {}
        self.time_remaining: float | None = None
        # The error of every call, if any.
        self.refusal: errors.TurretError | None = None
        # Set once the call of the newest stream has ended. A call with the prompt FOREVER never
        # ends by itself.
        self.stream_ended = threading.Event()

    def _accept(self, request, context: grpc.ServicerContext) -> None:
        self.requests.append(request)
        self.metadata = dict(context.invocation_metadata())
        if self.refusal is not None:
            refuse(context, self.refusal)
        # Without a deadline, grpc reports the largest number of nanoseconds.
        remaining = context.time_remaining()
        self.time_remaining = None if remaining is None or remaining > 1e9 else remaining
        self._find(request, context)
        if getattr(request, "prompt", "") == "busy":
            refuse(context, errors.QueueFullError("queue full", retry_after_seconds=0.5))

    def _find(self, request, context: grpc.ServicerContext) -> None:
        missing = [a.name for a in request.adapters if a.name not in self.adapters]
        if missing:
            told = {"adapters": ",".join(missing)}
            said = f"no adapter {', '.join(missing)}"
            refuse(context, errors.AdapterNotFoundError(said, metadata=told))

    def _words(self, request) -> list[str]:
        if request.HasField("chat"):
            return [f"{m.role}:{m.content} " for m in request.chat.messages]
        if request.HasField("token_ids"):
            return [f"<{i}>" for i in request.token_ids.ids]
        return request.prompt.split()

    def _finish(self, response, request) -> None:
        is_cut = self._words(request)[-1:] in ([CUT], [f"user:{CUT} "])
        response.finish_reason = (
            inference_pb2.GenerateResponse.CANCELLED
            if is_cut
            else inference_pb2.GenerateResponse.STOP
        )
        response.stop_string = "END"
        response.usage.prompt_tokens = 3
        response.usage.completion_tokens = 2
        for a in request.adapters:
            weight = a.weight if a.HasField("weight") else 1.0
            response.adapters_used.add(name=a.name, uuid="u", generation=1, weight=weight)
        response.timing.ttft.FromMilliseconds(250)
        response.timing.total.FromMilliseconds(1500)
        response.request_id = request.request_id or "made-up"

    def Generate(self, request, context):
        self._accept(request, context)
        if request.sampling.top_p > 1:
            refuse(context, errors.InvalidRequestError.of("sampling.top_p", "<= 1"))
        response = inference_pb2.GenerateResponse(text="".join(self._words(request)))
        if request.options.logprobs:
            token = response.logprobs.add(token_id=5, text="a", logprob=-0.5)
            token.top.add(token_id=6, text="b", logprob=-1.0)
        self._finish(response, request)
        return response

    def GenerateStream(self, request, context):
        self.stream_ended = ended = threading.Event()
        context.add_callback(ended.set)
        self._accept(request, context)
        yield from (inference_pb2.GenerateChunk(text=w) for w in self._words(request))
        while request.prompt == FOREVER and context.is_active():
            yield inference_pb2.GenerateChunk(text=".")
            ended.wait(0.005)
        if request.prompt.endswith(GONE):
            lose(context)
        last = inference_pb2.GenerateChunk()
        self._finish(last, request)
        yield last

    def Score(self, request, context):
        self._accept(request, context)
        response = inference_pb2.ScoreResponse(request_id="s")
        response.tokens.add(token_id=1, text="a")
        response.tokens.add(token_id=2, text="[b]", logprob=-0.25)
        response.tokens.add(token_id=3, text="c", logprob=0.0)
        return response

    def Embed(self, request, context):
        self._accept(request, context)
        response = inference_pb2.EmbedResponse(request_id="e")
        for number, each in enumerate(request.inputs):
            response.embeddings.add(values=[len(self._words(each)), number, 0.125])
        response.usage.prompt_tokens = 5
        return response

    def Classify(self, request, context):
        self._accept(request, context)
        response = inference_pb2.ClassifyResponse(request_id="c")
        for each in request.inputs:
            found = response.classifications.add(label="[b]")
            found.scores.add(label="a", probability=0.25, logit=-1.0)
            found.scores.add(label="[b]", logit=float(len(self._words(each))))
        return response

    def Tokenize(self, request, context):
        self._find(request, context)
        return inference_pb2.TokenizeResponse(token_ids=[1, 2], token_texts=["a", "b"], text="ab")

    def GetModel(self, request, context):
        return inference_pb2.GetModelResponse(
            name="tiny", quantization="nf4", vocab_size=7, methods=["dora", "lora"]
        )


class FakeAdapters(adapters_pb2_grpc.AdaptersServicer):
    """A registry that stores its calls' arguments and received files."""

    def __init__(self, adapters: dict[str, adapters_pb2.Adapter]) -> None:
        self.adapters = adapters
        self.files: dict[str, bytes] = {}
        self.requests: list = []
        # The error of calls about one adapter, if any.
        self.refusal: errors.TurretError | None = None
        self.garble = False
        self.aliases: dict[str, adapters_pb2.Alias] = {}
        self.merged = adapters_pb2.MergeState(base_generation=1)

    def _add(self, name: str, *, pinned: bool = False) -> adapters_pb2.Adapter:
        self.adapters[name] = adapters_pb2.Adapter(
            name=name,
            uuid="u",
            generation=1,
            digest="d" * 64,
            method="lora",
            ranks=[4, 8],
            target_modules=["q_proj"],
            bytes_disk=1536,
            residency=adapters_pb2.Adapter.HOST,
            state=adapters_pb2.Adapter.ACTIVE,
            pinned=pinned,
            warnings=["[red] herring"],
        )
        return self.adapters[name]

    def _again(self, name: str, pinned: bool) -> adapters_pb2.Adapter:
        self.adapters[name].pinned |= pinned
        return self.adapters[name]

    def _get(self, request, context: grpc.ServicerContext) -> adapters_pb2.Adapter:
        self.requests.append(request)
        if self.refusal is not None:
            refuse(context, self.refusal)
        if request.name not in self.adapters:
            refuse(context, errors.AdapterNotFoundError(f"no adapter {request.name}", metadata={}))
        return self.adapters[request.name]

    def LoadAdapter(self, request, context):
        self.requests.append(request)
        if request.path.endswith(SAME):
            self.adapters[request.name].source = request.path
            return self._again(request.name, request.pinned)
        return self._add(request.name, pinned=request.pinned)

    def UploadAdapter(self, request_iterator, context):
        header = next(request_iterator).header
        received = {info.path: b"" for info in header.files}
        for message in request_iterator:
            received[message.chunk.path] += message.chunk.data
        for info in header.files:
            data = received[info.path]
            assert info.size_bytes == len(data)
            assert info.sha256 == hashlib.sha256(data).hexdigest()
        if received["adapter_config.json"] == SAME.encode():
            return self._again(header.name, header.pinned)
        if header.name in self.adapters and not header.replace:
            taken = {"adapter": header.name}
            refuse(context, errors.AdapterExistsError(f"{header.name} is taken", metadata=taken))
        self.files = received
        self.requests.append(header)
        return self._add(header.name, pinned=header.pinned)

    def ReplaceAdapter(self, request, context):
        adapter = self._get(request, context)
        adapter.generation += request.path != SAME
        return adapter

    def RollbackAdapter(self, request, context):
        self.requests.append(request)
        adapter = self._get(request, context)
        adapter.kept_generations[:] = [adapter.generation]
        adapter.generation = request.generation or adapter.generation - 1
        return adapter

    def GetAdapter(self, request, context):
        return self._get(request, context)

    def ListAdapters(self, request, context):
        self.requests.append(
            adapters_pb2.ListAdaptersRequest.FromString(request.SerializeToString())
        )
        method = request.method
        names = sorted(n for n, a in self.adapters.items() if method in ("", a.method))
        start = int(request.page_token or 0)
        end = start + (request.page_size or 100)
        return adapters_pb2.ListAdaptersResponse(
            adapters=[self.adapters[n] for n in names[start:end]],
            next_page_token=str(end) if end < len(names) else "",
            total_size=len(names),
        )

    def SetAlias(self, request, context):
        self.requests.append(request)
        alias = adapters_pb2.Alias(name=request.name)
        for target in request.targets:
            generation = target.generation or self.adapters[target.name].generation
            weight = target.weight if target.HasField("weight") else 1.0
            alias.targets.add(name=target.name, generation=generation, weight=weight)
        self.aliases[request.name] = alias
        return alias

    def DeleteAlias(self, request, context):
        del self.aliases[request.name]
        return adapters_pb2.DeleteAliasResponse()

    def ListAliases(self, request, context):
        return adapters_pb2.ListAliasesResponse(aliases=self.aliases.values())

    def UnloadAdapter(self, request, context):
        self._get(request, context)
        del self.adapters[request.name]
        return adapters_pb2.UnloadAdapterResponse()

    def PinAdapter(self, request, context):
        adapter = self._get(request, context)
        adapter.pinned = True
        return adapter

    def UnpinAdapter(self, request, context):
        adapter = self._get(request, context)
        adapter.pinned = False
        return adapter

    def FuseAdapters(self, request, context):
        self.requests.append(request)
        response = adapters_pb2.FuseAdaptersResponse(relative_error=0.25)
        response.adapter.CopyFrom(self._add(request.name))
        response.modules.add(module="layers.0.q_proj", relative_error=0.5, rank=8)
        response.modules.add(module="layers.1.q_proj", relative_error=0.25, rank=4)
        return response

    def MergeAdapters(self, request, context):
        self.requests.append(request)
        state = adapters_pb2.MergeState(
            active=True,
            base_generation=2,
            precision=request.precision,
            relative_error=0.125,
            update_error=0.75,
        )
        for a in request.adapters:
            state.adapters.add(name=a.name, generation=1, weight=a.weight)
        state.merge_time.FromSeconds(86_400)
        self.merged = state
        return state

    def GetMergeState(self, request, context):
        return self.merged

    def UnmergeAdapters(self, request, context):
        self.merged = adapters_pb2.MergeState(base_generation=3)
        return self.merged

    def ExportAdapter(self, request, context):
        header = adapters_pb2.ExportHeader(adapter=self._get(request, context))
        for path, data in PEFT_FILES.items():
            header.files.add(path=path, size_bytes=len(data))
        yield adapters_pb2.ExportAdapterResponse(header=header)
        for path, data in PEFT_FILES.items():
            for start in range(0, len(data) - int(self.garble), 100_000):
                piece = data[start : start + 100_000]
                chunk = adapters_pb2.FileChunk(path=path, data=piece[: 10 if self.garble else None])
                yield adapters_pb2.ExportAdapterResponse(chunk=chunk)


class FakeTurret:
    """Both services, and their ``address``."""

    def __init__(self, address: str, inference: FakeInference, adapters: FakeAdapters) -> None:
        self.address = address
        self.inference = inference
        self.adapters = adapters


@contextmanager
def fake_turret(kind: type[FakeInference] = FakeInference) -> Iterator[FakeTurret]:
    """Run the server on a free port of the loopback address, with the adapters sql and json."""
    registry: dict[str, adapters_pb2.Adapter] = {}
    inference, adapters = kind(registry), FakeAdapters(registry)
    for name in ("sql", "json"):
        adapters._add(name)
    with serving(inference, adapters) as address:
        yield FakeTurret(address, inference, adapters)
