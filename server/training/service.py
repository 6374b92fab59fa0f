"""Adapters in training on the base that is served."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch

from turret.server.adapters.adapter import CONFIG_FILE, TENSORS_FILE, AdapterRef
from turret.server.adapters.device import ProjectionLayout, StepStore
from turret.server.adapters.operators.vocabulary import HEAD
from turret.server.adapters.registry import AdapterRegistry
from turret.server.adapters.state_dir import UploadedFile
from turret.server.basics.files import reporting_disk_faults
from turret.server.basics.turns import FairPool
from turret.server.basics.work import work_in_background
from turret.server.engine.engine import Engine
from turret.server.errors import (
    AdapterInUseError,
    AdapterNotFoundError,
    BudgetExceededError,
    InvalidRequestError,
    UnavailableError,
)
from turret.server.metrics import Metrics
from turret.server.models.decoding.decoder import Decoder
from turret.server.training import (
    LOSSES,
    METHODS,
    TARGETS,
    AdamParams,
    Datum,
    DatumLoss,
    LearnerConfig,
    Loss,
    Published,
)
from turret.server.training.learner import Learner, Leaves, add_gradients, new_adapter, num_bytes
from turret.server.training.training_pass import Segment, TrainingPass
from turret.server.words import say

T = TypeVar("T")
# The maximum number of tokens in a pass, and in a chunk: consecutive sequences of one adapter. The
# soft tokens before each sequence count too. A longer sequence is a separate chunk. While requests
# run, a pass is no larger than a chunk, so that steps of requests run often. Chunks depend only on
# the lengths of an adapter's own sequences, so its gradients are added in a fixed order, whatever
# else is in the passes.
PASS_TOKENS, CHUNK_TOKENS = 512, 128
_READ_BYTES = 1 << 20
_MAX_ALPHA = 1e6
_SHOWN_CHARS = 40


@dataclass(slots=True, eq=False)
class _Work:
    """Sequences of one adapter that wait for their passes.

    Attributes:
        owner: The client.
        chunks: The sequences that are computed together, in order.
        leaves: Collect the gradients until all chunks are done.
        num_begun: The number of chunks that have been in a pass.
        num_queued: The number of tokens in the remaining chunks.
        results: The results so far.
    """

    owner: str
    learner: Learner
    leaves: Leaves
    chunks: Sequence[Sequence[Datum]]
    loss: Loss
    settings: Mapping[str, float]
    has_grad: bool
    done: asyncio.Future[None]
    num_queued: int
    num_begun: int = 0
    results: list[DatumLoss] = field(default_factory=list)


class TrainingService:
    """Trains adapters, identified by ids that are never reused. Use it on the event loop.

    Calls for the same adapter must not overlap. Calls for different adapters run together.

    Args:
        engine: Runs the passes between steps of requests.
        decoder: The base model.
        layout: The shape of its projections.
        store: Holds the adapters of requests, and of passes.
        registry: Describes the base, and registers published adapters.
        max_rank: The highest rank.
        max_bytes: The memory for all adapters in training. A named owner may have half of it.
        metrics: The metrics of the server.
    """

    def __init__(
        self,
        engine: Engine,
        decoder: Decoder,
        layout: ProjectionLayout,
        store: StepStore,
        registry: AdapterRegistry,
        *,
        max_rank: int,
        max_bytes: int,
        metrics: Metrics,
    ) -> None:
        self._max_rank, self._max_bytes = max_rank, max_bytes
        self._engine = engine
        self._decoder = decoder
        self._layout = layout
        self._store = store
        self._registry = registry
        self._metrics = metrics
        self._learners: dict[int, Learner] = {}
        # The bytes of adapters in training, by owner, and those of each adapter.
        self._used: Counter[str] = Counter()
        self._reserved: dict[int, tuple[str, int]] = {}
        self._ids = itertools.count(1)
        self._waiting: list[_Work] = []
        # How many tokens each owner has trained. The owner with the fewest is next; ``_clock`` is
        # the count of the owner that had the last turn.
        self._trained: Counter[str] = Counter()
        self._clock = 0
        self._runner: asyncio.Task[None] | None = None
        self._thread = FairPool(
            ThreadPoolExecutor(1, thread_name_prefix="training", initializer=work_in_background)
        )

    async def _in_background(self, adapter_id: int, work: Callable[[], T]) -> T:
        """Run work that does not need the engine, on the thread for optimizers."""
        return await self._thread.run(self._reserved[adapter_id][0].encode(), work)

    async def _on_engine(self, work: Callable[[Callable[[], None]], T]) -> T:
        return await asyncio.wrap_future(self._engine.run_background(work))

    def _unload(self, name: str) -> None:
        with contextlib.suppress(AdapterNotFoundError, AdapterInUseError):
            self._registry.unload(name, "FORCE")

    async def create(self, config: LearnerConfig, owner: str = "") -> int:
        """Create an adapter, and return its id.

        Args:
            config: Its config.
            owner: The client, which may have half of the memory; empty if all callers count as one
                client.

        Raises:
            InvalidRequestError: The config is not supported.
            BudgetExceededError: There is no memory for it.
        """
        if config.method not in METHODS:
            why = say("NOT_ONE_OF", value=config.method, choices=", ".join(METHODS))
            raise InvalidRequestError.of("method", why)
        if not 1 <= config.rank <= self._max_rank:
            why = say("NOT_IN_RANGE", least=1, most=self._max_rank, value=config.rank)
            raise InvalidRequestError.of("rank", why)
        if config.alpha is not None and not 0 < config.alpha <= _MAX_ALPHA:
            why = say("NOT_IN_RANGE", least=0, most=_MAX_ALPHA, value=config.alpha)
            raise InvalidRequestError.of("alpha", why)
        modules = self._modules(config)
        if not modules:
            raise InvalidRequestError.of("train_attn", say("NOTHING_TO_TRAIN"))
        if config.seed is None:
            config = replace(config, seed=secrets.randbits(62))
        adapter_id = next(self._ids)

        def make() -> Learner:
            base = self._registry.base
            return Learner(*new_adapter(config, modules, base), base)

        # Run num_bytes on a thread: it takes time for each module, and its first call also imports
        # parts of torch.
        size = await asyncio.to_thread(num_bytes, config, modules, self._registry.base)
        self._reserve(adapter_id, owner, size)
        try:
            self._learners[adapter_id] = await self._in_background(adapter_id, make)
        except BaseException:
            self._release(adapter_id)
            raise
        return adapter_id

    def _reserve(self, adapter_id: int, owner: str, needed: int) -> None:
        most = self._max_bytes // 2 if owner else self._max_bytes
        used = self._used[owner] if owner else self._used.total()
        if needed + used > most or needed + self._used.total() > self._max_bytes:
            both = {"all_used": self._used.total(), "training_bytes": self._max_bytes}
            text = say("TRAINING_FULL", bytes=needed, used=used, most=most, **both)
            raise BudgetExceededError(text)
        self._used[owner] += needed
        self._reserved[adapter_id] = owner, needed
        self._count_adapters()

    def _release(self, adapter_id: int) -> None:
        owner, held = self._reserved.pop(adapter_id)
        self._used[owner] -= held
        if not self._used[owner]:
            del self._used[owner]
            del self._trained[owner]
        self._count_adapters()

    def _count_adapters(self) -> None:
        count, total = len(self._reserved), self._used.total()
        self._metrics.training_adapters.set(count)
        self._metrics.training_bytes.labels("adapters").set(total)

    def _modules(self, config: LearnerConfig) -> list[str]:
        wanted = {
            "qkv": config.attention,
            "o": config.attention,
            "gate_up": config.mlp,
            "down": config.mlp,
        }
        known = {
            shape.path.rpartition(".")[2]: projection
            for projection, shapes in self._layout.projections.items()
            for shape in shapes
        }
        for index, name in enumerate(config.targets):
            if name not in known:
                why = say("NOT_ONE_OF", value=name[:_SHOWN_CHARS], choices=", ".join(known))
                raise InvalidRequestError.of(f"targets[{index}]", why)
        targets = config.targets or [name for name in known if wanted.get(known[name])]
        modules = [
            self._layout.module(layer, shape.path)
            for layer in range(self._layout.num_layers)
            for shapes in self._layout.projections.values()
            for shape in shapes
            if shape.path.rpartition(".")[2] in targets
        ]
        return [*modules, HEAD] if config.unembed else modules

    async def drop(self, adapter_id: int) -> None:
        """Forget an adapter, and end its pass. Unknown ids are ignored."""
        learner = self._learners.pop(adapter_id, None)
        if learner is not None:
            self._release(adapter_id)
            for work in self._waiting:
                if work.learner is learner:
                    self._end(work, UnavailableError(say("TRAINING_ENDED")))
            await self._on_engine(lambda between: self._store.drop(learner.served.key))

    async def pass_over(
        self,
        adapter_id: int,
        data: Sequence[Datum],
        loss: str,
        config: Mapping[str, float],
        *,
        is_forward_only: bool = False,
    ) -> list[DatumLoss]:
        """Compute the losses, and add their gradients to those since the last step.

        Args:
            adapter_id: The id of the adapter.
            data: Sequences of at most ``MAX_SEQUENCE_TOKENS``, whose tokens are in the vocabulary
                and whose inputs are finite. A long list is divided into passes.
            loss: A name in ``LOSSES``.
            config: Settings of the loss. Missing ones have their defaults.
            is_forward_only: Whether to compute no gradients.

        Raises:
            InvalidRequestError: A sequence is too long for the model with the adapter's soft
                tokens.
            UnavailableError: The adapter was dropped meanwhile, or the server is shutting down.
        """
        if not data:
            return []
        learner = self._learners[adapter_id]
        num_soft = learner.num_soft_tokens
        most = self._decoder.arch.max_model_len - num_soft
        for index, datum in enumerate(data):
            if len(datum.tokens) > most:
                length = len(datum.tokens)
                text = say("PROMPT_TOO_LONG", length=length, limit=most, unit="tokens")
                raise InvalidRequestError.of(f"data[{index}]", text)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        work = _Work(
            self._reserved[adapter_id][0],
            learner,
            learner.fresh_leaves(),
            _chunks(data, num_soft),
            LOSSES[loss],
            {**LOSSES[loss].settings, **config},
            has_grad=not is_forward_only,
            done=done,
            num_queued=_num_tokens(data, num_soft),
        )
        # An owner gets no additional turns for the time in which it had no work.
        self._trained[work.owner] = max(self._trained[work.owner], self._clock)
        self._waiting.append(work)
        self._count_queued()
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run())
        await done
        return work.results

    async def _run(self) -> None:
        """Run passes until nothing waits. Each pass contains chunks of as many adapters as fit."""
        while self._waiting:
            batch = self._next_batch()
            self._count_queued()
            await self._run_batch(batch)
            self._waiting = [work for work in self._waiting if not work.done.done()]
        self._count_queued()

    def _count_queued(self) -> None:
        self._metrics.training_queued_tokens.set(sum(each.num_queued for each in self._waiting))

    async def _run_batch(self, batch: Sequence[tuple[_Work, Sequence[Datum]]]) -> None:
        """Run a pass.

        If the pass fails, run it again for each adapter separately, so that only the adapters at
        fault fail.
        """
        works = dict.fromkeys(work for work, _ in batch)
        try:
            await self._on_engine(functools.partial(self._pass, batch))
        except Exception as error:
            if len(works) > 1:
                for work in works:
                    if not work.done.done():
                        await self._run_batch([each for each in batch if each[0] is work])
                return
            self._end(batch[0][0], error)
        finally:
            self._metrics.training_bytes.labels("activations").set(0)
        for work in works:
            if work.num_begun == len(work.chunks):
                self._end(work)

    @staticmethod
    def _end(work: _Work, error: Exception | None = None) -> None:
        """Report the end of work, unless its adapter was dropped meanwhile."""
        if work.done.done():
            return
        if error is None:
            work.done.set_result(None)
        else:
            work.done.set_exception(error)

    def _next_batch(self) -> list[tuple[_Work, Sequence[Datum]]]:
        """The chunks of the next pass; all or none compute gradients.

        This is fair queueing by trained tokens (see ``_trained``): each turn goes to the owner with
        the fewest. The adapters of an owner take turns.
        """
        batch: list[tuple[_Work, Sequence[Datum]]] = []
        # The sort keeps the order of an owner's adapters, which take turns.
        self._waiting.sort(key=lambda work: self._trained[work.owner])
        first = self._waiting[0]
        self._clock = self._trained[first.owner]
        left = CHUNK_TOKENS if self._engine.num_open else PASS_TOKENS
        while True:
            served: set[str] = set()
            for work in list(self._waiting):
                is_due = work.owner not in served and work.has_grad == first.has_grad
                if is_due and work.num_begun < len(work.chunks):
                    chunk = work.chunks[work.num_begun]
                    size = _num_tokens(chunk, work.learner.num_soft_tokens)
                    if size <= left or not batch:
                        work.num_begun += 1
                        work.num_queued -= size
                        batch.append((work, chunk))
                        left -= size
                        served.add(work.owner)
                        self._trained[work.owner] += size
                        # This adapter is the last of its owner in the next turn.
                        self._waiting.remove(work)
                        self._waiting.append(work)
            if not served:
                return batch

    def _pass(
        self, batch: Sequence[tuple[_Work, Sequence[Datum]]], between: Callable[[], None]
    ) -> None:
        """Run one pass on the engine thread."""
        device = self._decoder.device
        segments = [
            Segment(
                work.learner.served, work.learner.fresh_leaves(device), [d.tokens for d in chunk]
            )
            for work, chunk in batch
        ]
        results: list[list[DatumLoss]] = []
        with torch.no_grad():
            training_pass = TrainingPass(
                self._decoder,
                self._layout,
                self._store,
                segments,
                _when_done(between, device),
            )
            training_pass.forward()
            self._metrics.training_bytes.labels("activations").set(training_pass.num_bytes)
            grad = torch.zeros(training_pass.hidden.shape, device=device)
            for number, (work, chunk) in enumerate(batch):
                inputs = {
                    name: torch.cat([datum.inputs[name] for datum in chunk]).to(device)
                    for name in (TARGETS, *work.loss.inputs)
                }
                logprobs, losses, grad[training_pass.rows[number]] = training_pass.targets(
                    number,
                    inputs[TARGETS],
                    functools.partial(_loss_of, work, inputs),
                    has_grad=work.has_grad,
                )
                lengths = [len(datum.tokens) for datum in chunk]
                pairs = zip(logprobs.cpu().split(lengths), losses.cpu().split(lengths), strict=True)
                results.append([DatumLoss(*pair) for pair in pairs])
            if batch[0][0].has_grad:
                training_pass.backward(grad)
        self._metrics.training_tokens.inc(len(training_pass.hidden))
        for (work, _), segment, datum_losses in zip(batch, segments, results, strict=True):
            work.results += datum_losses
            add_gradients(work.leaves, segment.leaves)
        for work in {work for work, _ in batch}:
            if work.num_begun == len(work.chunks):
                add_gradients(work.learner.leaves, work.leaves)

    async def step(self, adapter_id: int, adam: AdamParams) -> dict[str, float]:
        """Apply an optimizer step, after which the gradients are zero; returns metrics."""
        learner = self._learners[adapter_id]
        result = await self._renewing(adapter_id, functools.partial(learner.step, adam))
        self._metrics.training_steps.inc()
        return result

    async def _renewing(self, adapter_id: int, change: Callable[[], T]) -> T:
        """Change an adapter's tensors, then drop the former ones from the store."""
        before = self._learners[adapter_id].served.key
        try:
            return await self._in_background(adapter_id, change)
        finally:
            # The caller need not wait until the engine has time for this.
            self._engine.run_background(lambda between: self._store.drop(before))

    async def save(self, adapter_id: int, folder: Path, *, with_optimizer: bool) -> None:
        """Write ``adapter_config.json`` and ``adapter_model.safetensors``, and the optimizer."""
        learner = self._learners[adapter_id]
        await asyncio.to_thread(learner.save, folder, with_optimizer=with_optimizer)

    async def load(self, adapter_id: int, folder: Path, *, with_optimizer: bool) -> None:
        """Continue from the files of ``save``. The config must be the same."""
        learner = self._learners[adapter_id]
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if config != learner.config:
            raise InvalidRequestError.of("path", say("OTHER_ADAPTER_CONFIG"))

        load = functools.partial(learner.load, folder, with_optimizer=with_optimizer)
        await self._renewing(adapter_id, load)

    async def publish(self, adapter_id: int, name: str) -> Published:
        """Register the current tensors, as a new generation of the name's adapter, for sampling."""
        learner = self._learners[adapter_id]

        num_bytes = sum(each.nbytes for each in learner.parameters.values())
        announced = [UploadedFile(TENSORS_FILE, num_bytes)]
        staged = await asyncio.to_thread(self._registry.stage, announced)
        folder = staged.directory

        def register(digest: str) -> Published:
            size = sum(path.stat().st_size for path in folder.iterdir())
            info = self._registry.publish(name, learner.loaded(digest, size), staged)
            return Published(info.generation, size)

        try:
            # Hashing takes about as long as writing, so do both at once.
            with reporting_disk_faults():
                digest, _ = await asyncio.gather(
                    asyncio.to_thread(learner.digest),
                    asyncio.to_thread(learner.save, folder, with_optimizer=False),
                )
            return await asyncio.to_thread(register, digest)
        finally:
            await asyncio.to_thread(staged.discard)

    async def serve(self, folder: Path, name: str) -> Published:
        """Register the files of ``save`` under an adapter's name, for sampling.

        Raises:
            AdapterCheckpointError: The files are not those of an adapter.
        """
        paths = [folder / each for each in (CONFIG_FILE, TENSORS_FILE)]

        def run() -> Published:
            announced = [UploadedFile(path.name, path.stat().st_size) for path in paths]
            staged = self._registry.stage(announced)
            try:
                for path in paths:
                    with path.open("rb") as file:
                        while content := file.read(_READ_BYTES):
                            staged.write(path.name, content)
                staged.finish()
                replace = self._registry.find(AdapterRef(name=name)) is not None
                info = self._registry.upload(name, staged, replace=replace)
                return Published(info.generation, sum(file.size_bytes for file in announced))
            finally:
                staged.discard()

        return await asyncio.to_thread(run)

    async def withdraw(self, name: str) -> None:
        """Unregister a name of ``publish`` or ``serve``, and end the requests that use it.

        Unknown names are ignored.
        """
        # Requests that still use the adapter belong to a sampler that has ended.
        await asyncio.to_thread(self._unload, name)


def _when_done(between: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Let requests run only when the device has done its work, because its time is shared too."""
    if device.type != "cuda":
        return between

    def run() -> None:
        torch.cuda.synchronize(device)
        between()

    return run


def _num_tokens(data: Sequence[Datum], num_soft: int) -> int:
    """The number of tokens of sequences, each after the soft tokens."""
    return sum(num_soft + len(datum.tokens) for datum in data)


def _chunks(data: Sequence[Datum], num_soft: int) -> list[list[Datum]]:
    chunks: list[list[Datum]] = []
    left = 0
    for datum in data:
        size = _num_tokens([datum], num_soft)
        if size > left:
            chunks.append([])
            left = CHUNK_TOKENS
        chunks[-1].append(datum)
        left -= size
    return chunks


def _loss_of(
    work: _Work, inputs: Mapping[str, torch.Tensor], rows: slice, logprobs: torch.Tensor
) -> torch.Tensor:
    of_rows = {name: tensor[rows] for name, tensor in inputs.items()}
    return work.loss.of(logprobs, of_rows, work.settings)
