"""Pools final hidden states to one vector per prompt, independent of chunks and batch.

A mean is summed in a fixed order, so that its bits do not depend on how the prompt was divided into
chunks. Each group of 64 positions, counted from the start of the text, is summed by adding its
second half to its first, repeatedly, until one state is left. The sums of the groups are added in
order.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as SequenceOf

import torch

from turret.server.adapters.operators.classifier import Classifier
from turret.server.engine.scheduling.request import Pooling, PoolingKind
from turret.server.engine.scheduling.sequence import Sequence
from turret.server.engine.step import Placed

# Number of states that are summed at once; must be a power of two.
_GROUP = 64
# Number of rows that are converted to fp32 at a time.
_ROWS = 4 * _GROUP


class Pooler:
    """Holds the sums of prompts that are being computed. One thread only."""

    def __init__(self) -> None:
        self._sums: dict[Sequence, _Sum] = {}

    def pool(
        self, placed: SequenceOf[Placed], hidden: torch.Tensor
    ) -> dict[Sequence, array[float]]:
        """Add the states of a step. A position that is computed again is not counted twice.

        Args:
            placed: The sequences of the step.
            hidden: Final-norm hidden states, ``[at least all rows, hidden]``.

        Returns:
            The vectors of prompts that are now complete, fp32.
        """
        ended: list[tuple[Sequence, Pooling, torch.Tensor]] = []
        for place in placed:
            sequence = place.item.sequence
            pooling = sequence.request.pooling
            if pooling is None:
                continue
            if pooling.kind is PoolingKind.MEAN:
                self._add(place, hidden)
            if place.item.samples:
                ended.append((sequence, pooling, self._state(place, pooling, hidden)))
        if not ended:
            return {}
        # Make one device-to-host copy for all sequences that ended.
        states = torch.stack([state for _, _, state in ended]).cpu()
        return {
            sequence: _finished(sequence, state, pooling)
            for (sequence, pooling, _), state in zip(ended, states, strict=True)
        }

    def forget(self, sequence: Sequence) -> None:
        """Drop what is kept for a sequence."""
        self._sums.pop(sequence, None)

    def _add(self, place: Placed, hidden: torch.Tensor) -> None:
        sequence = place.item.sequence
        total = self._sums.get(sequence)
        if total is None:
            total = self._sums[sequence] = _Sum(hidden.new_zeros(hidden.shape[1:]).float())
        first, end = sequence.num_computed, sequence.num_computed + place.item.num_new
        # After a preemption, or a step that ran out of memory, some positions have been counted
        # already. Their states have the same bits.
        for low in range(sequence.num_virtual + total.count, end, _ROWS):
            assert low >= first, "no position was left out"
            row = place.row_start + low - first
            total.add(hidden[row : row + min(_ROWS, end - low)])

    def _state(self, place: Placed, pooling: Pooling, hidden: torch.Tensor) -> torch.Tensor:
        if pooling.kind is PoolingKind.LAST:
            return hidden[place.last_row].float()
        return self._sums[place.item.sequence].mean()


class _Sum:
    """The sum of a prompt's states so far.

    Attributes:
        count: Number of positions in the sum.
    """

    def __init__(self, zero: torch.Tensor) -> None:
        self.count = 0
        self._groups = zero
        self._begun = zero.new_empty(0, *zero.shape)

    def add(self, rows: torch.Tensor) -> None:
        """Add the states of the next positions, ``[rows, hidden]``."""
        begun = torch.cat((self._begun, rows.float()))
        whole = begun.shape[0] // _GROUP * _GROUP
        groups = self._groups
        for group in _by_halves(begun[:whole].view(-1, _GROUP, begun.shape[1])):
            groups = groups + group
        # Assign both together, because a step that fails before this line is computed again.
        self._groups, self._begun = groups, begun[whole:].clone()
        self.count += rows.shape[0]

    def mean(self) -> torch.Tensor:
        """The mean of all states so far, ``[hidden]`` fp32."""
        rest = self._begun.new_zeros(1, _GROUP, self._begun.shape[1])
        rest[0, : self._begun.shape[0]] = self._begun
        return (self._groups + _by_halves(rest)[0]) / self.count


def _by_halves(groups: torch.Tensor) -> torch.Tensor:
    """The sum of each group: ``[count, _GROUP, hidden]`` → ``[count, hidden]``."""
    size = groups.shape[1]
    while size > 1:
        size //= 2
        groups = groups[:, :size] + groups[:, size:]
    return groups[:, 0]


def _finished(sequence: Sequence, state: torch.Tensor, pooling: Pooling) -> array[float]:
    """The result for a pooled state: the head's numbers, or the cut and normalised state.

    The norm is computed in double precision. A state of zeros stays zero.
    """
    if pooling.classifies:
        logits = _classifier_of(sequence).logits(state)
        return array("f", logits.float().numpy().tobytes())
    kept = state[: pooling.dimensions].double()
    if pooling.normalize:
        kept = kept / kept.square().sum().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    return array("f", kept.float().numpy().tobytes())


def _classifier_of(sequence: Sequence) -> Classifier:
    """The head of the only adapter that has one."""
    operators = (adapter.operators for adapter, _ in sequence.mix.members)
    found = next(each.classifier for each in operators if each is not None and each.classifier)
    assert found is not None
    return found
