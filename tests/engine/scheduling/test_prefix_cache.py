"""The prefix cache compared with a simple model, and the order in which blocks are reused."""

from __future__ import annotations

from builders.facts import adapter_of
from builders.sequences import BLOCK_SIZE, make_scheduler, sequence_of
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from turret.server.adapters.adapter import Mix
from turret.server.engine.scheduling.block_pool import BlockPool, next_key, root_key
from turret.server.engine.scheduling.sequence import PLACEHOLDER, Sequence

# The tokens that invoke the adapter "c".
INVOCATION = (2, 2)
MixKey = tuple[tuple[str, int, float], ...]
# The values in a block depend on the base generation and on every token up to the block's end, each
# with the mix that acts on it.
Content = tuple[int, tuple[tuple[int, MixKey], ...]]

# Prompts are prefixes of two texts, so most share blocks with others. Some contain invocations.
prompts = st.builds(
    lambda text, length, more: [text] * length + more,
    st.sampled_from([0, 1]),
    st.integers(1, 18),
    st.sampled_from([[], [], [2, 2], [2, 2, 0, 2, 2, 2], [2, 2] + [1] * 5]),
)
members = st.sampled_from(
    [(), ("a",), ("a",), ("b",), ("a", "b"), ("b", "a"), ("c",), ("c",), ("a", "c"), ("c", "b")]
)
weights = st.sampled_from([1.0, 1.0, 0.5])


class PrefixCacheMachine(RuleBasedStateMachine):
    """Requests run concurrently while adapters are replaced, loaded again, and merged.

    ``written`` maps each block to its last computed content. ``ever`` has every content that was
    computed in any block.
    """

    num_blocks = 12
    # With enough blocks, nothing is evicted, so each hit can be predicted.
    is_ample = False

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = make_scheduler(self.num_blocks, max_num_seqs=3, max_num_batched_tokens=16)
        self.versions = {name: (f"uuid-{name}", 1) for name in "abc"}
        self.num_loads = 0
        self.live: dict[Sequence, int] = {}
        self.written: dict[int, Content] = {}
        self.ever: set[Content] = set()

    def _content(self, sequence: Sequence, end: int) -> Content:
        prompt: tuple[int, ...] = sequence.request.prompt_token_ids
        starts = [i for i in range(len(prompt)) if prompt[i : i + 2] == INVOCATION]
        start = starts[-1] if starts else None
        parts = []
        for position, token in enumerate(sequence.tokens[:end]):
            is_on = start is not None and position >= start
            acting = [m for m in sequence.mix.members if is_on or not m[0].invocation]
            parts.append((token, Mix(tuple(acting)).key))
        return self.live[sequence], tuple(parts)

    @rule(prompt=prompts, members=members, weight=weights, max_tokens=st.integers(1, 6))
    def ask(
        self, prompt: list[int], members: tuple[str, ...], weight: float, max_tokens: int
    ) -> None:
        acting = [
            (adapter_of(name, *self.versions[name], invocation=INVOCATION * (name == "c")), weight)
            for name in members
        ]
        sequence = sequence_of(prompt, max_tokens=max_tokens, mix=Mix(tuple(acting)))
        self.live[sequence] = self.scheduler.base_generation
        self.scheduler.add(sequence)

    @rule(name=st.sampled_from("abc"))
    def replace(self, name: str) -> None:
        uuid, generation = self.versions[name]
        self.versions[name] = uuid, generation + 1

    @rule(name=st.sampled_from("abc"))
    def load_again(self, name: str) -> None:
        self.num_loads += 1
        self.versions[name] = f"uuid-{name}-{self.num_loads}", 1

    @rule()
    def merge(self) -> None:
        """Wait for all running and waiting requests, as the server does, and change the base."""
        self._drain()
        self.scheduler.base_generation += 1

    @rule()
    def finish(self) -> None:
        self._drain()

    @rule()
    def step(self) -> None:
        new = set(self.live) - set(self.scheduler.running)
        step = self.scheduler.schedule()
        for item in step.scheduled:
            if item.sequence in new:
                self._check_hit(item.sequence)
        drawing = [item.sequence for item in step.scheduled if item.samples]
        for item in step.scheduled:
            sequence, end = item.sequence, item.sequence.num_computed + item.num_new
            mixes = {mix for _, mix in self._content(sequence, end)[1][sequence.num_computed :]}
            assert mixes == {sequence.active_mix.key}, "one mix acts on all of a chunk"
            for index in range(sequence.num_computed // BLOCK_SIZE, end // BLOCK_SIZE):
                content = self._content(sequence, (index + 1) * BLOCK_SIZE)
                self.written[sequence.blocks[index]] = content
                self.ever.add(content)
        self.scheduler.complete(step)
        for sequence in drawing:
            sequence.tokens.append(1)
            if sequence.num_generated == sequence.request.stop.max_tokens:
                self.scheduler.finish(sequence)
                del self.live[sequence]
        pool = self.scheduler.blocks
        # The maintained count equals a count over the free blocks.
        assert pool.num_cached == sum(block in pool._key_of for block in pool._free)

    def _check_hit(self, sequence: Sequence) -> None:
        """Check that each cached block holds what would have been computed.

        With enough blocks, also check that the cache misses none.
        """
        given = sequence.num_computed // BLOCK_SIZE
        for index in range(given):
            content = self._content(sequence, (index + 1) * BLOCK_SIZE)
            assert self.written[sequence.blocks[index]] == content
        if self.is_ample:
            due = 0
            while (due + 1) * BLOCK_SIZE < len(sequence.tokens) and self._content(
                sequence, (due + 1) * BLOCK_SIZE
            ) in self.ever:
                due += 1
            assert given == due

    def _drain(self) -> None:
        for _ in range(500):
            if not self.live:
                return
            self.step()
        raise AssertionError("requests that never end")

    def teardown(self) -> None:
        self._drain()


class AmplePrefixCacheMachine(PrefixCacheMachine):
    num_blocks = 2000
    is_ample = True


TestPrefixCache = PrefixCacheMachine.TestCase
TestPrefixCache.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestAmplePrefixCache = AmplePrefixCacheMachine.TestCase
TestAmplePrefixCache.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_prefix_positions_are_filled_once_and_shared() -> None:
    scheduler = make_scheduler()
    first, second = (sequence_of([1, 2], "p", preset=8) for _ in range(2))
    scheduler.add(first)
    scheduler.add(second)
    step = scheduler.schedule()
    assert [(s, start) for s, start in step.presets] == [(first, 0)]
    assert first.blocks[:2] == second.blocks[:2]
    assert first.tokens[:8] == [PLACEHOLDER] * 8
    assert (first.num_cached, second.num_cached) == (0, 0)


# The order in which the KV block pool hands out blocks.


KEYS = [root_key(0, ())]
for _number in range(12):
    KEYS.append(next_key(KEYS[-1], [_number]))
CHAIN = KEYS[1:]


def cached_chain(pool: BlockPool, keys: list[bytes]) -> list[int]:
    """Blocks that were computed under ``keys`` and released."""
    blocks = pool.allocate(len(keys))
    assert blocks is not None
    for block, key in zip(blocks, keys, strict=True):
        pool.register(block, key)
    pool.release(blocks)
    return blocks


def test_blocks_without_content_go_first_then_the_longest_unused() -> None:
    pool = BlockPool(6, 4)
    old = cached_chain(pool, CHAIN[:2])
    new = cached_chain(pool, CHAIN[4:6])
    assert set(pool.allocate(1) or []).isdisjoint({*old, *new})
    # The end of a chain is reused first, because others can still use its beginning.
    assert pool.allocate(1) == [old[1]]
    assert pool.share(CHAIN[:2]) == [old[0]]
    assert pool.share(CHAIN[4:6]) == new
