"""Random numbers of the running sequences: one per sampled token, from each one's own seed."""

from __future__ import annotations

import torch

from turret.server.engine.scheduling.sequence import Sequence

# A generator is asked for many at once: a call takes microseconds, a number a thousandth of that.
_BLOCK = 64


class UniformStream:
    """The numbers of one seed, in order; kept are those of the last two blocks."""

    def __init__(self, seed: int | None) -> None:
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)
        self._first = 0
        self._numbers: list[float] = []

    def at(self, index: int) -> float:
        """The ``index``-th number; never one from before the last two blocks."""
        while index >= self._first + len(self._numbers):
            fresh = torch.rand(_BLOCK, generator=self._generator, dtype=torch.float64).tolist()
            dropped = max(len(self._numbers) - _BLOCK, 0)
            self._numbers = self._numbers[dropped:] + fresh
            self._first += dropped
        return self._numbers[index - self._first]


class Uniforms:
    """Uniform numbers in [0, 1), by sequence.

    The n-th generated token of a sequence takes the n-th number of its seed. So a step that is
    computed again, because there was no memory for it, draws the same tokens.
    """

    def __init__(self) -> None:
        self._streams: dict[Sequence, UniformStream] = {}

    def next(self, sequence: Sequence, ahead: int = 0) -> float:
        """The number for the token that is drawn next, ``ahead`` tokens of this step before it."""
        stream = self._streams.get(sequence)
        if stream is None:
            stream = self._streams[sequence] = UniformStream(sequence.request.sampling.seed)
        return stream.at(sequence.num_generated + ahead)

    def forget(self, sequence: Sequence) -> None:
        """Drop a finished sequence's numbers."""
        self._streams.pop(sequence, None)
