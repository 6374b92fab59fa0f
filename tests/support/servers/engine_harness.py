"""The real engine on a real model, in this process."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from turret.fleet.replica import ReplicaParts
from turret.server.adapters.adapter import AdapterRef, Head
from turret.server.api.gate import Backend
from turret.server.api.vocabularies import Vocabulary
from turret.server.build import build_backend
from turret.server.config import (
    AdapterConfig,
    CacheConfig,
    Config,
    ModelConfig,
    SchedulerConfig,
    SecurityConfig,
)
from turret.server.engine.scheduling.request import (
    Finish,
    Request,
    ResponseOptions,
    SamplingParams,
    StopConditions,
    TokenLogprob,
)
from turret.server.metrics import Metrics
from turret.v1.adapters_pb2 import AdapterWeight

_numbers = itertools.count()
GREEDY = SamplingParams(temperature=0.0)
# An adapter of a request: a name, alone or with a weight. None stands for the base.
Asked = AdapterRef | tuple[str, float] | str | None


@dataclass(frozen=True, slots=True)
class Answer:
    """The whole result of a request.

    Compare answers by their ``bits``, because ``finish`` contains times.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]
    top: tuple[tuple[tuple[int, float], ...], ...]
    prompt_logprobs: tuple[float | None, ...]
    text: str
    finish: Finish
    pooled: tuple[float, ...] | None = None
    head: Head | None = None

    @property
    def bits(self) -> tuple[Any, ...]:
        """The parts that must depend only on the request."""
        answered = self.token_ids, self.logprobs, self.top, self.prompt_logprobs, self.text
        return answered if self.pooled is None else (*answered, self.pooled)


def refs_of(*adapters: Asked) -> tuple[AdapterRef, ...]:
    refs = []
    for adapter in adapters:
        if isinstance(adapter, tuple):
            refs.append(AdapterRef(name=adapter[0], weight=adapter[1]))
        elif adapter:
            refs.append(AdapterRef(name=adapter) if isinstance(adapter, str) else adapter)
    return tuple(refs)


def make_request(
    prompt: Sequence[int],
    *adapters: Asked,
    max_tokens: int = 8,
    sampling: SamplingParams = GREEDY,
    score: bool = False,
    **changes: Any,
) -> Request:
    """A request, by default with logprobs and without an early end."""
    request = Request(
        request_id=f"r{next(_numbers)}",
        prompt_token_ids=tuple(prompt),
        adapters=refs_of(*adapters),
        sampling=sampling,
        stop=StopConditions(max_tokens=max_tokens, ignore_eos=True),
        options=ResponseOptions(logprobs=True, top_n=3),
        score=score,
    )
    return replace(request, **changes)


class EngineHarness:
    """A backend with a started engine, and its ``metrics``."""

    def __init__(self, backend: Backend, metrics: Metrics) -> None:
        self.engine = backend.engine
        self.registry = backend.registry
        self.merger = backend.merger
        self.tokenizer = backend.tokenizer
        self.backend = backend
        self.metrics = metrics

    @classmethod
    @contextlib.asynccontextmanager
    async def start(
        cls,
        model: Path | None,
        adapter_root: Path | None = None,
        *,
        dtype: Any = "float32",
        adapters: Sequence[str] = (),
        kv_cache_bytes: int = 64 << 20,
        max_num_batched_tokens: int = 64,
        max_num_seqs: int = 32,
        preempt_after_seconds: float = 5.0,
        speculation: Any = "auto",
        head_screen: bool = True,
        adapter_device_bytes: int = 512 << 20,
        gpu: bool = False,
        replica: ReplicaParts | None = None,
        state_dir: Path | None = None,
        chat_template: Path | None = None,
        trusts_templates: bool = False,
        allow_merged_twice: bool = False,
        keep_generations: int = 0,
        training: bool = False,
    ) -> AsyncIterator[EngineHarness]:
        """Build and start an engine, and load ``adapters``, each from the directory of its name.

        ``gpu`` uses the GPU path in Triton's interpreter; ``replica`` makes it a replica of a
        fleet.
        """
        config = Config(
            model=ModelConfig(
                model=model,
                device="cpu",
                dtype=dtype,
                head_screen=head_screen,
                chat_template=chat_template,
            ),
            cache=CacheConfig(kv_cache_bytes=kv_cache_bytes),
            scheduler=SchedulerConfig(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                preempt_after_seconds=preempt_after_seconds,
                speculation=speculation,
            ),
            adapters=AdapterConfig(
                adapter_root=adapter_root,
                adapter_device_bytes=adapter_device_bytes,
                state_dir=state_dir,
                allow_dense_adapters=True,
                allow_merged_twice=allow_merged_twice,
                keep_generations=keep_generations,
                training=training,
            ),
            security=SecurityConfig(trust_request_chat_template=trusts_templates),
        )
        metrics = Metrics()
        # Files derived from a test's model are written alongside it, not to the user's cache.
        cache = {} if model is None else {"XDG_CACHE_HOME": str(model.parent / "cache")}
        with patch.dict(os.environ, cache):
            backend = build_backend(config, metrics, gpu=gpu, replica=replica)
        for name in adapters:
            backend.registry.load(name, name)
        await backend.engine.start()
        link = None if replica is None else replica.link(lambda: (backend.engine.num_waiting, 0))
        try:
            if link is not None:
                await asyncio.to_thread(link.start, 30.0)
            yield cls(backend, metrics)
        finally:
            if link is not None:
                link.close()
            await backend.engine.drain(0.0)
            backend.close()
        assert not backend.engine.is_dead, "the engine failed"

    async def run(
        self,
        request: Request,
        *,
        cancel_after: int | None = None,
        on_token: Callable[[int], None] = lambda count: None,
    ) -> Answer:
        """Run a request to its end.

        Args:
            request: The request.
            cancel_after: The number of tokens after which to cancel.
            on_token: Called with the number of tokens so far.
        """
        stream = await self.engine.submit(request)
        tokens: list[int] = []
        logprobs: list[TokenLogprob] = []
        prompt: list[TokenLogprob] = []
        text = ""
        finish: Finish | None = None
        pooled: tuple[float, ...] | None = None
        head: Head | None = None
        async for output in stream:
            tokens += output.token_ids
            logprobs += output.logprobs
            prompt += output.prompt_logprobs
            text += output.text
            finish = output.finish or finish
            head = output.head or head
            pooled = pooled if output.pooled is None else tuple(output.pooled)
            on_token(len(tokens))
            if cancel_after is not None and len(tokens) >= cancel_after:
                stream.cancel()
        assert finish is not None
        return Answer(
            tuple(tokens),
            tuple(item.logprob for item in logprobs),
            tuple(tuple((t.token_id, t.logprob) for t in item.top) for item in logprobs),
            tuple(item.logprob for item in prompt),
            text,
            finish,
            pooled,
            head,
        )

    async def vocabulary_of(self, *adapters: Asked) -> Vocabulary:
        """The vocabulary of requests with these adapters."""
        weights = [AdapterWeight(name=ref.name) for ref in refs_of(*adapters)]
        return await self.backend.vocabularies.of(weights)

    async def run_all(self, requests: Sequence[Request]) -> list[Answer]:
        """Run requests concurrently."""
        return list(await asyncio.gather(*(self.run(request) for request in requests)))

    def leave_blocks(self, count: int) -> None:
        """Reduce the KV cache to so many blocks; ``--kv-cache-bytes`` cannot ask for so few."""
        blocks = self.engine._loop._scheduler.blocks
        blocks.num_blocks = count
        for block in list(blocks._free)[count - 1 :]:
            del blocks._free[block]

    async def run_together_and_alone(self, requests: Sequence[Request]) -> list[Answer]:
        """Run requests concurrently, and check that each has the same bits when it runs alone."""
        together = await self.run_all(requests)
        for request, answer in zip(requests, together, strict=True):
            assert (await self.run(request)).bits == answer.bits, request.adapters
        return together
