"""The forward and backward passes of adapters in training, on the served weights.

The forward pass is that of requests, so a token's log probability is bit-identical to the one in
sampling. A recorder keeps the input and the result of each projection. The backward pass goes
through the layers in reverse. It differentiates each part in float32, by compiled kernels or by
autograd, and multiplies by the transposed weights of the base for all rows at once. The base gets
no gradients.

A pass consists of segments, each of which holds sequences of one adapter in consecutive rows.
Everything for an adapter is computed from its own rows alone, or row by row, so the bits of its
gradients do not depend on the rest of the pass. The trained tensors of an adapter are its leaves,
as in autograd: the backward pass adds to their ``grad``. Functions named ``through`` compute the
gradient of an input from that of the result. A pass calls ``between`` often, so that steps of
requests run meanwhile.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from turret.kernels.cpu import has_kernels
from turret.kernels.cpu.products import LowRankUpdate, low_rank_gradients, serves_transposed
from turret.kernels.paged_attention import SequenceSpan
from turret.kernels.rows import TargetLogprobs, row_linear, row_linear_transposed, row_log_softmax
from turret.server.adapters.checkpoint import PROMPT_EMBEDDINGS
from turret.server.adapters.device import (
    AdapterStep,
    BaseProduct,
    ExpertPairs,
    ProjectionLayout,
    Resident,
    StepMembers,
    StepStore,
)
from turret.server.adapters.device.vocabulary import VocabularyGroup
from turret.server.adapters.operators import BaseRows
from turret.server.adapters.operators.adapter_operators import AdapterOperators, ModuleOperators
from turret.server.adapters.operators.vocabulary import HEAD
from turret.server.models.decoding import LONG
from turret.server.models.decoding.adapted_linear import AdaptedLinear
from turret.server.models.decoding.decoder import Decoder, OwnRows, StepInput
from turret.server.models.decoding.layer_ops import KvCache
from turret.server.models.weights import BaseLinear
from turret.server.models.weights.nf4 import DenseLinear
from turret.server.training import MAX_SEQUENCE_TOKENS
from turret.server.training.layer_gradients import layer_gradients

_BLOCK_SIZE = 16
# The number of rows whose logits are computed at once; requests run in between.
_LOGIT_ROWS = 128
# Computes the gradients of some rows, from their numbers and the gradients of their log
# probabilities.
_ThroughHead = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(slots=True)
class PassAdapter:
    """An unregistered adapter in the form that the store accepts; by default, the base alone."""

    key: str = "the base alone"
    operators: AdapterOperators | None = field(default_factory=lambda: AdapterOperators({}))
    bytes_device: int = 0
    # The metrics do not report the residency of retired adapters.
    is_retired: bool = True


@dataclass(frozen=True, slots=True)
class Segment:
    """The sequences of one adapter in a pass.

    Attributes:
        adapter: The adapter as it is served.
        leaves: The tensors of its modules' operators, fp32, to whose ``grad`` the backward pass
            adds; by module path, in the order of ``ModuleOperators.tensors``.
        tokens: The token ids of each sequence, at least one each.
    """

    adapter: Resident
    leaves: Mapping[str, Sequence[torch.Tensor]]
    tokens: Sequence[Sequence[int]]

    @property
    def prompt(self) -> torch.Tensor | None:
        """The soft tokens before each sequence, ``[positions, hidden]``."""
        operators = self.adapter.operators
        prompt = None if operators is None else operators.soft_prompt
        return None if prompt is None else prompt.soft_tokens

    @property
    def num_soft(self) -> int:
        """The number of soft tokens before each sequence."""
        return 0 if self.prompt is None else len(self.prompt)

    @property
    def lengths(self) -> list[int]:
        """The number of rows of each sequence: soft tokens and tokens."""
        return [self.num_soft + len(each) for each in self.tokens]

    @property
    def starts(self) -> list[int]:
        """The first row of each sequence."""
        return list(itertools.accumulate(self.lengths[:-1], initial=0))

    @property
    def token_rows(self) -> slice | torch.Tensor:
        """The rows of tokens, without those of soft tokens."""
        if not self.num_soft:
            return slice(None)
        pairs = zip(self.starts, self.lengths, strict=True)
        return torch.cat([torch.arange(n + self.num_soft, n + length) for n, length in pairs])


class _Recorder(AdapterStep):
    """The adapters of a step; keeps the inputs and results of projections.

    Args:
        step: The adapters.
        changed: The projections whose inputs or results later operations change in place.
        between: See ``TrainingPass``.

    Attributes:
        inputs: The input of each projection, by layer and name.
        results: The result of each projection, by layer and name.
    """

    def __init__(
        self, step: AdapterStep, changed: Container[str], between: Callable[[], None]
    ) -> None:
        self._step = step
        self._changed = changed
        self._between = between
        self.inputs: dict[tuple[int, str], torch.Tensor] = {}
        self.results: dict[tuple[int, str], torch.Tensor] = {}

    def project(
        self,
        layer: int,
        projection: str,
        x: torch.Tensor,
        *,
        bias: torch.Tensor | None,
        base: BaseProduct,
    ) -> torch.Tensor:
        self._between()
        y = self._step.project(layer, projection, x, bias=bias, base=base)
        is_changed = projection in self._changed
        self.inputs[layer, projection] = x.clone() if is_changed else x
        self.results[layer, projection] = y.clone() if is_changed else y
        return y

    def attend(self, layer: int, q: torch.Tensor, attended: torch.Tensor) -> None:
        self._step.attend(layer, q, attended)

    def apply_experts(self, pairs: ExpertPairs) -> None:
        self._step.apply_experts(pairs)


class TrainingPass:
    """A forward pass, and the backward pass through it. Engine thread only.

    Args:
        decoder: The model; every layer has an MLP.
        layout: The shape of its projections.
        store: Holds the adapters of requests, and also those of the segments.
        segments: The sequences.
        between: Called before every projection. Steps of requests may run inside this call.

    Attributes:
        rows: The rows of each segment.
        hidden: Final-norm hidden states, ``[rows, hidden]``, after ``forward``.
    """

    def __init__(
        self,
        decoder: Decoder,
        layout: ProjectionLayout,
        store: StepStore,
        segments: Sequence[Segment],
        between: Callable[[], None] = lambda: None,
    ) -> None:
        self._decoder = decoder
        self._arch = decoder.arch
        self._layout = layout
        self._store = store
        self._segments = segments
        self._between = between
        ends = itertools.accumulate((sum(each.lengths) for each in segments), initial=0)
        self.rows = [slice(*pair) for pair in itertools.pairwise(ends)]
        self._streams: list[torch.Tensor] = []

    def forward(self) -> None:
        """Compute ``hidden``."""
        step, cache = self._prepare()
        self.hidden = self._decoder.forward(step, cache)
        self._streams = self._residual_streams(self._decoder.embed(step))

    @property
    def num_bytes(self) -> int:
        """The memory that ``forward`` keeps for ``backward``."""
        recorder = self._recorder
        kept = (*recorder.inputs.values(), *recorder.results.values(), *self._streams)
        return sum(tensor.nbytes for tensor in kept)

    def _prepare(self) -> tuple[StepInput, KvCache]:
        decoder, lengths = self._decoder, [n for each in self._segments for n in each.lengths]
        spans, slots, positions, block = [], [], [], 1
        for start, length in zip(itertools.accumulate(lengths, initial=0), lengths, strict=False):
            count = -(-length // _BLOCK_SIZE)
            spans.append(SequenceSpan(start, length, 0, list(range(block, block + count)), 0))
            slots += range(block * _BLOCK_SIZE, block * _BLOCK_SIZE + length)
            positions += self._positions(length)
            block += count
        cache = KvCache(self._arch, block, _BLOCK_SIZE, decoder.dtype, decoder.device)
        cache.clear(range(block))
        # An adapter may have several segments.
        self._store.prepare({each.adapter.key: each.adapter for each in self._segments}.values())
        # Requests that run meanwhile may evict the adapters, so this pass keeps their tensors.
        self._changes = [self._store.vocabularies.get(each.adapter.key) for each in self._segments]
        members = [
            (rows.start, rows.stop, [(segment.adapter.key, 1.0)])
            for rows, segment in zip(self.rows, self._segments, strict=True)
        ]
        all_positions = torch.tensor(positions, device=decoder.device)
        self._gradients = layer_gradients(
            decoder, [each.lengths for each in self._segments], all_positions
        )
        attention: dict[int | None, Any] = {
            window: decoder.ops.plan_attention(
                spans,
                num_rows=len(positions),
                block_size=_BLOCK_SIZE,
                window=window,
                device=decoder.device,
            )
            for window in set(self._arch.windows)
        }
        # Any token is fine in the rows of soft tokens.
        tokens = [
            token
            for segment in self._segments
            for each in segment.tokens
            for token in (*[0] * segment.num_soft, *each)
        ]
        adapters = self._store.step(StepMembers(short=[], long=members))
        self._recorder = _Recorder(adapters, self._changed_projections(), self._between)
        step = StepInput(
            token_ids=torch.tensor(tokens, device=decoder.device),
            positions=all_positions,
            kv_slots=torch.tensor(slots, device=decoder.device),
            attention=attention,
            adapters=self._recorder,
            soft=self._soft_rows(),
        )
        return step, cache

    def _changed_projections(self) -> set[str]:
        """The projections whose inputs or results later operations change in place."""
        changed = set() if self._arch.residual_scale == 1.0 else {"o", "down"}
        for layer in self._decoder.layers:
            # Without a norm, the input is the residual stream itself, which changes in place.
            changed |= set() if layer.norm_before_attention is not None else {"qkv"}
            changed |= set() if layer.norm_before_mlp is not None else {"gate_up"}
        return changed

    def _soft_rows(self) -> OwnRows | None:
        rows, values = [], []
        for place, segment in zip(self.rows, self._segments, strict=True):
            if (prompt := segment.prompt) is not None:
                rows += [torch.arange(len(prompt)) + place.start + n for n in segment.starts]
                values += [prompt] * len(segment.tokens)
        if not rows:
            return None
        device = self._decoder.device
        return OwnRows(torch.cat(rows).to(device), torch.cat(values).to(device))

    def _positions(self, length: int) -> range:
        long_from = self._arch.long_from
        first = LONG if long_from is not None and length > long_from else 0
        return range(first, first + length)

    def _residual_streams(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """The residual stream before each norm, computed as in the forward pass."""
        streams = [hidden]
        results, decoder = self._recorder.results, self._decoder
        for number, layer in enumerate(decoder.layers):
            for name, norm in (("o", layer.norm_after_attention), ("down", layer.norm_after_mlp)):
                streams.append(streams[-1] + decoder.leave(results[number, name].clone(), norm))
        return streams

    def targets(
        self,
        number: int,
        targets: torch.Tensor,
        loss: Callable[[slice, torch.Tensor], torch.Tensor],
        *,
        has_grad: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The log probabilities of a segment's targets, and their loss.

        Args:
            number: The segment.
            targets: The token to predict after each token, ``[tokens]`` int64.
            loss: Computes the losses of a range of the segment's tokens from their log
                probabilities.
            has_grad: Whether to compute the gradient.

        Returns:
            Log probabilities and losses, ``[tokens]`` fp32; the gradient of the segment's rows of
            ``hidden``, ``[rows, hidden]`` fp32, zero without ``has_grad``.
        """
        segment = self._segments[number]
        hidden = self.hidden[self.rows[number]][segment.token_rows]
        grad = hidden.new_zeros(hidden.shape, dtype=torch.float32)
        logprobs, losses = (grad.new_zeros(len(targets)) for _ in range(2))
        head = self._plain_head if self._is_head_plain(number) else self._head
        for start in range(0, len(targets), _LOGIT_ROWS):
            self._between()
            rows = slice(start, min(start + _LOGIT_ROWS, len(targets)))
            found, through = head(number, hidden[rows], targets[rows])
            leaf = found.requires_grad_()
            with torch.enable_grad():
                row_losses = loss(rows, leaf)
            logprobs[rows], losses[rows] = leaf.detach(), row_losses.detach()
            if not has_grad:
                continue
            (slope,) = torch.autograd.grad(row_losses, leaf, torch.ones_like(row_losses))
            chosen = slope.nonzero()[:, 0]
            if len(chosen):
                self._between()
                grad[rows.start + chosen] = through(chosen, slope[chosen])
        whole = grad.new_zeros(self.hidden[self.rows[number]].shape)
        whole[segment.token_rows] = grad
        return logprobs, losses, whole

    def _is_head_plain(self, number: int) -> bool:
        change, arch = self._changes[number], self._arch
        return (
            serves_transposed(self._decoder.head)
            and (change is None or not change.changes_head)
            and (arch.logit_scale, arch.logit_softcap) == (1.0, None)
        )

    def _plain_head(
        self, number: int, states: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, _ThroughHead]:
        """``_head`` for a head that nothing changes, by compiled kernels."""
        head = self._decoder.head
        found = TargetLogprobs(row_linear(states, head), targets)

        def through(chosen: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
            return row_linear_transposed(found.gradients(chosen, slope), head)

        return found.logprobs, through

    def _head(
        self, number: int, states: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, _ThroughHead]:
        """The log probabilities of some rows' targets.

        Args:
            number: The segment.
            states: ``[rows, hidden]``.
            targets: ``[rows]`` int64.

        Returns:
            ``[rows]`` fp32, and a function that computes the gradient of some rows of ``states``
            from those of their log probabilities. Call it at most once.
        """
        change, groups = self._changes[number], []
        if change is not None and change.changes_head:
            numbers = torch.arange(len(states), device=states.device)
            groups = [VocabularyGroup(numbers, [(change, 1.0)])]
        logits = self._decoder.logits(states, groups)
        all_logprobs = row_log_softmax(logits)

        def through(chosen: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
            # The gradient of a log probability: one-hot of its target minus the softmax.
            grad = all_logprobs[chosen].exp_().mul_(-slope[:, None])
            numbers = torch.arange(len(chosen), device=chosen.device)
            grad[numbers, targets[chosen]] += slope
            grad *= self._arch.logit_scale
            if self._arch.logit_softcap is not None:
                grad *= 1.0 - (logits[chosen] / self._arch.logit_softcap) ** 2
            return self._through_head(self._segments[number], states[chosen], grad)

        return all_logprobs.gather(1, targets[:, None])[:, 0], through

    def _through_head(self, segment: Segment, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        """The gradient of the head's input, ``[rows, hidden]`` fp32."""
        beside, head = grad.new_zeros(x.shape), self._decoder.head
        operators = segment.adapter.operators
        if operators is not None and operators.head is not None:
            leaves = segment.leaves[HEAD]
            beside, grad = _through_operators(
                operators.head.with_tensors(iter(leaves)),
                leaves,
                x,
                DenseLinear(head, (len(head),)),
                grad,
            )
        return beside + row_linear_transposed(grad, head)

    def backward(self, grad: torch.Tensor) -> None:
        """Add the gradients of the adapters to the ``grad`` of their leaves.

        Args:
            grad: The gradient of ``hidden``, ``[rows, hidden]`` fp32.
        """
        decoder = self._decoder
        total = torch.zeros_like(grad)
        self._add_through_norm(total, decoder.norm, grad)
        for number in reversed(range(len(decoder.layers))):
            layer = decoder.layers[number]
            assert layer.gate_up is not None
            assert layer.down is not None
            part = self._leaving(layer.down, layer.norm_after_mlp, total)
            part = self._gradients.gate(self._taken(layer.gate_up), part)
            part = self._through_linear(layer.gate_up, part)
            self._add_through_norm(total, layer.norm_before_mlp, part)
            part = self._leaving(layer.o, layer.norm_after_attention, total)
            part = self._gradients.attention(number, self._taken(layer.qkv), part)
            part = self._through_linear(layer.qkv, part)
            self._add_through_norm(total, layer.norm_before_attention, part)
        self._through_prompts(total)

    def _through_prompts(self, grad: torch.Tensor) -> None:
        """Add the gradients of the first layer's input to the ``grad`` of the soft tokens."""
        scale = self._arch.embedding_scale if self._arch.scales_soft_tokens else 1.0
        for rows, segment in zip(self.rows, self._segments, strict=True):
            if segment.prompt is None:
                continue
            (leaf,) = segment.leaves[PROMPT_EMBEDDINGS]
            parts = [grad[rows][start : start + segment.num_soft] for start in segment.starts]
            more = torch.stack(parts).sum(0) * scale
            leaf.grad = more if leaf.grad is None else leaf.grad + more

    def _taken(self, linear: AdaptedLinear) -> torch.Tensor:
        return self._recorder.results.pop((linear.layer, linear.projection))

    def _add_through_norm(
        self, total: torch.Tensor, norm: torch.Tensor | None, grad: torch.Tensor
    ) -> None:
        """Add the gradient of a norm's input, which is the last residual stream, to ``total``."""
        stream = self._streams.pop()
        if norm is None:
            total += grad
        else:
            self._gradients.add_norm(total, stream, norm, grad)

    def _leaving(
        self, linear: AdaptedLinear, norm: torch.Tensor | None, grad: torch.Tensor
    ) -> torch.Tensor:
        """The gradient of the input of the last projection of attention or MLP."""
        result, scale = self._taken(linear), self._arch.residual_scale
        part = grad if scale == 1.0 else grad * scale
        if norm is not None:
            part, of_normed = torch.zeros_like(part), part
            self._gradients.add_norm(part, result, norm, of_normed)
        return self._through_linear(linear, part)

    def _through_linear(self, linear: AdaptedLinear, grad: torch.Tensor) -> torch.Tensor:
        """The gradient of a projection's input; the operators' gradients go to their leaves."""
        self._between()
        x = self._recorder.inputs.pop((linear.layer, linear.projection))
        of_base, beside = grad, grad.new_zeros(0)
        updates: list[LowRankUpdate] = []
        leaves_of_updates: list[Sequence[torch.Tensor]] = []
        columns = self._layout.columns(linear.projection)
        paths = [
            self._layout.module(linear.layer, shape.path)
            for shape in self._layout.projections[linear.projection]
        ]
        has_updates = has_kernels(x.device)
        for rows, segment in zip(self.rows, self._segments, strict=True):
            operators = segment.adapter.operators
            if operators is None:
                continue
            adapted = [
                (index, operators.modules[path], segment.leaves[path])
                for index, path in enumerate(paths)
                if path in operators.modules
            ]
            if has_updates and all(module.is_low_rank for _, module, _ in adapted):
                for index, _, leaves in adapted:
                    a, b = (leaf.detach() for leaf in leaves)
                    updates.append(LowRankUpdate(rows, a, b, grad[rows, columns[index]]))
                    leaves_of_updates.append(leaves)
                continue
            if of_base is grad:
                of_base, beside = grad.clone(), grad.new_zeros(x.shape)
            for index, module, leaves in adapted:
                beside_part, of_base[rows, columns[index]] = _through_operators(
                    module.with_tensors(iter(leaves)),
                    leaves,
                    x[rows],
                    linear.part(index),
                    grad[rows, columns[index]],
                )
                beside[rows] += beside_part
        of_input = linear.base.transposed_product(of_base)
        if of_base is not grad:
            of_input += beside
        if updates:
            found = low_rank_gradients(updates, x, of_input)
            for leaves, grads in zip(leaves_of_updates, found, strict=True):
                _add_to(leaves, grads)
        return of_input


def _add_to(leaves: Sequence[torch.Tensor], grads: Iterable[torch.Tensor | None]) -> None:
    """Add gradients to those of leaves; None is no gradient."""
    for leaf, grad in zip(leaves, grads, strict=True):
        if grad is not None:
            leaf.grad = grad if leaf.grad is None else leaf.grad.add_(grad)


def largest_pass(
    decoder: Decoder, layout: ProjectionLayout, store: StepStore
) -> Callable[[], None]:
    """A function that runs the longest possible sequence on the base alone, to measure memory."""
    length = min(MAX_SEQUENCE_TOKENS, decoder.arch.max_model_len)
    segment = Segment(PassAdapter(), {}, [[0] * length])

    @torch.no_grad()
    def run() -> None:
        one = TrainingPass(decoder, layout, store, [segment])
        one.forward()
        targets = torch.zeros(length, dtype=torch.int64, device=decoder.device)
        _, _, grad = one.targets(0, targets, lambda rows, logprobs: -logprobs)
        one.backward(grad)

    return run


def _through_operators(
    module: ModuleOperators,
    leaves: Sequence[torch.Tensor],
    x: torch.Tensor,
    base: BaseLinear,
    grad: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Differentiate one adapter's operators of one module; adds to the leaves' gradients.

    Args:
        module: The operators, with ``leaves`` as their tensors.
        leaves: The trained tensors, fp32.
        x: The module's input, ``[rows, in]``.
        base: The module of the base.
        grad: The gradient of the module's result, ``[rows, out]`` fp32.

    Returns:
        The part of the input's gradient that does not go through the base's result, ``[rows, in]``,
        and the gradient of the base's result, ``[rows, out]``; fp32.
    """
    given = x.to(torch.float32, copy=True).requires_grad_()
    rows = _Rows(given, x, base)
    with torch.enable_grad():
        y = torch.zeros_like(grad)
        module.add(y, given, rows, 1.0)
    wanted = [given, *([] if rows.used is None else [rows.used]), *leaves]
    found = list(torch.autograd.grad(y, wanted, grad, allow_unused=True))
    of_input = found.pop(0)
    of_result = grad if rows.used is None or (used := found.pop(0)) is None else grad + used
    _add_to(leaves, found)
    return grad.new_zeros(x.shape) if of_input is None else of_input, of_result


class _Rows(BaseRows):
    """The base's data about rows, with gradients.

    Args:
        given: The rows' input, fp32.
        x: The same in the dtype of activations.
        base: The base's module.

    Attributes:
        used: The base's result, fp32, if an operator has requested it.
    """

    def __init__(self, given: torch.Tensor, x: torch.Tensor, base: BaseLinear) -> None:
        super().__init__(given, lambda more: _Multiplied.apply(more, base, x.dtype))
        self.used: torch.Tensor | None = None
        self._multiply = lambda: base(x).float().requires_grad_()

    @property
    def result(self) -> torch.Tensor:
        if self.used is None:
            self.used = self._multiply()
        return self.used


class _Multiplied(torch.autograd.Function):
    """A product of the base with inputs other than the rows' own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, base: BaseLinear, dtype: torch.dtype) -> torch.Tensor:
        ctx.base = base
        return base(x.to(dtype)).float()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):  # type: ignore[override]
        return ctx.base.transposed_product(grads[0]), None, None
