"""What a request's sampling parameters do to a row of logits: penalties, biases and bans.

Biases and bans are tensors made once for a request; of the penalties' tokens only those that came
since the last step are looked at. So a step costs no Python work per bias, stop or earlier token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf

import torch

from turret.server.engine.scheduling.sequence import Sequence

_FIRST_CAPACITY = 64


class _TokenCounts:
    """Distinct tokens of a growing text and how often each occurs, as tensors.

    Args:
        device: Where the tensors are.
    """

    def __init__(self, device: torch.device) -> None:
        self._index: dict[int, int] = {}
        self._ids = torch.zeros(_FIRST_CAPACITY, dtype=torch.int64, device=device)
        self._times = torch.zeros(_FIRST_CAPACITY, dtype=torch.float32, device=device)
        self._num_read = 0

    def read(self, text: list[int], start: int, drawn: SequenceOf[int] = ()) -> None:
        """Take in the tokens of ``text`` from ``start`` on that were not there the last time.

        Args:
            text: Only grows, but for what comes as ``drawn``.
            start: See above.
            drawn: Tokens behind it that will be part of it.
        """
        size = len(text) - start
        if self._num_read > size + len(drawn):
            # The step that drew these tokens ran out of memory and is computed again.
            self._forget()
        if self._num_read == size + len(drawn):
            return
        fresh = [*text[start + self._num_read :], *drawn[max(self._num_read - size, 0) :]]
        self._num_read += len(fresh)
        first = len(self._index)
        places = [self._index.setdefault(token, len(self._index)) for token in fresh]
        self._grow(len(self._index))
        # ``new`` is in the order of first occurrence, which is the order of the places.
        new = [token for token in dict.fromkeys(fresh) if self._index[token] >= first]
        if new:
            self._ids[first : len(self._index)] = torch.tensor(new)
        where = torch.tensor(places, device=self._times.device)
        self._times.index_add_(0, where, torch.ones(len(places), device=self._times.device))

    def _forget(self) -> None:
        self._index.clear()
        self._times.zero_()
        self._num_read = 0

    def _grow(self, size: int) -> None:
        if size <= self._ids.shape[0]:
            return
        more = max(size, 2 * self._ids.shape[0]) - self._ids.shape[0]
        self._ids = torch.cat((self._ids, self._ids.new_zeros(more)))
        self._times = torch.cat((self._times, self._times.new_zeros(more)))

    @property
    def ids(self) -> torch.Tensor:
        """``[distinct]`` int64 token ids."""
        return self._ids[: len(self._index)]

    @property
    def times(self) -> torch.Tensor:
        """``[distinct]`` fp32: how often each of ``ids`` occurs."""
        return self._times[: len(self._index)]


def _id_tensor(ids: Iterable[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(list(ids), dtype=torch.int64, device=device)


class Adjustment:
    """Changes the logits of one sequence, step after step, in the order of the methods below.

    Args:
        sequence: Whose logits; its tokens may only grow.
        stop_token_ids: The model's end tokens, banned with the request's own under ``min_tokens``.
        device: Where the logits are.
    """

    def __init__(
        self, sequence: Sequence, stop_token_ids: frozenset[int], device: torch.device
    ) -> None:
        self._sequence = sequence
        self._params = sequence.request.sampling
        params, stop = sequence.request.sampling, sequence.request.stop
        self._biases: tuple[torch.Tensor, torch.Tensor] | None = None
        if params.logit_bias:
            values = list(params.logit_bias.values())
            biases = torch.tensor(values, dtype=torch.float32, device=device)
            self._biases = _id_tensor(params.logit_bias, device), biases
        self._banned = None
        # With a constraint, its mask withholds end tokens: only the mask knows whether another
        # token is allowed.
        is_free = sequence.request.constraint is None
        if is_free and stop.min_tokens > 0 and (stop_token_ids or stop.stop_token_ids):
            self._banned = _id_tensor(stop_token_ids | stop.stop_token_ids, device)
        self._seen = _TokenCounts(device) if params.repetition_penalty != 1.0 else None
        is_counted = params.presence_penalty or params.frequency_penalty
        self._generated = _TokenCounts(device) if is_counted else None

    def apply(self, row: torch.Tensor, drawn: SequenceOf[int] = ()) -> None:
        """Change ``row`` in place.

        Args:
            row: ``[vocab]`` fp32.
            drawn: Tokens that were drawn in this step and come before the row's.
        """
        for ids, factor in self.factors(drawn):
            # CTRL (arXiv 1909.05858), over prompt and output, as transformers does.
            values = row[ids]
            row[ids] = torch.where(values > 0, values / factor, values * factor)
        for ids, amounts in self.penalties(drawn):
            row[ids] -= amounts
        for ids, amounts in self.biases():
            row[ids] += amounts
        for ids in self.bans(drawn):
            row[ids] = float("-inf")

    def factors(self, drawn: SequenceOf[int] = ()) -> Iterator[tuple[torch.Tensor, float]]:
        """Tokens whose logits shrink by a factor, in this step, if there are any."""
        if self._seen is not None:
            self._seen.read(self._sequence.tokens, self._sequence.num_virtual, drawn)
            yield self._seen.ids, self._params.repetition_penalty

    def penalties(self, drawn: SequenceOf[int] = ()) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Tokens, and what is taken from the logit of each, in this step."""
        if self._generated is not None:
            self._generated.read(self._sequence.tokens, self._sequence.prompt_end, drawn)
            times = self._params.frequency_penalty * self._generated.times
            yield self._generated.ids, self._params.presence_penalty + times

    def biases(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Tokens, and what is added to the logit of each."""
        if self._biases is not None:
            yield self._biases

    def bans(self, drawn: SequenceOf[int] = ()) -> Iterator[torch.Tensor]:
        """Tokens that may not be drawn in this step."""
        stop = self._sequence.request.stop
        num_before = self._sequence.num_generated + len(drawn)
        if self._banned is not None and num_before < stop.min_tokens:
            yield self._banned
