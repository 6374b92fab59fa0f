"""Fakes of engine, registry, merger and tokenizer."""

from __future__ import annotations

import asyncio
import threading
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
from builders.facts import facts_of

from turret.server import errors
from turret.server.adapters.adapter import (
    SINGLE_LABEL,
    AdapterInfo,
    AdapterRef,
    Alias,
    AliasTarget,
    Head,
    OwnTemplate,
)
from turret.server.adapters.merger import ActiveMerge, MergedAdapter, MergeReport, MergeState
from turret.server.api.gate import Backend, ServingGate
from turret.server.api.services import Services
from turret.server.api.vocabularies import Vocabularies, Vocabulary
from turret.server.basics.turns import FairPool
from turret.server.basics.work import Cancellation
from turret.server.constraints.matcher import KeptConstraints
from turret.server.engine.answer import AnswerMemory
from turret.server.engine.scheduling.request import (
    AdapterUse,
    Finish,
    FinishReason,
    Output,
    Request,
    Timing,
    TokenLogprob,
    Usage,
)
from turret.server.metrics import Metrics
from turret.server.models.chat_template import ChatFormat, ToolForm
from turret.server.models.describe import ModelInfo
from turret.server.models.tokenizer import RenderedChat

VOCAB_SIZE = 256
MODEL_INFO = ModelInfo(
    name="fake",
    model_type="llama",
    digest="ab" * 32,
    dtype="float32",
    quantization="nf4",
    vocab_size=VOCAB_SIZE,
    max_model_len=64,
    num_layers=2,
    hidden_size=8,
)


class FakeTokenizer:
    """A tokenizer with a token per byte, which accepts texts of any length."""

    longest_token = 1 << 16
    chat_format = ChatFormat()
    encodes_at_once = True
    default_template = None
    template_variables: ClassVar = {}

    def __init__(self) -> None:
        self._pool = FairPool(ThreadPoolExecutor(1))

    def encode(self, text: str, *, adds_special: bool = True) -> list[int]:
        return list(text.encode())

    def chat_pool(self, is_short: bool) -> FairPool:
        return self._pool

    def render_chat(self, messages: Any, tools: Any = (), **how: bool) -> RenderedChat:
        return RenderedChat(["".join(f"{m['role']}:{m['content']};" for m in messages)])

    def encode_rendered(self, chat: RenderedChat) -> list[int]:
        return self.encode("".join(chat.parts))

    def close(self) -> None:
        pass

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        return bytes(token_ids).decode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        return self.decode([token_id])


HEAD = Head(("long", "short"), SINGLE_LABEL)


def uses(request: Request) -> tuple[AdapterUse, ...]:
    """The adapters that a request used, as reported with the first token and at the end."""
    return tuple(
        AdapterUse(
            name=ref.name,
            uuid=f"uuid-{ref.name}",
            generation=ref.generation or 1,
            digest=f"digest-{ref.name}",
            weight=ref.weight,
            cold_start=False,
            load_ms=0.0,
        )
        for ref in request.adapters
    )


def finish(request: Request, reason: FinishReason = FinishReason.STOP, stop: Any = None) -> Finish:
    """The end of a request, with numbers that a test can recognise."""
    return Finish(
        reason=reason,
        stop=stop,
        usage=Usage(
            prompt_tokens=len(request.prompt_token_ids), cached_tokens=1, completion_tokens=2
        ),
        adapters_used=uses(request),
        timing=Timing(queue_seconds=0.25, time_to_first_token_seconds=0.5, total_seconds=1.75),
    )


class FakeStream:
    """Yields the outputs of the script until it is cancelled."""

    def __init__(self, outputs: AsyncIterator[Output]) -> None:
        self._outputs = outputs
        self.cancelled = asyncio.Event()

    def __aiter__(self) -> AsyncIterator[Output]:
        return self._outputs

    def cancel(self) -> None:
        self.cancelled.set()


Script = Callable[[Request], AsyncIterator[Output]]


async def hello(request: Request) -> AsyncIterator[Output]:
    """A script with two tokens and the end.

    For embeddings and classification, it instead yields a vector or logits that begin with the
    prompt's length.
    """
    if request.pooling is not None:
        size = request.pooling.dimensions or MODEL_INFO.hidden_size
        if request.classifies:
            count = float(len(request.prompt_token_ids))
            yield Output(pooled=array("f", [count, 1.0]), head=HEAD, finish=finish(request))
            return
        vector = array("f", [len(request.prompt_token_ids), *[0.125] * (size - 1)])
        yield Output(pooled=vector, finish=finish(request))
        return
    logprob = TokenLogprob(token_id=72, text="H", logprob=-0.5)
    scores = tuple(
        TokenLogprob(token_id=t, text=chr(t), logprob=None if i == 0 else -float(i))
        for i, t in enumerate(request.prompt_token_ids)
    )
    wants_prompt = request.score or (request.options.echo and request.options.logprobs)
    yield Output(
        text="H",
        token_ids=(72,),
        logprobs=(logprob,),
        prompt_logprobs=scores if wants_prompt else (),
        adapters_used=uses(request),
    )
    logprob = replace(logprob, token_id=105, text="i", logprob=-0.25)
    yield Output(text="i", token_ids=(105,), logprobs=(logprob,), finish=finish(request))


def saying(
    *parts: str | Output, reason: FinishReason = FinishReason.STOP, stop: str | int | None = None
) -> Script:
    """A script that answers with these texts or outputs, and ends with the last one."""

    async def script(request: Request) -> AsyncIterator[Output]:
        for place, part in enumerate(parts, 1):
            if isinstance(part, str):
                logprob = TokenLogprob(token_id=72, text=part, logprob=-0.5)
                part = Output(text=part, token_ids=(72,), logprobs=(logprob,) if part else ())
            is_last = place == len(parts)
            yield replace(part, finish=finish(request, reason, stop)) if is_last else part

    return script


def knows_tools(
    monkeypatch: pytest.MonkeyPatch, form: ToolForm = "hermes", **how: Any
) -> list[tuple[Any, Any, dict[str, Any]]]:
    """Give the fake tokenizer a template with tools; returns the list of its later inputs."""
    given: list[tuple[Any, Any, dict[str, Any]]] = []

    def render(self: Any, messages: Any, tools: Any = (), **asked: Any) -> RenderedChat:
        given.append((messages, tools, asked))
        return RenderedChat(["\1"])

    monkeypatch.setattr(FakeTokenizer, "chat_format", ChatFormat(form, **how))
    monkeypatch.setattr(FakeTokenizer, "render_chat", render)
    return given


async def endless(request: Request) -> AsyncIterator[Output]:
    """A script with one token, which never ends."""
    yield Output(text="H", token_ids=(72,))
    await asyncio.Event().wait()


def failing(error: BaseException) -> Script:
    """A script with one token and an error."""

    async def script(request: Request) -> AsyncIterator[Output]:
        yield Output(text="H", token_ids=(72,))
        raise error

    return script


class FakeEngine:
    """Runs ``script`` for each request, and records the requests."""

    def __init__(self, script: Script = hello) -> None:
        self.script = script
        self.refuse: BaseException | None = None
        self.requests: list[Request] = []
        self.streams: list[FakeStream] = []
        self.submitted = asyncio.Event()
        self.dead = asyncio.Event()
        self.drained: list[float] = []
        self.started = asyncio.Event()
        self.memory = AnswerMemory(1 << 30)

    @property
    def is_dead(self) -> bool:
        return self.dead.is_set()

    async def start(self) -> None:
        self.started.set()

    async def drain(self, grace_seconds: float) -> None:
        self.drained.append(grace_seconds)

    async def submit(self, request: Request) -> FakeStream:
        self.requests.append(request)
        if self.refuse is not None:
            raise self.refuse
        self.streams.append(FakeStream(self.script(request)))
        self.submitted.set()
        return self.streams[-1]


@dataclass
class FakeRegistry:
    """Adapters by name, without weights."""

    records: dict[str, AdapterInfo] = field(default_factory=dict)
    unloads: list[tuple[str, str, float]] = field(default_factory=list)
    by_alias: dict[str, Alias] = field(default_factory=dict)
    is_closed: bool = False

    def load(
        self,
        name: str,
        path: str,
        pinned: bool = False,
        task: int | None = None,
        chat_template: OwnTemplate | None = None,
    ) -> AdapterInfo:
        digest = f"digest of {path}" if task is None else f"digest of task {task} of {path}"
        if name in self.records:
            if self.records[name].facts.digest != digest:
                raise errors.AdapterExistsError(f"{name!r} is taken", metadata={"adapter": name})
            return self.records[name]
        self.records[name] = AdapterInfo(
            name=name,
            uuid=f"uuid-{name}",
            generation=1,
            facts=facts_of(
                digest,
                chat_template="" if chat_template is None else chat_template.to_json(),
                method="dora" if name.endswith("-dora") else "lora",
                ranks=(4, 8),
                base_model="base",
                bytes_disk=100,
                bytes_host=150,
            ),
            bytes_host=150,
            bytes_device=0,
            residency="disk" if name.startswith("cold") else "host",
            pinned=pinned,
            in_flight=0,
            last_used_time=1_700_000_000.5 if pinned else None,
            state="ACTIVE",
        )
        return self.records[name]

    def replace(
        self,
        name: str,
        path: str,
        expected_generation: int | None = None,
        task: int | None = None,
        chat_template: OwnTemplate | None = None,
    ) -> AdapterInfo:
        generation = self.get(name).generation + 1
        del self.records[name]
        loaded = self.load(name, path, task=task, chat_template=chat_template)
        self.records[name] = replace(loaded, generation=generation)
        return self.records[name]

    def get(self, name: str, generation: int | None = None) -> AdapterInfo:
        if name not in self.records:
            raise errors.AdapterNotFoundError(f"no adapter {name!r}", metadata={"adapter": name})
        return self.records[name]

    def rollback(
        self, name: str, generation: int | None = None, expected_generation: int | None = None
    ) -> AdapterInfo:
        before = self.get(name)
        kept = (before.generation,)
        number = generation or before.generation - 1
        self.records[name] = replace(before, generation=number, kept_generations=kept)
        return self.records[name]

    def list(self) -> list[AdapterInfo]:
        return list(self.records.values())

    def unload(
        self, name: str, mode: str, timeout_seconds: float, expected_generation: int | None = None
    ) -> None:
        if self.get(name).pinned:
            raise errors.AdapterInUseError(f"{name!r} is pinned")
        self.unloads.append((name, mode, timeout_seconds))
        del self.records[name]

    def find(self, ref: AdapterRef) -> None:
        """Find nothing, so that calls are counted under the names in their requests."""

    def aliases(self) -> list[Alias]:
        return list(self.by_alias.values())

    def set_alias(self, name: str, targets: list[AdapterRef]) -> Alias:
        self.by_alias[name] = alias = Alias(
            name,
            tuple(
                AliasTarget(name=t.name, uuid="u", generation=t.generation or 1, weight=t.weight)
                for t in targets
            ),
        )
        return alias

    def delete_alias(self, name: str) -> None:
        del self.by_alias[name]

    def acquire(self, refs: Any, tenant: bytes = b"") -> Any:
        """Grant any adapter."""
        return refs

    def release(self, mix: Any) -> None:
        pass

    def pin(self, name: str, pinned: bool = True) -> AdapterInfo:
        self.records[name] = replace(self.get(name), pinned=pinned)
        return self.records[name]

    def unpin(self, name: str) -> AdapterInfo:
        return self.pin(name, False)

    def close(self) -> None:
        self.is_closed = True


class FakeMerger:
    """Merges at once, fails, or (with ``is_slow``) waits until it is cancelled."""

    def __init__(self) -> None:
        self.state = MergeState(1)
        self.error: BaseException | None = None
        self.is_slow = False
        self.calls: list[tuple[Any, ...]] = []
        self.begun = threading.Event()
        self.withdrawn = threading.Event()

    def merge(self, refs: Any, precision: Any, cancellation: Cancellation) -> MergeState:
        self.calls.append((refs, precision))
        self.begun.set()
        if self.error is not None:
            raise self.error
        if self.is_slow:
            cancellation.wait(Future())
            self.withdrawn.set()
            cancellation.check()
        members = tuple(MergedAdapter(r.name, f"uuid-{r.name}", 3, r.weight, "d") for r in refs)
        report = MergeReport(0.125, 0.75, (("layers.0.q_proj", 0.25), ("layers.1.q_proj", 0.0)))
        merge = ActiveMerge(adapters=members, precision=precision, time=86_400.5, report=report)
        self.state = MergeState(self.state.base_generation + 1, merge)
        return self.state

    def unmerge(self, cancellation: Cancellation) -> MergeState:
        if self.state.merge is None:
            raise errors.NotMergedError("no merge is active: the base is as it was loaded")
        self.state = MergeState(self.state.base_generation + 1)
        return self.state


class FakeFuser:
    """A fuser that fuses nothing."""

    def close(self) -> None:
        pass


class FakeConstraints:
    """Compiles nothing, and returns its argument."""

    def __init__(self) -> None:
        self.kept = KeptConstraints()

    async def compile(self, spec: Any, tenant: bytes = b"") -> Any:
        return spec

    def close(self) -> None:
        pass


class FakeVocabularies(Vocabularies):
    """All adapters use the base's vocabulary."""

    def __init__(self, base: Vocabulary) -> None:
        self._only = base

    async def of(
        self,
        weights: Any,
        chat_template: str = "",
        *,
        draw: float | None = None,
        tenant: bytes = b"",
    ) -> Vocabulary:
        return self._only

    def close(self) -> None:
        self._only.close()


@dataclass
class Fakes:
    """The services of a server, and the fake parts behind their gate."""

    services: Services
    engine: FakeEngine
    registry: Any
    merger: FakeMerger
    backend: Backend

    @classmethod
    def make(
        cls,
        *,
        registry: Any = None,
        fuser: Any = None,
        trainer: Any = None,
        backend: Backend | None = None,
        **settings: Any,
    ) -> Fakes:
        """Make fakes for all parts that the caller does not pass; a given backend keeps its own.

        ``settings`` are those of ``Services``.
        """
        engine, merger = FakeEngine(), FakeMerger()
        registry = FakeRegistry() if registry is None else registry
        made = fake_backend(engine, registry, merger, fuser or FakeFuser())
        backend = backend or replace(made, training=trainer)
        return cls(Services(gate=ServingGate(), **settings), engine, registry, merger, backend)

    @property
    def fields(self) -> tuple[Any, ...]:
        """The parts, for a harness that has further ones."""
        return self.services, self.engine, self.registry, self.merger, self.backend

    @property
    def gate(self) -> ServingGate:
        return self.services.gate

    @property
    def metrics(self) -> Metrics:
        return self.services.metrics


def fake_backend(engine: Any, registry: Any, merger: Any, fuser: Any) -> Backend:
    """A backend of fakes, typed as the real parts."""
    tokenizer: Any = FakeTokenizer()
    constraints: Any = FakeConstraints()
    return Backend(
        engine=engine,
        registry=registry,
        fuser=fuser,
        merger=merger,
        tokenizer=tokenizer,
        vocabularies=FakeVocabularies(Vocabulary(tokenizer, constraints)),
        model_info=MODEL_INFO,
        methods=("dora", "loha", "lora"),
    )
