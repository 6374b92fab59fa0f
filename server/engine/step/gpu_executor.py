"""The gpu path: steps as Triton kernels, decode steps as CUDA graphs.

All metadata of a step goes to the device before its first kernel, in one copy, or in two if the
adapters of its rows have changed. Nothing waits for the device until the sampler reads the tokens.
A step with first passes (X-LoRA) consists of two steps, neither of which is captured.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from turret.server.adapters.adapter import Mix
from turret.server.adapters.device import Resident
from turret.server.adapters.device.gpu_pack import StepForm
from turret.server.adapters.device.gpu_store import GpuAdapterStep, GpuStore
from turret.server.adapters.device.gpu_uploads import empty_cache
from turret.server.adapters.device.vocabulary import VocabularyGroup
from turret.server.adapters.operators.gate import Gate
from turret.server.adapters.operators.low_rank import LowRank
from turret.server.adapters.operators.vectors import Gain
from turret.server.basics.work import OnProgress, is_out_of_memory
from turret.server.engine.scheduling.request import Request
from turret.server.engine.scheduling.sequence import Scheduled, Sequence, Step
from turret.server.engine.step import (
    Placed,
    StepRows,
    StepScalings,
    added_logits,
    changed_rows,
    collect_decode_rows,
    collect_rows,
    decode_spans,
    runs_of,
    scalings_of,
    scalings_of_rows,
)
from turret.server.engine.step.gpu_sampler import GpuSampler
from turret.server.engine.step.gpu_tables import (
    AttentionWords,
    BlockTables,
    BlockUpdates,
    StepTables,
)
from turret.server.engine.step.runner import Computed, Executor, fill_prefix, sampled_rows
from turret.server.models.decoding.gpu_decoder import GpuDecoder, GpuStep
from turret.server.models.decoding.layer_ops import KvCache

_log = logging.getLogger(__name__)

# Hidden states and logits of a step. Their addresses stay the same, and a replay overwrites them.
Outputs = tuple[torch.Tensor, torch.Tensor]
StepBody = Callable[[], Outputs]
# The kind of a step, its form, and the addresses of its tables.
GraphKey = Any

_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
_LARGE_BUCKET = 64
# A step is captured when it occurs for the eighth time within a window of steps. After a failed
# capture, a whole window passes before the next attempt. After three consecutive failures for
# reasons other than memory, there are no more attempts.
SIGHTS, WINDOW, _MAX_FAILURES = 8, 256, 3


# Decode steps as CUDA graphs: captured once per shape of step, and replayed after that.
#
# A step's launches, its *body*, depend on its kind and its form; everything else is data in
# buffers of fixed address. Its *kind* is its bucket (the number of rows, rounded up), and whether
# its embeddings are computed before it. Its *form* is the set of its adapters' operators
# (``StepForm``). A step can run in a captured form that is larger than its own, because kernels
# that it does not need find empty tables. Common shapes are captured at startup. Other shapes are
# launched kernel by kernel, and are captured once they occur often. If there are too many graphs,
# the least recently used one is dropped.


class Capture(Protocol):
    """How bodies are captured."""

    def __call__(self, body: StepBody) -> tuple[Callable[[], None], Outputs]:
        """Capture a body without running it.

        Returns:
            A function that replays the body, and the tensors that will contain its results.
        """
        ...

    def forget(self) -> None:
        """Record that every captured graph has been dropped."""
        ...


def buckets(max_rows: int) -> tuple[int, ...]:
    """Row counts that decode steps are padded to; the last one is ``max_rows``."""
    sizes = [size for size in _BUCKETS if size < max_rows]
    sizes += range(2 * _LARGE_BUCKET, max_rows, _LARGE_BUCKET)
    return (*sizes, max_rows)


class CudaCapture:
    """Captures with one memory pool for all graphs that are alive, of which one runs at a time.

    The pool also holds the workspace of cuBLAS. Since torch 2.12, dropping any graph frees the
    workspace, but its memory stays in the pool. So the other graphs can still use it.

    Args:
        device: Where the bodies run.
    """

    def __init__(self, device: torch.device) -> None:
        # Kernels in a graph keep the priority of the stream on which they were captured, so this
        # stream has the high priority of ``StepStream``. No other stream has it.
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._pool: Any = None

    def __call__(self, body: StepBody) -> tuple[Callable[[], None], Outputs]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream()
        # During a capture, other threads may use the device, for example to load adapters.
        capturing = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        try:
            # Without this, a capture that fails would leave its stream as the current one.
            with torch.cuda.stream(before), capturing:
                outputs = body()
        except RuntimeError:
            # The failed graph does not return the workspace, and its pool is never used again.
            torch._C._cuda_clearCublasWorkspaces()
            raise
        return graph.replay, outputs

    def forget(self) -> None:
        """Use a new pool for the next capture.

        torch 2.11 cannot capture again into a pool that still holds memory but no graph.
        """
        self._pool = None


def capture_for(device: torch.device) -> Capture | None:
    """How steps are captured on a device; None where there are no graphs."""
    return CudaCapture(device) if device.type == "cuda" else None


class DecodeGraphs:
    """The captured steps. Not thread-safe.

    Args:
        capture: Captures a body; None runs every step uncaptured.
        capacity: Maximum number of graphs.
        on_off: Called if there will be no more captures, so that steps stay slow.
    """

    def __init__(
        self,
        capture: Capture | None,
        capacity: int = 128,
        on_off: Callable[[], None] = lambda: None,
    ) -> None:
        self._capture = capture
        self._on_off = on_off
        self._capacity = capacity
        self._epoch: Hashable = None
        self._step = self._resumes = self._failures = 0
        # Key → the numbers of the latest steps that had it.
        self._seen: dict[GraphKey, deque[int]] = {}
        # Kind → the number of the first recent step without a suitable graph, and the joint form of
        # all such steps.
        self._missing: dict[Hashable, tuple[int, frozenset[Any]]] = {}
        # The graph that was used last comes last.
        self._graphs: OrderedDict[GraphKey, tuple[Callable[[], None], Outputs]] = OrderedDict()

    def run(self, epoch: Hashable, key: GraphKey, body: StepBody) -> Outputs:
        """Run a step, captured if possible.

        Args:
            epoch: Changes when a tensor that bodies read has moved, which makes all graphs invalid.
            key: Identifies the launches of the body: kind, form (see ``form_for``), addresses.
            body: The step; it reads and writes at fixed addresses only.
        """
        if self._capture is None:
            return body()
        self._enter(epoch)
        is_due = self._is_due(key)
        if key in self._graphs:
            self._graphs.move_to_end(key)
        elif not is_due or not self._add(self._capture, key, body):
            return body()
        replay, outputs = self._graphs[key]
        replay()
        return outputs

    def form_for(self, kind: Hashable, own: frozenset[Any]) -> frozenset[Any]:
        """The form in which to run a step, chosen so that a few graphs suffice for all steps.

        This is the smallest captured form that includes the step's own form, or else a joint form
        of all recent steps without a captured form. If steps are not captured, it is the step's
        own.

        Args:
            kind: The kind of the step, which is the first part of its key.
            own: The step's own form.
        """
        if self._capture is None:
            return own
        wider = [form for of, form, _ in self._graphs if of == kind and form >= own]
        if wider:
            return min(wider, key=len)
        since, union = self._missing.get(kind, (self._step, own))
        if self._step - since >= WINDOW:
            since, union = self._step, own
        self._missing[kind] = since, union | own
        return union | own

    def prepare(self, epoch: Hashable, key: GraphKey, body: StepBody) -> None:
        """Capture a step before it is needed. Runs it uncaptured once, which compiles its kernels.

        Args:
            epoch: See ``run``.
            key: See ``run``.
            body: The step, on data that may be overwritten.
        """
        if self._capture is None:
            return
        self._enter(epoch)
        body()
        # Do not capture so many steps that the first ones are dropped.
        if key not in self._graphs and len(self._graphs) < self._capacity:
            self._add(self._capture, key, body)

    def drop(self) -> None:
        """Forget all graphs and give their memory back."""
        self._graphs.clear()
        if self._capture is not None:
            self._capture.forget()

    def _enter(self, epoch: Hashable) -> None:
        if epoch != self._epoch:
            self.drop()
            self._seen.clear()
            self._epoch = epoch

    def _is_due(self, key: GraphKey) -> bool:
        """Record that a key occurs in this step; returns whether the step should be captured."""
        self._step += 1
        if len(self._seen) > 8 * self._capacity:
            self._seen.clear()
        sights = self._seen.setdefault(key, deque(maxlen=SIGHTS))
        sights.append(self._step)
        is_common = len(sights) == SIGHTS and self._step - sights[0] < WINDOW
        return is_common and self._step >= self._resumes

    def _add(self, capture: Capture, key: GraphKey, body: StepBody) -> bool:
        """Capture a body; returns whether it worked.

        If memory ran out, all other graphs have been dropped.
        """
        try:
            self._graphs[key] = capture(body)
        except RuntimeError as error:
            self.drop()
            self._resumes = self._step + WINDOW
            if is_out_of_memory(error):
                _log.warning("no memory to capture a decode step; all CUDA graphs were dropped")
                return False
            self._failures += 1
            _log.exception("a decode step could not be captured; continuing without CUDA graphs")
            if self._failures == _MAX_FAILURES:
                self._capture = None
                self._on_off()
            return False
        self._failures = 0
        # Drop a graph only after the capture, so that the pool stays in use.
        if len(self._graphs) > self._capacity:
            self._graphs.popitem(last=False)
        return True


# Compiles kernels for NVIDIA GPUs that this machine may lack, into Triton's cache.
#
# Triton identifies compiled code by its own version, the source of the kernel, the types and
# alignments of the arguments, the options of the launch, and the GPU's compute capability. So a
# launch with meta tensors, and a driver that only knows the capability, compile what the same
# launch on the GPU needs.


class Target:
    """The part of Triton's driver that a launch uses before it runs the kernel.

    Args:
        capability: The compute capability, for example 90 for 9.0.
    """

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        # Triton remembers the code that it has compiled for each device.
        return self._capability

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launches(launches: Callable[[], None], capability: int) -> None:
    """Compile the kernels that ``launches`` launches, on all cores, and launch none of them.

    Afterwards, the process cannot use a GPU.

    Args:
        launches: Launches kernels on meta tensors.
        capability: See ``Target``.
    """
    kernels: Any = JITFunction
    run = kernels.run

    def compiled(function: Any, *args: Any, warmup: bool, **keywords: Any) -> Any:
        return run(function, *args, warmup=True, **keywords)

    target: Any = Target(capability)
    driver.set_active(target)
    kernels.run = compiled
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool):
            launches()
    finally:
        kernels.run = run


# Startup on a CUDA device, before the first request.
#
# The memory is divided according to the needs of the largest step. Kernels are compiled and decode
# steps are captured, so that no request waits for that.


# Default share of adapters in the memory that the model leaves free.
_ADAPTER_SHARE = 1 / 7
# Share of the device's memory for captured steps, libraries, gaps between allocations, and a
# merge's second copy of a projection.
_SPARE_SHARE = 0.05


def adapter_bytes(device: torch.device) -> int:
    """Default budget for adapters, in bytes; call this after the model has been loaded."""
    return int(_ADAPTER_SHARE * torch.cuda.mem_get_info(device)[0])


def spare_bytes(device: torch.device) -> int:
    """The device memory that the plan leaves free, in bytes."""
    return int(_SPARE_SHARE * torch.cuda.mem_get_info(device)[1])


def largest_step(num_tokens: int, num_seqs: int, block_size: int) -> Step:
    """A step of prompts with as many rows and as many samples as a step may have.

    One prompt is as long as possible, because the products of short ones need less memory. All
    sequences use KV block 1, and none uses an adapter.
    """
    num_seqs = min(num_seqs, num_tokens)
    scheduled = []
    for i in range(num_seqs):
        length = 1 if i else num_tokens - num_seqs + 1
        request = Request(request_id=f"rehearsal {i}", prompt_token_ids=(0,) * length)
        sequence = Sequence(request, Mix(()), 0.0)
        sequence.blocks = [1] * -(-length // block_size)
        scheduled.append(Scheduled(sequence, length))
    return Step(tuple(scheduled), (), 0)


def measure(work: Callable[[], object], device: torch.device) -> int:
    """The peak of the device memory that a step or a training pass needs, in bytes.

    The memory that torch's allocator has cached is freed afterwards.
    """
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    taken = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    return taken


def warm_up(executor: GpuExecutor, progress: OnProgress) -> None:
    """Compile the kernels of steps and capture the common decode steps.

    Kernels that only some adapters need (LoHa, LoKr, experts) are compiled when such an adapter is
    loaded; see ``GpuStore.admit``. If memory runs out, the server continues with fewer captured
    steps.

    Args:
        executor: An executor that has a sampler and has not computed anything yet.
        progress: Called before each form with a description and the progress.
    """
    forms = executor.forms()
    try:
        compile_steps(executor, progress)
        with torch.inference_mode():
            for number, (bucket, low_rank) in enumerate(forms):
                progress("Capturing decode steps", number, len(forms))
                executor.capture(bucket, low_rank)
            progress("Capturing decode steps", len(forms), len(forms))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        _log.warning("no memory to capture all decode steps at startup")
        executor.free_memory()


def compile_steps(executor: GpuExecutor, progress: OnProgress) -> None:
    """The first part of ``warm_up``: launch every kernel of steps."""
    packed = executor.packed_forms()
    with torch.inference_mode():
        for number, form in enumerate(packed):
            progress("Compiling", number, len(packed))
            executor.compile(form)
    progress("Compiling", len(packed), len(packed))


@dataclass(frozen=True, slots=True)
class Bound:
    """How the rows of a decode step use adapters; kept until their mixes or the store change.

    Attributes:
        mixes: The mix of every row. A reference is kept so that no later mix has the same id.
        adapters: The adapters that the store was asked to hold.
        version: The store's version when the tables were loaded.
        step: The tables; None if no row uses an adapter.
        embeddings: Rows whose embeddings adapters change.
        heads: Rows whose heads adapters change.
    """

    mixes: tuple[Mix, ...]
    adapters: tuple[Resident, ...]
    version: int
    step: GpuAdapterStep | None
    embeddings: list[VocabularyGroup]
    heads: list[VocabularyGroup]


@dataclass(frozen=True, slots=True)
class Prepared:
    """The part of a decode step that does not depend on the tokens of the step before.

    Attributes:
        sequences: The step's sequences, with one row each.
        computed: The number of tokens of each sequence in the cache before the step.
        begins: Where the block numbers of each sequence begin on the device.
        positions: The position of every row.
        attention: The metadata for attention.
        numbers: The sampling parameters; empty without a sampler.
    """

    sequences: list[Sequence]
    computed: list[int]
    begins: list[int]
    positions: list[int]
    attention: AttentionWords
    numbers: list[float]

    def fits(self, sequences: list[Sequence], begins: list[int]) -> bool:
        """Whether this was prepared for these sequences in their current state."""
        if self.sequences != sequences or self.begins != begins:
            return False
        return self.computed == [sequence.num_computed for sequence in sequences]


# The rows of prompts with at most this many positions are multiplied like decoding rows.
_SHORT_PROMPT = 64


def generates(sequence: Sequence) -> bool:
    """Whether a sequence's only new row is that of its last generated token."""
    return sequence.prompt_end <= sequence.num_computed == len(sequence.tokens) - 1


def in_order(items: SequenceOf[Scheduled]) -> list[Placed]:
    """Place the items in rows, those with ``is_fused`` before the others (see ``nf4_gpu.py``)."""
    placed, row = [], 0
    for item in sorted(items, key=lambda item: not is_fused(item)):
        placed.append(Placed(item, row))
        row += item.num_new
    return placed


def is_fused(item: Scheduled) -> bool:
    """Whether the item's rows go through ``nf4_matmul``: decoding rows, and short prompts.

    A step with any other row dequantises all weights, which takes longer than many decode steps and
    delays all of its rows. The length of the whole prompt decides, not that of the chunk, because
    chunks depend on the batch.
    """
    sequence = item.sequence
    return sequence.num_computed >= sequence.prompt_end or sequence.prompt_end <= _SHORT_PROMPT


class GpuExecutor(Executor[GpuDecoder, GpuStore]):
    """Computes steps on the gpu path.

    A step in which every sequence generates takes a fast path. It finds the tables of its adapters,
    which are loaded only if they have changed (``Bound``), and the inputs that were prepared while
    the step before ran (``Prepared``). Then it loads its rows, and replays a captured graph if
    there is one. Any other step loads all tables, and launches every kernel.

    Args:
        decoder: The model.
        cache: Its KV cache. Blocks are not cleared when they change owner, because the kernels read
            only positions that were written.
        store: The adapters.
        max_num_seqs: Maximum number of sequences in a step.
        max_num_batched_tokens: Maximum number of rows in a step.
        capture: Captures decode steps, or None to launch every kernel of every step.
        on_graphs_off: Called when no step is captured any more, because captures failed.
    """

    is_asynchronous = True

    def __init__(
        self,
        decoder: GpuDecoder,
        cache: KvCache,
        store: GpuStore,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        capture: Capture | None,
        on_graphs_off: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(decoder, cache, store)
        self._max_num_seqs = max_num_seqs
        self._buckets = buckets(max_num_seqs)
        self._graphs = DecodeGraphs(capture, on_off=on_graphs_off)
        self._sampler: GpuSampler | None = None
        device, max_len = decoder.device, decoder.arch.max_model_len
        self._blocks = BlockTables(max_num_seqs, -(-max_len // cache.block_size), device)

        def tables(max_rows: int) -> StepTables:
            return StepTables(
                decoder.arch,
                self._blocks,
                max_rows=max_rows,
                max_seqs=max_num_seqs,
                max_len=max_len,
                device=device,
            )

        self._decode, self._mixed = tables(max_num_seqs), tables(max_num_batched_tokens)
        self._every_row = torch.arange(max_num_seqs, device=device)
        # All decode steps share these outputs, because a captured step always writes to the same
        # addresses.
        size = (max_num_seqs, decoder.arch.vocab_size)
        self._logits = torch.empty(size, dtype=torch.float32, device=device)
        size = (max_num_seqs, decoder.arch.hidden_size)
        self._embedded = torch.empty(size, dtype=decoder.dtype, device=device)
        self._bound: Bound | None = None
        # The last step's sequences, if all of them may continue, and what was prepared for their
        # next step.
        self._last: list[Sequence] | None = None
        self._prepared: Prepared | None = None

    def sampler(self, stop_token_ids: frozenset[int]) -> GpuSampler:
        """Make the sampler; from now on every step draws as part of its launches."""
        device = self._decoder.device
        self._sampler = GpuSampler(stop_token_ids, self._max_num_seqs, device)
        return self._sampler

    def forms(self) -> list[tuple[int, frozenset[str]]]:
        """The decode steps to be captured at startup, the largest first.

        Returns:
            Buckets, each with the projections that have low-rank updates: none, PEFT's default
            ones, those of attention, and all.
        """
        projections = frozenset(self._decoder.arch.linears())
        kinds = [frozenset[str](), frozenset({"qkv"}), frozenset({"qkv", "o"}), projections]
        return [(bucket, kind) for bucket in reversed(self._buckets) for kind in kinds]

    def capture(self, bucket: int, low_rank: frozenset[str]) -> None:
        """Capture a decode step before it is needed.

        Args:
            bucket: The number of rows.
            low_rank: Projections in which its adapters have low-rank updates; none for a step of
                the base model alone.
        """
        form = frozenset((LowRank, name) for name in low_rank)
        inputs = self._padding(self._decode, form if low_rank else None, bucket)
        self._graphs.prepare(self._epoch(), self._key(inputs), self._body(self._decode, inputs))

    def compile(self, packed: StepForm | None) -> None:
        """Compile the kernels of all steps with these kinds of operators in the pack.

        Args:
            packed: The kinds, each with the projections that have it; None without adapters.
        """
        for bucket in self._buckets:
            self._body(self._decode, self._padding(self._decode, packed, bucket))()
        # Cover short prompts, and long ones, whose products come from a library, both alone and
        # together with decoding rows.
        most = min(_SHORT_PROMPT + 1, self._mixed.max_rows)
        few = min(32, most)
        for rows, num_decode in ((most, 0), (most, 1), (most, few), (few, few), (most, most)):
            inputs = self._padding(self._mixed, packed, rows, num_decode)
            self._body(self._mixed, inputs)()

    def packed_forms(self) -> list[StepForm | None]:
        """Every set of operators in the pack that a step can have; None is one without adapters."""
        names = self._decoder.arch.linears()
        sets = [(LowRank,), (Gain,), (LowRank, Gain), (LowRank, Gate), (LowRank, Gain, Gate)]
        forms = [frozenset((kind, name) for kind in kinds for name in names) for kinds in sets]
        return [None, *forms]

    def _padding(
        self, tables: StepTables, form: StepForm | None, rows: int, num_decode: int | None = None
    ) -> GpuStep:
        """A step with only padding, whose keys and values go to block 0, which is never read."""
        num_decode, adapters = rows if num_decode is None else num_decode, None
        if form is not None:
            with tables.adapters():
                adapters = self.store.bind((), tables, num_decode=num_decode, form=form)
        self._bound = None
        with tables.step():
            if self._sampler is not None:
                self._sampler.load((), tables.sampling)
            nothing = BlockUpdates([], [], [])
            loaded = tables.load_rows(StepRows(), (), nothing, tables.attention_words(()))
        inputs = self._decode_inputs(loaded, rows, adapters)
        samples = self._every_row[: min(rows, self._max_num_seqs)]
        return replace(
            inputs, num_decode=num_decode, attention=tables.attention, sample_rows=samples
        )

    def run(self, step: Step) -> Computed:
        try:
            return self._run(step)
        except BaseException:
            # The tables may not have been sent, so their content on the device is unknown.
            self._blocks.clear()
            self._bound = self._last = self._prepared = None
            raise

    def look_ahead(self) -> None:
        """Prepare the next step while the device computes this one.

        The next step is assumed to be a decode step of the same sequences, one token further. Any
        other step is prepared when it is scheduled.
        """
        if self._last is not None:
            sequences, begins = self._last, self._blocks.begins(self._last)
            self._prepared = self._prepare(sequences, begins, ahead=1)

    def forget(self, sequence: Sequence) -> None:
        """Drop the state that is kept for a sequence."""
        for each in sequence.passes:
            self._blocks.forget(each)
        self._last = self._prepared = None

    def free_memory(self) -> None:
        """Free captured steps, idle adapters and the memory that torch's allocator holds."""
        self._graphs.drop()
        self.store.drop_idle()
        empty_cache(self._decoder.device)

    def _run(self, step: Step) -> Computed:
        for sequence, start in step.presets:
            fill_prefix(self._cache, sequence, start)
        scheduled = step.scheduled
        scalings = scalings_of(step, self.store, self._decoder.device, self._run_first)
        is_decode = all(item.num_new == 1 and generates(item.sequence) for item in scheduled)
        if is_decode and not scalings:
            placed = tuple(map(Placed, scheduled, range(len(scheduled))))
            hidden, logits = self._run_decode([item.sequence for item in scheduled])
            added = added_logits(sampled_rows(placed), hidden, self._decoder, self.store)
            return Computed(placed, hidden, logits[: len(scheduled)], added)
        placed = in_order(scheduled)
        samples = [place.last_row for place in placed if place.samples]
        hidden, logits = self._run_mixed(placed, samples, scalings)
        if not samples:
            return Computed(tuple(placed), hidden, None)
        drawn = [(p.item.sequence, range(p.last_row, p.last_row + 1)) for p in placed if p.samples]
        added = added_logits(drawn, hidden, self._decoder, self.store)
        return Computed(tuple(placed), hidden, logits[: len(samples)], added)

    def _run_first(
        self, step: Step, scalings: StepScalings
    ) -> tuple[SequenceOf[Placed], torch.Tensor]:
        """Compute a step of first passes."""
        placed = in_order(step.scheduled)
        return placed, self._run_mixed(placed, [], scalings)[0]

    def _run_mixed(
        self, placed: list[Placed], samples: list[int], scalings: StepScalings
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a step with prompts or first passes, without capturing it."""
        tables, device = self._mixed, self._decoder.device
        num_rows = placed[-1].last_row + 1
        members = {a.key: a for p in placed for a, _ in p.item.sequence.active_mix.members}
        its_rows = [(p.item.sequence, range(p.row_start, p.last_row + 1)) for p in placed]
        num_decode = sum(place.item.num_new for place in placed if is_fused(place.item))
        drawn = sampled_rows(placed)
        adapters = None
        if members:
            self.store.prepare(members.values())
            of_rows = scalings_of_rows(placed, scalings)
            with tables.adapters():
                adapters = self.store.bind(runs_of(its_rows), tables, of_rows, num_decode)
        updates = self._blocks.update([place.item.sequence for place in placed])
        rows = collect_rows(placed, self._cache.block_size, updates.begins)
        with tables.step():
            if self._sampler is not None:
                numbers = self._sampler.numbers([sequence for sequence, _ in drawn])
                self._sampler.load(numbers, tables.sampling)
            attention = tables.attention_words(rows.spans)
            loaded = tables.load_rows(rows, samples, updates, attention)
        ids, positions, slots, sample_rows = loaded
        self._last = self._prepared = None
        inputs = GpuStep(
            token_ids=ids[:num_rows],
            positions=positions[:num_rows],
            kv_slots=slots[:num_rows],
            sample_rows=sample_rows[: len(samples)],
            num_decode=num_decode,
            attention=tables.attention,
            adapters=adapters,
            soft=rows.soft.on(device),
            added=rows.added.on(device),
            embeddings=changed_rows(its_rows, self.store, device, "embedding"),
        )
        hidden, logits = self._body(tables, inputs)()
        heads = changed_rows(drawn, self.store, device, "head")
        self._change_heads(hidden.index_select(0, inputs.sample_rows), logits, heads, tables)
        return hidden, logits

    def _run_decode(self, sequences: list[Sequence]) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a step with one new token per sequence: padded to a bucket, captured if possible."""
        tables = self._decode
        bucket = next(size for size in self._buckets if size >= len(sequences))
        bound = self._bound_to(sequences)
        updates = self._blocks.update(sequences)
        prepared = self._prepared
        if prepared is None or not prepared.fits(sequences, updates.begins):
            prepared = self._prepare(sequences, updates.begins)
        rows = collect_decode_rows(sequences, self._cache.block_size, prepared.positions)
        with tables.step():
            if self._sampler is not None:
                self._sampler.load(prepared.numbers, tables.sampling)
            loaded = tables.load_rows(rows, (), updates, prepared.attention)
        self._last, self._prepared = sequences, None
        inputs = self._decode_inputs(loaded, bucket, bound.step)
        if rows.added.rows or bound.embeddings:
            added = rows.added.on(self._decoder.device)
            changed = replace(inputs, added=added, embeddings=bound.embeddings)
            embedded = self._embedded[:bucket].copy_(self._decoder.embed(changed))
            inputs = replace(inputs, embedded=embedded)
        body = self._body(tables, inputs)
        graphs, fixed = self._graphs, inputs.is_fixed
        hidden, logits = graphs.run(self._epoch(), self._key(inputs), body) if fixed else body()
        self._change_heads(hidden, logits, bound.heads, tables)
        return hidden, logits

    def _change_heads(
        self,
        hidden: torch.Tensor,
        logits: torch.Tensor,
        groups: SequenceOf[VocabularyGroup],
        tables: StepTables,
    ) -> None:
        """Compute the logits of a step whose adapters change the head, and draw again."""
        if groups:
            self._decoder.logits(hidden, groups, logits)
            if self._sampler is not None:
                self._sampler.launch(logits, tables.sampling)

    def _decode_inputs(
        self,
        loaded: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
        bucket: int,
        adapters: GpuAdapterStep | None,
    ) -> GpuStep:
        """A decode step whose rows have been loaded."""
        ids, positions, slots, _ = loaded
        return GpuStep(
            token_ids=ids[:bucket],
            positions=positions[:bucket],
            kv_slots=slots[:bucket],
            sample_rows=self._every_row[:bucket],
            num_decode=bucket,
            attention=self._decode.attention,
            adapters=adapters,
            logits=self._logits,
        )

    def _epoch(self) -> Hashable:
        """A value that changes when a tensor that every captured step reads has moved."""
        return self._blocks.epoch, self._decoder.epoch

    @staticmethod
    def _key(inputs: GpuStep) -> GraphKey:
        """Identifies the kernels that a decode step launches, and the tables that they read."""
        kind, adapters = (len(inputs.token_ids), inputs.embedded is not None), inputs.adapters
        return kind, *((frozenset(), None) if adapters is None else adapters.signature)

    def _body(self, tables: StepTables, inputs: GpuStep) -> StepBody:
        """A function that makes all launches of a step, once its tables are on the device."""

        def body() -> tuple[torch.Tensor, torch.Tensor]:
            tables.write_blocks(len(inputs.token_ids))
            hidden, logits = self._decoder.compute(inputs, self._cache)
            if self._sampler is not None:
                self._sampler.launch(logits, tables.sampling)
            return hidden, logits

        return body

    def _prepare(self, sequences: list[Sequence], begins: list[int], ahead: int = 0) -> Prepared:
        """The input of a decode step except its tokens, their slots and their adapters."""
        positions, spans = decode_spans(sequences, begins, ahead)
        return Prepared(
            sequences,
            [sequence.num_computed + ahead for sequence in sequences],
            begins,
            positions,
            self._decode.attention_words(spans),
            [] if self._sampler is None else self._sampler.numbers(sequences, ahead),
        )

    def _bound_to(self, sequences: list[Sequence]) -> Bound:
        """The adapters of a decode step; their tables are loaded only if something has changed."""
        mixes = tuple([sequence.active_mix for sequence in sequences])
        bound = self._bound
        if bound is not None and bound.mixes == mixes:
            self.store.prepare(bound.adapters)
            if bound.version == self.store.version:
                return bound
        members = {a.key: a for mix in mixes for a, _ in mix.members}
        adapters = tuple(members.values())
        self.store.prepare(adapters)
        its_rows = [(sequence, range(row, row + 1)) for row, sequence in enumerate(sequences)]
        embeddings = changed_rows(its_rows, self.store, self._decoder.device, "embedding")
        step, runs, self._bound = None, runs_of(its_rows), None
        if adapters:
            bucket = next(size for size in self._buckets if size >= len(sequences))
            form = self.store.form(mix for _, _, mix in runs)
            form = self._graphs.form_for((bucket, bool(embeddings)), form)
            with self._decode.adapters():
                step = self.store.bind(runs, self._decode, form=form)
        self._bound = Bound(
            mixes,
            adapters,
            self.store.version,
            step,
            embeddings,
            changed_rows(its_rows, self.store, self._decoder.device, "head"),
        )
        return self._bound
