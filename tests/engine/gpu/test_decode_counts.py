"""What a decode step costs the host and the device's queue, counted: launches, copies, memory.

On meta tensors with Triton's launches left out. The captured step is a stand-in whose replay does
nothing, so what is counted there is what the host does for every step; launches are counted while
it is captured, where every operation on device tensors is one (views and empty tensors are none).
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from typing import Any
from unittest.mock import patch

import pytest
import torch
from device_operations import META, Counting
from transformers import LlamaConfig
from triton.runtime.interpreter import InterpretedFunction

from turret.kernels.nf4_matmul import Nf4Matrix
from turret.server.adapters.device.gpu.store import GpuStore
from turret.server.adapters.device.layout import ProjectionLayout, SliceShape
from turret.server.adapters.mix import Mix
from turret.server.adapters.operators.adapter_operators import (
    AdapterOperators,
    InputBlocks,
    ModuleOperators,
)
from turret.server.adapters.operators.updates import LowRank
from turret.server.engine.scheduling.request import Request, SamplingParams
from turret.server.engine.scheduling.scheduler import Scheduled, Step
from turret.server.engine.scheduling.sequence import Sequence
from turret.server.engine.step.gpu.decode_graphs import Body, DecodeGraphs, Outputs
from turret.server.engine.step.gpu.executor import GpuExecutor
from turret.server.engine.step.gpu.warm_up import warm_up
from turret.server.models.decoding.adapted_linear import AdaptedLinear
from turret.server.models.decoding.decoder import DecoderLayer
from turret.server.models.decoding.gpu_decoder import GpuDecoder
from turret.server.models.decoding.kv_cache import KvCache
from turret.server.models.families import read_arch
from turret.server.models.weights.nf4_gpu import Nf4Product

DTYPE = torch.float16
# Llama-3.1-8B: which launches a product takes depends on its width. Ranks do not matter.
NUM_LAYERS, HIDDEN, VOCAB, RANK = 32, 4096, 128256, 1
ROWS, CONTEXT, BLOCK_SIZE = 64, 4096, 16
# These may only fall. Of a step of 32 layers, drawing tokens included.
MAX_LAUNCHES = {"base": 237, "lora": 365, "norms": 301, "turns": 589, "lora and norms": 493}
MAX_COPIES = 1
# At 64 rows of 4,096 tokens: milliseconds, on the fastest of many steps of an idle machine, and
# the calls that they are spent on.
MAX_HOST_MS = 0.3
MAX_HOST_CALLS = 1_250
ARCH = read_arch(
    LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=14336,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=2 * CONTEXT,
    )
)


class Capture:
    """Counts what a captured body launches; its replay costs the host nothing."""

    def __init__(self, launched: list[str]) -> None:
        self.num_captures = 0
        self.launches: list[str] = []
        self._launched = launched

    def __call__(self, body: Body) -> tuple[Callable[[], None], Outputs]:
        self.num_captures += 1
        self._launched.clear()
        with Counting() as counting:
            outputs = body()
        self.launches = [*self._launched, *counting.launches]
        return (lambda: None), outputs

    def forget(self) -> None:
        """Nothing is kept."""


@pytest.fixture
def launched() -> Iterator[list[str]]:
    """Leaves Triton's launches out and lists them."""
    names: list[str] = []

    def launch(kernel: Any, grid: Any) -> Any:
        return lambda *_, **__: names.append(kernel.fn.__name__)

    with patch.object(InterpretedFunction, "__getitem__", launch, create=True):
        yield names


class _Base:
    def __init__(self, widths: tuple[int, ...], inner: int) -> None:
        out = sum(widths)
        packed = torch.empty(out * inner // 2, dtype=torch.uint8, device=META)
        absmax = torch.empty(out * inner // 64, device=META)
        self.product = Nf4Product(Nf4Matrix(packed, absmax, out, inner), DTYPE)
        self.widths = widths

    def __call__(self, x: torch.Tensor, ahead: Any = None, num_decode: int = 0) -> torch.Tensor:
        return self.product(x, num_decode)


def _low_rank(out: int, inner: int) -> ModuleOperators:
    return ModuleOperators(LowRank(torch.zeros(RANK, inner).half(), torch.zeros(RANK, out).half()))


def _turn(out: int, inner: int) -> ModuleOperators:
    """OFT's."""
    return ModuleOperators(input_blocks=InputBlocks(torch.zeros(inner // 4, 4, 4).half()))


def _norm(out: int, inner: int) -> ModuleOperators:
    """LN tuning's, on what a norm feeds."""
    return ModuleOperators(input_gain=torch.ones(inner))


class _Adapter:
    """A LoRA on every projection, or on some, or another adapter."""

    generation = 1
    bytes_device = num_soft_tokens = num_prefix_positions = 0
    invocation = ()

    def __init__(
        self,
        key: str,
        *projections: str,
        make: Callable[[int, int], ModuleOperators] = _low_rank,
    ) -> None:
        self.key = self.uuid = self.name = key
        names = projections or tuple(ARCH.linears())
        self.operators = AdapterOperators(
            {
                f"model.layers.{layer}.{path}": make(out, inner)
                for layer in range(NUM_LAYERS)
                for name in names
                for path, out, inner in ARCH.linears()[name]
            }
        )


def make_executor(capture: Capture, rows: int = ROWS) -> GpuExecutor:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=DTYPE, device=META)

    layers = []
    for number in range(NUM_LAYERS):
        linears: dict[str, Any] = {
            name: AdaptedLinear(number, name, _base(slices), None)
            for name, slices in ARCH.linears().items()
        }
        norms = {"norm_before_attention": empty(HIDDEN), "norm_before_mlp": empty(HIDDEN)}
        layers.append(DecoderLayer(**norms, q_norm=None, k_norm=None, **linears))
    table = empty(VOCAB, HIDDEN)
    projections = {
        name: tuple(SliceShape(path, out, inner) for path, out, inner in slices)
        for name, slices in ARCH.linears().items()
    }
    return GpuExecutor(
        GpuDecoder(ARCH, embedding=table, layers=layers, norm=empty(HIDDEN), head=table),
        KvCache(ARCH, 8, BLOCK_SIZE, DTYPE, META),
        GpuStore(ProjectionLayout(NUM_LAYERS, projections), DTYPE, META, 1 << 28),
        max_num_seqs=rows,
        max_num_batched_tokens=256,
        capture=capture,
    )


def _base(slices: Any) -> Any:
    return _Base(tuple(out for _, out, _ in slices), slices[0][2])


class Decoding:
    """Sequences that generate, and their steps one after the other."""

    def __init__(self, adapters: SequenceOf[Any] = (), rows: int = ROWS) -> None:
        self.sequences = []
        for row in range(rows):
            mix = Mix(((adapters[row % len(adapters)], 1.0),) if adapters else ())
            # Not all at the end of a block in the same step.
            request = Request(
                request_id=str(row),
                prompt_token_ids=(1,) * (CONTEXT - row),
                sampling=SamplingParams(temperature=row % 2, top_p=0.9, seed=row),
            )
            self.sequences.append(Sequence(request, mix, 0.0))
        self.advance()

    def advance(self) -> None:
        """Draw a token for each."""
        for row, sequence in enumerate(self.sequences):
            sequence.num_computed = len(sequence.tokens)
            sequence.tokens.append(1)
            while len(sequence.blocks) * BLOCK_SIZE <= sequence.num_computed:
                sequence.blocks.append(1 + (7 * row + len(sequence.blocks)) % 7)

    def step(self) -> Step:
        return Step(tuple(Scheduled(sequence, 1) for sequence in self.sequences), (), 0)

    def run(self, executor: GpuExecutor) -> Step:
        step = self.step()
        executor.run(step)
        executor.look_ahead()
        self.advance()
        return step


def _adapters(kind: str) -> list[_Adapter]:
    return {
        "base": [],
        "lora": [_Adapter("a0"), _Adapter("a1")],
        "norms": [_Adapter("norms", "qkv", "gate_up", make=_norm)],
        "turns": [_Adapter("turns", make=_turn)],
        "lora and norms": [_Adapter("a0"), _Adapter("norms", "qkv", "gate_up", make=_norm)],
    }[kind]


@pytest.mark.parametrize("kind", MAX_LAUNCHES)
def test_a_decode_step(kind: str, launched: list[str]):
    """The base is multiplied once a projection whatever changes: these have no parts of it."""
    capture = Capture(launched)
    adapters = _adapters(kind)
    executor, decoding = make_executor(capture), Decoding(adapters)
    executor.sampler(frozenset())
    with torch.no_grad():
        for _ in range(2):
            decoding.run(executor)
        assert capture.num_captures == 1
        assert len(capture.launches) <= MAX_LAUNCHES[kind], sorted(set(capture.launches))
        assert "sample_rows_kernel" in capture.launches
        launched.clear()
        epoch = executor._epoch()
        for _ in range(20):
            with Counting() as counting:
                decoding.run(executor)
            assert counting.copies <= MAX_COPIES
            assert counting.memory == []
            assert counting.waits == []
            assert [*counting.launches, *launched] == [], "beside the captured step"
    assert capture.num_captures == 1
    assert executor._epoch() == epoch
    assert executor._prepared is not None


def test_after_the_start_common_steps_are_neither_compiled_nor_captured(launched: list[str]):
    capture = Capture(launched)
    executor = make_executor(capture, rows=4)
    executor.sampler(frozenset())
    told: list[tuple[str, int, int]] = []
    warm_up(executor, BLOCK_SIZE, lambda *report: told.append(report))
    forms = len(executor.forms())
    assert capture.num_captures == forms == 4 * 3
    assert told[0] == ("Compiling", 0, 1)
    assert told[-1] == ("Capturing decode steps", forms, forms)
    epoch = executor._epoch()
    everywhere = [_Adapter("all"), _Adapter("attention", "qkv", "o"), _Adapter("qkv", "qkv")]
    with torch.no_grad():
        for adapters in ([], everywhere, everywhere[1:], everywhere[2:], everywhere[::2]):
            for rows in (1, 3, 4):
                decoding = Decoding(adapters, rows)
                launched.clear()
                # The store's work, where adapters are new.
                executor.store.prepare(adapters)
                # Brings all their block numbers, which a prompt's step would have brought.
                decoding.run(executor)
                with Counting() as counting:
                    decoding.run(executor)
                assert [*counting.launches, *launched] == []
    assert capture.num_captures == forms
    assert executor._epoch() == epoch


def test_a_start_without_memory_goes_on_with_less(launched: list[str]):
    executor = make_executor(Capture(launched), rows=2)
    with patch.object(GpuExecutor, "capture", side_effect=torch.OutOfMemoryError("full")):
        warm_up(executor, BLOCK_SIZE, lambda *_: None)
    with torch.no_grad():
        Decoding(rows=2).run(executor)


def test_the_count_sees_everything():
    """What the bounds above are about, on purpose."""
    host, device = torch.ones(4), torch.empty(4, device=META)
    with Counting() as counting:
        device.copy_(host, non_blocking=True)
        counted = device + 1
        device.view(2, 2)[0].add_(1)
        torch.empty(3, device=META)
        with contextlib.suppress(RuntimeError, NotImplementedError):
            host.copy_(device)
    assert counted.shape == (4,)
    assert counting.waits == ["copy_"]
    assert (counting.copies, counting.launches) == (1, ["add", "add_"])
    assert counting.memory == ["add", "empty"]


def test_calls_of_the_host_before_the_first_launch(launched: list[str]):
    """Counted, since a time depends on who else uses this machine's caches."""
    executor, decoding = make_executor(Capture(launched)), Decoding([_Adapter("a")])
    executor.sampler(frozenset())
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    def replay(graphs: Any, epoch: Any, key: Any, body: Any) -> Outputs:
        sys.setprofile(None)
        return _outputs()

    with torch.inference_mode(), patch.object(DecodeGraphs, "run", replay):
        for _ in range(20):
            step = decoding.step()
            calls = 0
            sys.setprofile(count)
            try:
                executor.run(step)
            finally:
                sys.setprofile(None)
            executor.look_ahead()
            decoding.advance()
    assert 100 <= calls <= MAX_HOST_CALLS


@pytest.mark.long
def test_host_work_before_the_first_launch(launched: list[str]):
    """Of the fastest of many steps, on a machine that does nothing else."""
    executor, decoding = make_executor(Capture(launched)), Decoding([_Adapter("a")])
    executor.sampler(frozenset())
    fastest = 1.0
    with torch.inference_mode(), patch.object(DecodeGraphs, "run", _stamped):
        for _ in range(150):
            step = decoding.step()
            start = time.perf_counter()
            executor.run(step)
            fastest = min(fastest, _stamp[0] - start)
            executor.look_ahead()
            decoding.advance()
    assert fastest <= 1e-3 * MAX_HOST_MS * _slowness()


_stamp = [0.0]


def _stamped(graphs: Any, epoch: Any, key: Any, body: Any) -> Outputs:
    """Stands for the replay of a captured step."""
    _stamp[0] = time.perf_counter()
    return _outputs()


def _outputs() -> Outputs:
    return torch.empty(ROWS, HIDDEN, device=META), torch.empty(ROWS, VOCAB, device=META)


def _slowness() -> float:
    """How much longer than a current server's core this one takes for plain Python; at least 1."""
    best = 1.0
    for _ in range(20):
        start = time.perf_counter()
        total = 0
        for i in range(20_000):
            total += i % 7
        best = min(best, time.perf_counter() - start)
    return max(best / 1.2e-3, 1.0)
