"""A model with Llama-3.1-8B's widths on meta tensors, and counts of launches, copies and memory.

Triton's launches are not executed. The replay of a captured step does nothing, so the counts during
a replay are the host's work for every step. Launches are counted during the capture, where every
operation on device tensors is a launch, except for views and empty tensors.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from builders.facts import Resident, resident
from builders.operators import everywhere
from device_operations import META, Counting
from transformers import LlamaConfig
from triton.runtime.interpreter import InterpretedFunction

from turret.kernels.nf4_matmul import Nf4Matrix
from turret.server.adapters.adapter import Mix
from turret.server.adapters.device.gpu_store import GpuStore
from turret.server.adapters.operators.adapter_operators import ModuleOperators
from turret.server.adapters.operators.gate import Gate, QueryScore
from turret.server.adapters.operators.low_rank import LowRank
from turret.server.adapters.operators.vocabulary import VocabularyOperators, VocabularyRows
from turret.server.engine.scheduling.request import Request, SamplingParams
from turret.server.engine.scheduling.sequence import Scheduled, Sequence, Step
from turret.server.engine.step.gpu_executor import GpuExecutor, Outputs, StepBody
from turret.server.models.decoding import Arch
from turret.server.models.decoding.adapted_linear import AdaptedLinear
from turret.server.models.decoding.decoder import DecoderLayer
from turret.server.models.decoding.gpu_decoder import GpuDecoder
from turret.server.models.decoding.layer_ops import KvCache
from turret.server.models.describe import describe_projections
from turret.server.models.families import read_arch
from turret.server.models.weights.nf4_gpu import Nf4Product

DTYPE = torch.float16
# Sizes of Llama-3.1-8B, because the launches of a product depend on its width. Ranks do not matter.
NUM_LAYERS, HIDDEN, VOCAB, RANK = 32, 4096, 128256, 1
ROWS, CONTEXT, BLOCK_SIZE = 64, 4096, 16
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
    """Counts the launches of a captured body; its replay costs the host nothing."""

    def __init__(self, launched: list[str]) -> None:
        self.num_captures = 0
        self.launches: list[str] = []
        self._launched = launched

    def __call__(self, body: StepBody) -> tuple[Callable[[], None], Outputs]:
        self.num_captures += 1
        self._launched.clear()
        with Counting() as counting:
            outputs = body()
        self.launches = [*self._launched, *counting.launches]
        return (lambda: None), outputs

    def forget(self) -> None:
        """Do nothing, because no capture is kept."""


@contextlib.contextmanager
def listed_launches() -> Iterator[list[str]]:
    """Record Triton's launches instead of executing them."""
    names: list[str] = []

    def launch(kernel: Any, grid: Any) -> Any:
        return lambda *_, **__: names.append(kernel.fn.__name__)

    with patch.object(InterpretedFunction, "__getitem__", launch, create=True):
        yield names


class Base:
    """Replaces the weights of a fused projection."""

    def __init__(self, widths: tuple[int, ...], inner: int) -> None:
        out = sum(widths)
        packed = torch.empty(out * inner // 2, dtype=torch.uint8, device=META)
        absmax = torch.empty(out * inner // 64, device=META)
        self.product = Nf4Product(Nf4Matrix(packed, absmax, out, inner), DTYPE)
        self.widths, self._inner = widths, inner

    def __call__(self, x: torch.Tensor, ahead: Any = None, num_decode: int = 0) -> torch.Tensor:
        return self.product(x, num_decode)

    def part(self, index: int) -> Base:
        return Base((self.widths[index],), self._inner)


def low_rank(out: int, inner: int) -> ModuleOperators:
    return ModuleOperators(LowRank(torch.zeros(RANK, inner).half(), torch.zeros(RANK, out).half()))


def norm(out: int, inner: int) -> ModuleOperators:
    """The gain of LN tuning, on the modules after a norm."""
    return ModuleOperators(input_gain=torch.ones(inner))


def lora(key: str, *projections: str) -> Resident:
    return resident(key, everywhere(ARCH, low_rank, *projections))


def vocabulary(key: str, head: Callable[[int, int], ModuleOperators] | None = None) -> Resident:
    """A LoRA with its own rows for some tokens, and optionally another change of the head."""
    rows = VocabularyRows(torch.arange(3), torch.zeros(3, HIDDEN).half())
    operators = replace(
        everywhere(ARCH, low_rank),
        head=None if head is None else head(VOCAB, HIDDEN),
        tokens=VocabularyOperators(embedding=rows, head=rows),
    )
    return resident(key, operators)


def gated(key: str, components: int, d_k: int, *, arch: Arch = ARCH, rank: int = RANK) -> Resident:
    """A learned fusion on every projection."""
    ranks = components * rank

    @functools.cache
    def module(out: int, inner: int) -> ModuleOperators:
        score = QueryScore(torch.zeros(d_k, inner).half(), torch.zeros(ranks, d_k))
        factors = torch.zeros(ranks, inner).half(), torch.zeros(ranks, out).half()
        return ModuleOperators(gate=Gate(*factors, score, tuple(range(0, ranks + 1, rank))))

    return resident(key, everywhere(arch, module))


def meta_decoder(arch: Arch, biased: str = "") -> GpuDecoder:
    """A decoder on meta tensors; one projection may have a bias."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=DTYPE, device=META)

    hidden = arch.hidden_size
    layers = []
    for number in range(arch.num_layers):
        linears: dict[str, Any] = {}
        for name, slices in arch.linears().items():
            widths = tuple(width for _, width, _ in slices)
            base: Any = Base(widths, slices[0][2])
            bias = empty(sum(widths)) if name == biased else None
            linears[name] = AdaptedLinear(number, name, base, bias)
        norms = {"norm_before_attention": empty(hidden), "norm_before_mlp": empty(hidden)}
        layers.append(DecoderLayer(**norms, q_norm=None, k_norm=None, **linears))
    table = empty(arch.vocab_size, hidden)
    return GpuDecoder(arch, embedding=table, layers=layers, norm=empty(hidden), head=table)


def make_executor(capture: Capture, rows: int = ROWS) -> GpuExecutor:
    return GpuExecutor(
        meta_decoder(ARCH),
        KvCache(ARCH, 8, BLOCK_SIZE, DTYPE, META),
        GpuStore(describe_projections(ARCH), DTYPE, META, 1 << 31),
        max_num_seqs=rows,
        max_num_batched_tokens=256,
        capture=capture,
    )


class Decoding:
    """Generating sequences, and their consecutive steps."""

    def __init__(self, adapters: SequenceOf[Any] = (), rows: int = ROWS) -> None:
        self.sequences = []
        for row in range(rows):
            mix = Mix(((adapters[row % len(adapters)], 1.0),) if adapters else ())
            # The sequences do not all reach the end of a block in the same step.
            request = Request(
                request_id=str(row),
                prompt_token_ids=(1,) * (CONTEXT - row),
                sampling=SamplingParams(temperature=row % 2, top_p=0.9, seed=row),
            )
            self.sequences.append(Sequence(request, mix, 0.0))
        self.advance()

    def advance(self) -> None:
        """Append a token to each sequence, and the blocks that it needs."""
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
