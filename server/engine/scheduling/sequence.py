"""A request while it is served: its tokens, blocks and progress. No torch."""

from __future__ import annotations

import enum
import sys
from array import array
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from turret.server.engine.scheduling.block_pool import BlockPool, next_key, root_key
from turret.server.engine.scheduling.request import Request
from turret.server.engine.speculation import Drafter

if TYPE_CHECKING:
    from turret.server.adapters.adapter import Mix


# Activated adapters. An activated adapter (``Adapter.invocation``) takes effect at the last
# occurrence of its invocation in the prompt, and applies to all later tokens. Without an
# occurrence, it has no effect. Generated tokens are not searched, because an answer would then
# depend on whether it was interrupted and resumed.


@dataclass(frozen=True, slots=True)
class Stage:
    """The adapters that act from a position on, until the next stage.

    Attributes:
        start: The first position.
        mix: Part of the request's mix, in its order.
    """

    start: int
    mix: Mix


def stages_of(mix: Mix, prompt: SequenceOf[int], num_virtual: int) -> tuple[Stage, ...]:
    """The stages of a request, in the order of their positions.

    Args:
        mix: All adapters of the request.
        prompt: The tokens of the request's text.
        num_virtual: The number of positions before these tokens.

    Returns:
        The first stage begins at 0 and contains no activated adapter. Without activated adapters,
        it is the whole mix.
    """
    starts = {
        index: None if found is None else num_virtual + found
        for index, (adapter, _) in enumerate(mix.members)
        if adapter.invocation
        for found in [last_occurrence(prompt, adapter.invocation)]
    }
    if not starts:
        return (Stage(0, mix),)

    def acting(position: int | None) -> Mix:
        members = [
            member
            for index, member in enumerate(mix.members)
            if index not in starts
            or (position is not None and (start := starts[index]) is not None and start <= position)
        ]
        return mix.part(members)

    begins = sorted({start for start in starts.values() if start is not None})
    return (Stage(0, acting(None)), *(Stage(start, acting(start)) for start in begins))


_CODEC = "utf-32-le" if sys.byteorder == "little" else "utf-32-be"


def last_occurrence(tokens: SequenceOf[int], wanted: SequenceOf[int]) -> int | None:
    """The start of the last occurrence of ``wanted`` in ``tokens``, or None."""
    # Search the reversed tokens as text, which takes linear time for any tokens.
    found = _reversed_text(tokens).find(_reversed_text(wanted))
    return None if found < 0 else len(tokens) - len(wanted) - found


def _reversed_text(tokens: SequenceOf[int]) -> str:
    """The tokens as text, with one character per token and the last one first."""
    return array("I", tokens[::-1]).tobytes().decode(_CODEC, "surrogatepass")


class SequenceState(enum.Enum):
    """The state of a sequence. A preempted sequence is waiting again."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


# The token id of a position that has no token: a soft token, a prefix position or its padding.
PLACEHOLDER = -1


@dataclass(slots=True, eq=False)
class Sequence:
    """One request while it is served.

    Attributes:
        request: The request.
        mix: Its adapters, which it holds until it finishes.
        stages: The adapters that act from each position on (``stages_of``).
        arrival: ``time.monotonic()`` seconds when the request was received.
        num_virtual: Positions before the prompt that an adapter fills: soft tokens (computed like
            any token) or a prefix (keys and values come from the adapter).
        num_preset: Virtual positions whose keys and values come from the adapter, in whole blocks.
        num_padding: Leading positions of a prefix that are masked. A prefix ends at a block
            boundary instead of beginning at one, so that all requests share all of its blocks.
        is_long: Whether the sequence may exceed the length from which the model uses other rotary
            frequencies (``Arch.long_from``).
        vocab_size: The number of tokens that can be drawn, if an adapter changes it; 0 for the
            base's number.
        tokens: A placeholder per virtual position, then the token ids of the prompt and of the
            answer, including those of ``answer_so_far``.
        num_computed: Leading tokens whose keys and values are in the cache.
        num_cached: Prompt tokens that came from the prefix cache at first admission.
        blocks: KV blocks in position order. The list only grows; after the blocks are freed, there
            is a new list.
        keys: Keys of the full blocks so far; ``keys[0]`` is the root key.
        waiting_since: ``time.monotonic()`` seconds when it last joined the queue.
        forecast: The assumed number of generated tokens (``LengthForecast``).
        first_pass: The pass that computes its adapter's scalings (``add_first_pass``). It has the
            same tokens but its own blocks. None if no adapter needs one.
        drafter: Drafts the answer's next tokens; None for no drafts.
        num_prompt: Prompt tokens, virtual positions not counted.
        prompt_end: Positions before the first generated token.
        group: The key by which requests share fairly: their mix of adapters.
        party: The key of the client; requests of the same mix take turns between clients.
        tenant: The key of the tenant; tenants share the running places. Empty if there is none.
    """

    request: Request
    mix: Mix
    arrival: float
    num_virtual: int = 0
    num_preset: int = 0
    num_padding: int = 0
    is_long: bool = False
    vocab_size: int = 0
    tokens: list[int] = field(default_factory=list)
    state: SequenceState = SequenceState.WAITING
    num_computed: int = 0
    num_cached: int = 0
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    scheduled_at: float | None = None
    first_token_at: float | None = None
    num_preemptions: int = 0
    waiting_since: float = 0.0
    forecast: int = 0
    drafter: Drafter | None = None
    first_pass: Sequence | None = None
    num_prompt: int = field(init=False)
    prompt_end: int = field(init=False)
    stages: tuple[Stage, ...] = field(init=False)
    group: tuple[tuple[str, int, float], ...] = field(init=False)
    party: bytes = field(init=False)
    tenant: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.waiting_since = self.arrival
        self.group = self.mix.key
        self.party, self.tenant = self.request.party, self.request.tenant
        self.num_prompt = len(self.request.prompt_token_ids)
        self.prompt_end = self.num_virtual + self.num_prompt
        assert self.num_preset <= self.num_virtual
        self.tokens = [PLACEHOLDER] * self.num_virtual
        self.tokens += self.request.prompt_token_ids
        self.tokens += self.request.answer_so_far
        self.stages = stages_of(self.mix, self.request.prompt_token_ids, self.num_virtual)

    @property
    def passes(self) -> tuple[Sequence, ...]:
        """The sequences that hold keys and values of its tokens: itself, and its first pass."""
        return (self,) if self.first_pass is None else (self, self.first_pass)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.prompt_end

    @property
    def active_mix(self) -> Mix:
        """The adapters that act on the next token to be computed."""
        if len(self.stages) == 1:
            return self.stages[0].mix
        return next(s.mix for s in reversed(self.stages) if s.start <= self.num_computed)

    @property
    def num_alike(self) -> int:
        """How many of the tokens to be computed next have the same active adapters."""
        starts = (s.start for s in self.stages[1:] if s.start > self.num_computed)
        return next(starts, len(self.tokens)) - self.num_computed

    def extend_keys(self, num_tokens: int, block_size: int) -> None:
        """Compute the key of every full block within the first ``num_tokens`` tokens."""
        while len(self.keys) * block_size <= num_tokens:
            start = (len(self.keys) - 1) * block_size
            block = range(start, start + block_size)
            changes = [(s.start - start, s.mix.key) for s in self.stages[1:] if s.start in block]
            # Earlier blocks contain only an adapter's prefix or soft tokens, which all requests may
            # share. The keys of later blocks depend on this one.
            salt = self.request.salt if self.num_virtual in block else b""
            tokens = self.tokens[start : start + block_size]
            self.keys.append(next_key(self.keys[-1], tokens, changes, salt=salt))


@dataclass(frozen=True, slots=True)
class Scheduled:
    """``num_new`` tokens to compute with one mix, after a sequence's first ``num_computed``.

    They are followed by the tokens of ``draft``, which are guesses at the next ones.
    """

    sequence: Sequence
    num_new: int
    draft: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        """Positions to be computed."""
        return self.num_new + len(self.draft)

    @property
    def samples(self) -> bool:
        """Whether this computes the last known token, so that the next one can be drawn."""
        return self.sequence.num_computed + self.num_new == len(self.sequence.tokens)


@dataclass(frozen=True, slots=True)
class Step:
    """One engine iteration.

    Attributes:
        scheduled: The items to compute.
        new_blocks: Blocks that changed owner; see ``KvCache.clear``.
        num_preempted: Sequences that lost their blocks.
        presets: Sequences, each with the index of a block. The blocks from that index up to the
            sequence's ``num_preset`` positions are then filled from its adapter.
    """

    scheduled: tuple[Scheduled, ...]
    new_blocks: tuple[int, ...]
    num_preempted: int
    presets: tuple[tuple[Sequence, int], ...] = ()


# The blocks that sequences hold: their own and those of their first passes.
#
# A sequence with a first pass (``Sequence.first_pass``) has keys and values of two passes over the
# same positions, which are allocated and freed together. The blocks of each pass have their own
# keys, so a first pass of the base model shares blocks with the base's requests. Positions that are
# cached for both passes are not computed.


class HeldBlocks:
    """Takes blocks from a pool for sequences, and registers their keys.

    Args:
        pool: The KV blocks.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool

    def missing(self, sequence: Sequence, num_tokens: int) -> int:
        """Number of blocks that the sequence lacks to hold this many tokens."""
        # A first pass holds as many blocks as its sequence does.
        each = self._pool.blocks_for(num_tokens) - len(sequence.blocks)
        return each * len(sequence.passes) if each > 0 else 0

    def reserve(self, sequence: Sequence, num_tokens: int, new_blocks: list[int]) -> bool:
        """Allocate all blocks that the sequence needs for this many tokens, or none.

        Args:
            sequence: The sequence that needs the blocks.
            num_tokens: The number of tokens from the sequence's beginning.
            new_blocks: A list to which the new blocks are added.

        Returns:
            Whether there were enough free blocks.
        """
        count = self.missing(sequence, num_tokens)
        if not count:
            # Common case: a decode step needs no new block.
            return True
        fresh = self._pool.allocate(count)
        if fresh is None:
            return False
        new_blocks.extend(fresh)
        passes = sequence.passes
        for index, each in enumerate(passes):
            each.blocks.extend(fresh[index :: len(passes)])
        return True

    def free(self, sequence: Sequence) -> None:
        """Free all blocks of a sequence; none of its tokens count as computed any more."""
        for each in sequence.passes:
            self._pool.release(each.blocks)
            each.blocks = []
            each.num_computed = 0

    def find(self, sequence: Sequence, num_usable: int, base_generation: int) -> None:
        """Take the cached blocks for the beginning of the sequence.

        Args:
            sequence: A sequence that holds no blocks.
            num_usable: The most blocks that the sequence may take.
            base_generation: The generation of the weights.
        """
        size = self._pool.block_size
        for each in sequence.passes:
            if not each.keys:
                each.keys.append(_root_key(each, base_generation, each is sequence.first_pass))
            each.extend_keys(num_usable * size, size)
            each.blocks = self._pool.share(each.keys[1 : num_usable + 1])
        count = min(len(each.blocks) for each in sequence.passes)
        for each in sequence.passes:
            self._pool.release(each.blocks[count:])
            each.blocks = each.blocks[:count]
            each.num_computed = count * size

    def computed(self, sequence: Sequence, count: int) -> None:
        """Record that more tokens are in the cache, and make the blocks that they fill findable."""
        size = self._pool.block_size
        for each in sequence.passes:
            before = each.num_computed
            each.num_computed += count
            each.extend_keys(each.num_computed, size)
            for index in range(before // size, each.num_computed // size):
                self._pool.register(each.blocks[index], each.keys[index + 1])

    def num_repeated(self, sequences: Iterable[Sequence]) -> int:
        """How many more blocks these sequences would hold if they shared no blocks."""
        held = sum(len(each.blocks) for sequence in sequences for each in sequence.passes)
        return held - self._pool.num_active


def _root_key(sequence: Sequence, base_generation: int, is_first_pass: bool) -> bytes:
    mix = sequence.stages[0].mix.key
    # A first pass without adapters is the base's ordinary pass, so it shares the base's blocks.
    return root_key(
        base_generation, mix, is_long=sequence.is_long, is_first_pass=is_first_pass and bool(mix)
    )
