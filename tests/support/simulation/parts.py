"""Simulated surroundings of engine and registry: clock, threads, files, model, metrics."""

from __future__ import annotations

import queue
import random
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from builders.facts import facts_of

from turret.server.adapters.adapter import Adapter, AdapterFacts, Source
from turret.server.adapters.loader import LoadedAdapter
from turret.server.engine.scheduling.block_pool import BlockPool
from turret.server.engine.scheduling.sequence import Scheduled, Sequence, SequenceState, Step
from turret.server.engine.speculation import Drafter
from turret.server.engine.step.runner import DeviceFullError, StepResult
from turret.server.engine.step.sampler import Draw
from turret.server.errors import AdapterCheckpointError, TurretError
from turret.server.models.tokenizer import TokenStream


class Clock:
    """Replaces the module ``time``; moves only on request."""

    def __init__(self) -> None:
        self.now = 1000.0
        # The offset of the wall clock, which may jump, unlike the monotonic clock.
        self.offset = 1.7e9

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now + self.offset


class Inbox:
    """The engine's queue of commands, which never waits."""

    def __init__(self) -> None:
        self._commands: deque[Callable[[], None]] = deque()

    def put(self, command: Callable[[], None]) -> None:
        self._commands.append(command)

    def empty(self) -> bool:
        return not self._commands

    def get(self, timeout: float | None = None) -> Callable[[], None]:
        return self.get_nowait()

    def get_nowait(self) -> Callable[[], None]:
        if not self._commands:
            raise queue.Empty
        return self._commands.popleft()


class Threads:
    """An executor that runs work in any order, when ``run_one`` is called."""

    def __init__(self, source: random.Random) -> None:
        self._source = source
        self._work: list[Callable[[], object]] = []

    def __len__(self) -> int:
        return len(self._work)

    def submit(self, work: Callable[..., object], *args: Any) -> Future[Any]:
        self._work.append(lambda: work(*args))
        return Future()

    def run_one(self) -> None:
        self._work.pop(self._source.randrange(len(self._work)))()

    def shutdown(self, wait: bool = True, cancel_futures: bool = False) -> None:
        self._work.clear()


@dataclass(frozen=True)
class Operators:
    """An adapter's weights, as far as residency uses them."""

    num_bytes: int
    base_generation: int


def facts_of_size(digest: str, num_bytes: int) -> AdapterFacts:
    return facts_of(digest, bytes_disk=num_bytes, bytes_host=num_bytes)


class Files:
    """Reads adapters, with sizes from their digests. Sometimes a read fails."""

    def __init__(self, source: random.Random) -> None:
        self._source = source
        self.base_generation = 1

    def reload(self, name: str, place: Source, digest: str) -> LoadedAdapter:
        if self._source.random() < 0.05:
            raise AdapterCheckpointError(f"{name} is gone from {place.path}")
        size = int(digest.partition("-")[0])
        # Some adapters are computed from the base, like DoRA's.
        depends = digest.endswith(("1", "3"))
        operators: Any = Operators(size, self.base_generation)
        generation = self.base_generation if depends else None
        return LoadedAdapter(facts_of_size(digest, size), operators, generation)


class Runner:
    """Draws tokens without a model, and checks that its inputs are present.

    Attributes:
        num_full: The number of steps that failed because the device was full.
        num_accepted: The number of accepted draft tokens.
    """

    def __init__(
        self,
        source: random.Random,
        files: Files,
        block_size: int,
        max_tokens: int,
        is_asynchronous: bool,
    ) -> None:
        self.is_asynchronous = is_asynchronous
        self._source = source
        self._files = files
        self._block_size, self._max_tokens = block_size, max_tokens
        # The last computed content of each position of a block, as a hash of its inputs.
        self._cache: dict[tuple[int, int], int] = {}
        self.num_full = self.num_accepted = 0

    def run(self, step: Step, meanwhile: Callable[[], None]) -> StepResult:
        meanwhile()
        result = StepResult()
        assert sum(item.num_rows for item in step.scheduled) <= self._max_tokens
        assert len({item.sequence for item in step.scheduled}) == len(step.scheduled)
        for sequence, first_block in step.presets:
            first = first_block * self._block_size
            assert first < sequence.num_preset
            self._write(sequence, sequence.tokens, first, sequence.num_preset)
        for item in step.scheduled:
            sequence = item.sequence
            for adapter, _ in sequence.mix.members:
                self._check(adapter)
            self._compute(item)
            if item.samples:
                result.draws[sequence] = self._draw(item.draft)
        if self._source.random() < 0.02:
            self.num_full += 1
            raise DeviceFullError("the device is full")
        self.num_accepted += sum(len(draws) - 1 for draws in result.draws.values())
        return result

    def _compute(self, item: Scheduled) -> None:
        sequence, size = item.sequence, self._block_size
        tokens, first = (*sequence.tokens, *item.draft), sequence.num_computed
        assert first >= sequence.num_preset, "computes what the adapter brings"
        assert len(tokens) <= size * len(sequence.blocks) or not item.samples
        self._write(sequence, tokens, first, first + item.num_rows)

    def _write(self, sequence: Sequence, tokens: SequenceOf[int], first: int, end: int) -> None:
        """Write the keys and values of some positions, after a check of those before them."""
        made_of = hash((self._files.base_generation, sequence.mix.key))
        for position in range(end):
            made_of = hash((made_of, tokens[position]))
            block, offset = divmod(position, self._block_size)
            slot = sequence.blocks[block], offset
            if position >= first:
                self._cache[slot] = made_of
            else:
                assert self._cache[slot] == made_of, "the keys and values are not its own"

    def _draw(self, draft: tuple[int, ...]) -> list[Draw]:
        """A part of the draft, and a token that differs from the next draft token."""
        draws = []
        for expected in draft:
            drawn = expected if self._source.random() < 0.6 else self._source.randrange(3, 9)
            draws.append(Draw(drawn))
            if drawn != expected:
                return draws
        return [*draws, Draw(self._source.randrange(3, 9))]

    def _check(self, adapter: Adapter) -> None:
        operators: Any = adapter.operators
        assert operators is not None, f"{adapter} is computed with, and is not in memory"
        assert adapter.holds > 0, f"{adapter} is computed with, and nobody holds it"
        if adapter.base_generation is not None:
            assert adapter.base_generation == self._files.base_generation, f"{adapter} is stale"

    def forget(self, sequence: Sequence) -> None:
        pass

    def forget_adapter(self, key: str) -> None:
        pass

    def refusal(self, sequence: Sequence) -> TurretError | None:
        return None


def drafter_of(sequence: Sequence, max_tokens: int) -> Drafter:
    """A drafter for a sequence, which also drafts end tokens, so that answers end within drafts."""
    return Drafter(
        sequence.group,
        sequence.tokens,
        start=0,
        prompt_end=sequence.prompt_end,
        max_tokens=max_tokens,
        end_ids=frozenset(),
    )


def check_progress(sequence: Sequence, pool: BlockPool) -> None:
    """Check that drafts leave neither tokens without keys nor blocks without tokens."""
    if sequence.state is SequenceState.RUNNING:
        assert sequence.num_computed < len(sequence.tokens), "computed what is not there"
    most = pool.blocks_for(len(sequence.tokens))
    assert len(sequence.blocks) <= most, "a block for a draft that was wrong"
    for index, block in enumerate(sequence.blocks):
        is_full = (index + 1) * pool.block_size <= sequence.num_computed
        assert is_full or block not in pool._key_of, "found before it is full"


class Silent:
    """Metrics that are not read."""

    def __getattr__(self, name: str) -> Silent:
        return self

    def __call__(self, *args: object, **keywords: object) -> Silent:
        return self


class Letters(TokenStream):
    """A text stream of letters."""

    def __init__(self) -> None:
        pass

    def push(self, token_id: int) -> str:
        return chr(96 + token_id)
