"""The interface between the engine and the compute paths that run scheduled steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from turret.server.adapters.device.store import AdapterStore, StepStore
from turret.server.adapters.operators.soft_prompt import soft_prompt_of
from turret.server.engine.scheduling.sequence import Sequence, Step
from turret.server.engine.step.batch import (
    BatchBuilder,
    Placed,
    StepScalings,
    added_logits,
    changed_heads,
    own_logits,
    scalings_of,
)
from turret.server.engine.step.sampler import Sampler, takes_likeliest
from turret.server.models.decoding.decoder import Decoder, LikeliestTokens
from turret.server.models.decoding.kv_cache import KvCache


@dataclass(frozen=True, slots=True)
class Likeliest:
    """The token with the largest logit of every row from which tokens are drawn.

    Attributes:
        tokens: The tokens, in the order of ``Computed.placed``.
        logits: Computes all logits of those rows, ``[samples, vocab]`` fp32, in case a token is not
            allowed.
    """

    tokens: SequenceOf[int]
    logits: Callable[[], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Computed:
    """The results of a step.

    Attributes:
        placed: Its sequences and their rows.
        hidden: Final-norm hidden states, ``[at least all rows, hidden]``.
        logits: The logits of every row from which tokens are drawn (``Placed.sampled``), in the
            order of ``placed``, ``[samples, vocab]`` fp32; None if there are no such rows. The next
            step may overwrite it.
        added: For each sequence whose adapter adds tokens, the logits of these tokens in the same
            rows, ``[rows of the sequence, tokens]`` fp32.
        likeliest: Replaces ``logits`` if only the likeliest tokens are needed.
    """

    placed: tuple[Placed, ...]
    hidden: torch.Tensor
    logits: torch.Tensor | None
    added: Mapping[Sequence, torch.Tensor] = field(default_factory=dict)
    likeliest: Likeliest | None = None


_D = TypeVar("_D", bound=Decoder)
_S = TypeVar("_S", bound=AdapterStore)


class Executor(ABC, Generic[_D, _S]):
    """Computes steps. One thread only.

    Args:
        decoder: The base model.
        cache: Keys and values of all sequences.
        store: The adapters.

    Attributes:
        is_asynchronous: Whether ``run`` returns before the step is computed.
        screens_head: Whether an int8 copy of the head determines the tokens of greedy steps.
        store: See above.
    """

    is_asynchronous = False
    screens_head = False

    def __init__(self, decoder: _D, cache: KvCache, store: _S) -> None:
        self._decoder, self._cache, self.store = decoder, cache, store

    @abstractmethod
    def run(self, step: Step) -> Computed:
        """Compute a step. Keys and values of its tokens are in the cache afterwards."""

    @abstractmethod
    def sampler(self, stop_token_ids: frozenset[int]) -> Sampler:
        """Make the sampler for its steps; called once, before the first.

        Args:
            stop_token_ids: The model's end tokens, which are not drawn before ``min_tokens``.
        """

    def logits(self, sequence: Sequence, hidden: torch.Tensor) -> torch.Tensor:
        """Project hidden states of one sequence onto its own tokens.

        Returns:
            ``[rows, vocab]`` fp32, from ``[rows, hidden]``.
        """
        rows = [(sequence, range(hidden.shape[0]))]
        logits = self._decoder.logits(hidden, changed_heads(rows, self.store, hidden.device))
        added = added_logits(rows, hidden, self._decoder, self.store)
        return own_logits(logits, sequence, added.get(sequence))

    # Executors that have nothing to do override none of these.

    def look_ahead(self) -> None:
        """Do useful work while the host waits for the step's results, if it waits."""

    def forget(self, sequence: Sequence) -> None:
        """Drop any state that is kept for a sequence."""

    def free_memory(self) -> None:
        """Free caches that only save time, if there are any, after a step ran out of memory."""


def fill_prefix(cache: KvCache, sequence: Sequence, start: int) -> None:
    """Write an adapter's prefix into the sequence's blocks, beginning at ``start``."""
    size = cache.block_size
    prefix = soft_prompt_of(sequence.mix).prefix
    assert prefix is not None
    blocks = sequence.blocks[start : sequence.num_preset // size]
    cache.fill(blocks, prefix.keys, prefix.values, start * size - sequence.num_padding)


def sampled_rows(placed: SequenceOf[Placed]) -> list[tuple[Sequence, range]]:
    """The sequences that sample, and the rows of each among their logits."""
    found: list[tuple[Sequence, range]] = []
    start = 0
    for place in placed:
        if place.samples:
            end = start + len(place.sampled)
            found.append((place.item.sequence, range(start, end)))
            start = end
    return found


class TorchExecutor(Executor[Decoder, StepStore]):
    """The torch and the cpu path.

    Args:
        decoder: The base model.
        cache: Keys and values of all sequences.
        store: The adapters.
        screens_head: Whether to keep an int8 copy of the head, of half its size, which determines
            the tokens of most greedy steps.
    """

    def __init__(
        self, decoder: Decoder, cache: KvCache, store: StepStore, *, screens_head: bool = True
    ) -> None:
        super().__init__(decoder, cache, store)
        self._likeliest = LikeliestTokens.of(decoder) if screens_head else None
        # A copy cannot be made for every head.
        self.screens_head = self._likeliest is not None
        self._builder = BatchBuilder(
            decoder.arch, decoder.ops, cache.block_size, store, decoder.device
        )

    def run(self, step: Step) -> Computed:
        self._cache.clear(step.new_blocks)
        for sequence, start in step.presets:
            fill_prefix(self._cache, sequence, start)
        scalings = scalings_of(step, self.store, self._decoder.device, self._compute)
        placed, hidden = self._compute(step, scalings)
        rows = [row for place in placed if place.samples for row in place.sampled]
        if rows:
            index = torch.tensor(rows, device=hidden.device)
            samples = sampled_rows(placed)
            changes = changed_heads(samples, self.store, hidden.device)
            states = hidden.index_select(0, index)
            if not changes and all(takes_likeliest(sequence) for sequence, _ in samples):
                likeliest = self._find_likeliest(states)
                if likeliest is not None:
                    return Computed(placed, hidden, None, likeliest=likeliest)
            logits = self._decoder.logits(states, changes)
            added = added_logits(samples, states, self._decoder, self.store)
            return Computed(placed, hidden, logits, added)
        return Computed(placed, hidden, None)

    def _find_likeliest(self, states: torch.Tensor) -> Likeliest | None:
        """The likeliest tokens of ``[samples, hidden]``; None if all logits are needed for that."""
        finder = self._likeliest
        if finder is None or (tokens := finder.find(states)) is None:
            return None

        def logits() -> torch.Tensor:
            finder.skip_next_calls()
            return self._decoder.logits(states)

        return Likeliest(tokens, logits)

    def _compute(
        self, step: Step, scalings: StepScalings
    ) -> tuple[tuple[Placed, ...], torch.Tensor]:
        """Compute the hidden states of a step."""
        batch = self._builder.build(step, scalings)
        return batch.placed, self._decoder.forward(batch.input, self._cache)

    def sampler(self, stop_token_ids: frozenset[int]) -> Sampler:
        return Sampler(stop_token_ids)
