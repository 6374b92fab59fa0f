"""The server's whole decode step, at a model's shapes.

It runs the server's own decoder, adapter pack, executor and sampler, with CUDA graphs, over random
NF4 weights and random adapters. It leaves out everything before and after the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from cuda.kernel_launches import Model
from gpu_path import FakeCapture

from turret.kernels.gpu.tables import SPLIT, AttentionTable
from turret.kernels.nf4_matmul import BLOCK, Nf4Matrix
from turret.kernels.paged_attention import SequenceSpan
from turret.server.adapters.device import ProjectionLayout, SliceShape
from turret.server.adapters.device.gpu_store import GpuStore
from turret.server.adapters.operators.adapter_operators import AdapterOperators, ModuleOperators
from turret.server.adapters.operators.hadamard import Hadamard
from turret.server.adapters.operators.kronecker import Kronecker
from turret.server.adapters.operators.low_rank import LowRank
from turret.server.engine.scheduling.request import Request
from turret.server.engine.scheduling.sequence import Scheduled, Sequence, Step
from turret.server.engine.step import gpu_executor as executor
from turret.server.engine.step.gpu_executor import (
    Capture,
    GpuExecutor,
    Outputs,
    StepBody,
    capture_for,
)
from turret.server.engine.step.runner import Computed, Runner, StepResult
from turret.server.models.decoding import Arch, Rope
from turret.server.models.decoding.adapted_linear import AdaptedLinear
from turret.server.models.decoding.decoder import DecoderLayer
from turret.server.models.decoding.gpu_decoder import GpuDecoder
from turret.server.models.decoding.layer_ops import KvCache
from turret.server.models.weights.nf4_gpu import Nf4Product

KV_BLOCK = 16
# Tokens that sequences have room for beyond their context.
ROOM = 64
# Adapters may take at most this share of the memory that the base leaves.
_ADAPTER_SHARE = 0.9


def random_nf4(out_features: int, in_features: int, device: torch.device) -> Nf4Matrix:
    """Random weights whose absmax values make a result about as large as the input."""
    size = out_features * in_features
    packed = torch.randint(0, 256, (size // 2,), dtype=torch.uint8, device=device)
    absmax = torch.rand(size // BLOCK, device=device).mul_(2 * in_features**-0.5)
    return Nf4Matrix(packed, absmax, out_features, in_features)


@dataclass(frozen=True, slots=True)
class Scenario:
    """The assignment of adapters to sequences.

    Attributes:
        name: The name in the output.
        slot_of_row: The slot of each row, 0 for the base model alone.
        ranks: The ranks of slots 1, 2, …
        method: ``lora``, ``dora``, ``loha`` or ``lokr``.
    """

    name: str
    slot_of_row: tuple[int, ...]
    ranks: tuple[int, ...]
    method: str = "lora"


@dataclass(slots=True)
class _Base:
    """A fused projection of random weights."""

    product: Nf4Product
    widths: tuple[int, ...]
    in_features: int

    def __call__(self, x: torch.Tensor, ahead: Any = None, num_decode: int = 0) -> torch.Tensor:
        return self.product(x, num_decode)


@dataclass(slots=True)
class Adapter:
    """A resident adapter."""

    key: str
    operators: AdapterOperators
    bytes_device: int = 0
    num_soft_tokens: int = 0
    invocation: tuple[int, ...] = ()
    num_prefix_positions: int = 0


@dataclass(frozen=True, slots=True)
class _Mix:
    members: tuple[tuple[Adapter, float], ...]

    @property
    def key(self) -> tuple[tuple[str, int, float], ...]:
        return tuple((adapter.key, 1, weight) for adapter, weight in self.members)

    def ensure_host(self, callback: Callable[[Any], None]) -> bool:
        return True


class _Captures:
    """Captures steps like the server, and keeps the last replay: the device's work alone."""

    def __init__(self, device: torch.device) -> None:
        self._capture: Capture = capture_for(device) or FakeCapture()
        self.replay: Callable[[], None] | None = None

    def __call__(self, body: StepBody) -> tuple[Callable[[], None], Outputs]:
        replay, outputs = self._capture(body)
        self.replay = torch.inference_mode()(replay)
        return replay, outputs

    def forget(self) -> None:
        self._capture.forget()


class DecodeStep:
    """The model, its cache and steps of ``num_rows`` sequences, each of which decodes one token.

    Args:
        model: The shapes of the model.
        num_layers: The number of layers.
        num_rows: The number of sequences.
        context: The number of tokens of each sequence before the step.
        dtype: The dtype of activations and adapters.
        device: The device.
        num_tokens: The largest number of rows of a step with prompts; None for ``num_rows``.

    Attributes:
        base_bytes: The minimum number of bytes that a step reads: codes, absmax values, head, keys
            and values.
        cache: The KV cache.
        spans: The sequences, as attention sees them.
    """

    def __init__(
        self,
        model: Model,
        num_layers: int,
        num_rows: int,
        context: int,
        dtype: torch.dtype,
        device: torch.device,
        num_tokens: int | None = None,
    ) -> None:
        self.num_rows, self.context, self.dtype, self.device = num_rows, context, dtype, device
        self._num_tokens = num_tokens or num_rows
        self._model = model
        self._arch = _arch(model, num_layers, context)
        blocks = -(-(context + ROOM) // KV_BLOCK)
        self.cache = KvCache(self._arch, num_rows * blocks + 1, KV_BLOCK, dtype, device)
        self.cache.keys.normal_()
        self.cache.values.normal_()
        self._blocks = [list(range(1 + i * blocks, 1 + (i + 1) * blocks)) for i in range(num_rows)]
        self.spans = [SequenceSpan(i, 1, context, b) for i, b in enumerate(self._blocks)]
        self.base_bytes = 0
        self._decoder = self._make_decoder()
        per_token = 2 * model.kv_heads * model.head_dim * dtype.itemsize
        self.base_bytes += num_layers * num_rows * context * per_token
        self.forget()

    def forget(self, adapters: SequenceOf[Adapter] = ()) -> None:
        """Free the memory of all adapters and captured graphs.

        Args:
            adapters: The adapters for which memory is reserved anew.

        Raises:
            torch.OutOfMemoryError: The device is too small for the adapters.
        """
        projections = {
            name: tuple(SliceShape(path, out, inner) for path, out, inner in slices)
            for name, slices in self._arch.linears().items()
        }
        layout = ProjectionLayout(self._arch.num_layers, projections)
        self._executor: GpuExecutor | None = None
        self._runner: Runner | None = None
        self._captures = _Captures(self.device)
        self._executor = GpuExecutor(
            self._decoder,
            self.cache,
            GpuStore(layout, self.dtype, self.device, self._adapter_bytes(layout, adapters)),
            max_num_seqs=self.num_rows,
            max_num_batched_tokens=self._num_tokens,
            capture=self._captures,
        )
        self._runner = Runner(self._executor, frozenset())

    def _adapter_bytes(self, layout: ProjectionLayout, adapters: SequenceOf[Adapter]) -> int:
        """The number of bytes to reserve for these adapters."""
        store = GpuStore(layout, self.dtype, torch.device("meta"), 0)
        # Two adapters without ranks cover the pack's rounding and its neutral slot.
        needs = [store.needs(AdapterOperators({}))] * 2
        needs += [store.needs(adapter.operators) for adapter in adapters]
        packed, other = map(sum, zip(*needs, strict=True))
        budget = max(4 * packed // 3, int(4.4 * other))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            if budget > _ADAPTER_SHARE * torch.cuda.mem_get_info(self.device)[0]:
                raise torch.OutOfMemoryError("the adapters do not fit alongside the base")
        return budget

    def attention_table(self) -> AttentionTable:
        """The step's sequences on the device."""
        spread = self.num_rows * (self.context // SPLIT + 2)
        table = AttentionTable(
            max_records=self.num_rows + spread,
            blocks=self.num_rows * len(self._blocks[0]),
            kv_heads=self._model.kv_heads,
            queries_per_head=self._arch.queries_per_head,
            window=self._model.window,
            device=self.device,
            spread_records=spread,
        )
        table.load(self.spans)
        return table

    def plan(self, adapter_of_row: list[Adapter | None]) -> Step:
        """A step in which every sequence generates one token."""
        scheduled = []
        for row, adapter in enumerate(adapter_of_row):
            request = Request(request_id=str(row), prompt_token_ids=(1,) * self.context)
            mix: Any = _Mix(() if adapter is None else ((adapter, 1.0),))
            sequence = Sequence(request, mix, 0.0)
            sequence.tokens.append(row % self._arch.vocab_size)
            sequence.num_computed = self.context
            sequence.blocks = self._blocks[row]
            scheduled.append(Scheduled(sequence, 1))
        return Step(tuple(scheduled), (), 0)

    def run(self, step: Step) -> Computed:
        """Launch a step, from the metadata to drawn tokens that nobody reads."""
        assert self._executor is not None
        with torch.inference_mode():
            return self._executor.run(step)

    def draw(self, step: Step) -> StepResult:
        """Compute a step, and read its tokens like the server."""
        assert self._runner is not None
        return self._runner.run(step)

    def advance(self, step: Step) -> None:
        """Compute a step, and append its tokens to its sequences; possible ``ROOM`` times."""
        for sequence, (drawn,) in self.draw(step).draws.items():
            sequence.num_computed += 1
            sequence.tokens.append(drawn.token_id)

    def advance_eagerly(self, step: Step) -> None:
        """Like ``advance``, but launch every kernel instead of replaying a captured step."""
        assert self._executor is not None
        with patch.object(self._executor._graphs, "_capture", None):
            self.advance(step)

    def capture(self, step: Step) -> Callable[[], None]:
        """Run a step until it is captured; returns the replay that was captured last."""
        for _ in range(executor.SIGHTS):
            self.draw(step)
        assert self._captures.replay is not None, "the step was not captured"
        return self._captures.replay

    def prompt(self, start: int, end: int) -> Step:
        """A step with these positions of the first sequence's prompt."""
        request = Request(request_id="prompt", prompt_token_ids=(1,) * (self.context + 1))
        mix: Any = _Mix(())
        sequence = Sequence(request, mix, 0.0)
        sequence.num_computed, sequence.blocks = start, self._blocks[0]
        return Step((Scheduled(sequence, end - start),), (), 0)

    def adapters(self, scenario: Scenario) -> list[Adapter]:
        """One adapter per slot. Adapters of one rank have the same numbers, but separate memory."""
        made: dict[int, AdapterOperators] = {}
        for rank in scenario.ranks:
            if rank not in made:
                made[rank] = AdapterOperators(dict(self._modules(scenario.method, rank)))
        return [Adapter(f"a{i}", made[rank]) for i, rank in enumerate(scenario.ranks)]

    def _modules(self, method: str, rank: int) -> Iterator[tuple[str, ModuleOperators]]:
        for layer in range(self._arch.num_layers):
            for slices in self._arch.linears().values():
                for path, out, inner in slices:
                    name = f"model.layers.{layer}.{path}"
                    yield name, self._operators(method, rank, out, inner)

    def _operators(self, method: str, rank: int, out: int, inner: int) -> ModuleOperators:
        if method == "loha":
            narrow = [self._factor(rank, inner) for _ in range(2)]
            wide = [self._factor(out, rank) for _ in range(2)]
            return ModuleOperators(hadamard=Hadamard(wide[0], narrow[0], wide[1], narrow[1]))
        if method == "lokr":
            size = kronecker_size(out, inner)
            second = self._factor(out // size, inner // size)
            return ModuleOperators(kronecker=Kronecker(self._factor(size, size), second))
        low_rank = LowRank(self._factor(rank, inner), self._factor(rank, out).mul_(0.1))
        gain = None
        if method == "dora":
            gain = torch.rand(out, device=self.device).mul_(0.1).add_(1.0)
        return ModuleOperators(low_rank=low_rank, gain=gain)

    def _factor(self, *shape: int) -> torch.Tensor:
        made = torch.randn(shape, dtype=self.dtype, device=self.device)
        return made.mul_(shape[-1] ** -0.5)

    def _make_decoder(self) -> GpuDecoder:
        arch, like = self._arch, {"dtype": self.dtype, "device": self.device}
        layers = []
        for number in range(arch.num_layers):
            linears: dict[str, Any] = {}
            for name, slices in arch.linears().items():
                widths = tuple(out for _, out, _ in slices)
                weight = random_nf4(sum(widths), slices[0][2], self.device)
                assert isinstance(weight.absmax, torch.Tensor)
                self.base_bytes += weight.packed.nbytes + weight.absmax.nbytes
                base = _Base(Nf4Product(weight, self.dtype), widths, slices[0][2])
                linears[name] = AdaptedLinear(number, name, base, None)  # type: ignore[arg-type]
            norms = [torch.ones(arch.hidden_size, **like) for _ in range(2)]
            layers.append(
                DecoderLayer(
                    norm_before_attention=norms[0],
                    norm_before_mlp=norms[1],
                    q_norm=None,
                    k_norm=None,
                    **linears,
                )
            )
        table = torch.randn(arch.vocab_size, arch.hidden_size, **like).mul_(arch.hidden_size**-0.5)
        self.base_bytes += table.nbytes
        norm = torch.ones(arch.hidden_size, **like)
        return GpuDecoder(arch, embedding=table, layers=layers, norm=norm, head=table)


def kronecker_size(out: int, inner: int) -> int:
    """The numbers of rows and columns of the first factor of LoKr adapters."""
    return next(f for f in (64, 32, 16, 8, 4) if inner % f == 0 and out % f == 0)


def _arch(model: Model, num_layers: int, context: int) -> Arch:
    exponents = torch.arange(0, model.head_dim, 2).float() / model.head_dim
    return Arch(
        model_type="llama",
        vocab_size=model.vocab,
        hidden_size=model.hidden,
        intermediate_size=model.inner,
        num_layers=num_layers,
        num_heads=model.heads,
        num_kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        rms_norm_eps=1e-5,
        max_model_len=context + ROOM,
        tie_word_embeddings=True,
        activation="silu",
        attention_scale=model.head_dim**-0.5,
        windows=(model.window,) * num_layers,
        ropes={"all": Rope(1.0 / 500000.0**exponents)},
        rope_of_layer=("all",) * num_layers,
    )
