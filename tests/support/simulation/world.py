"""Engine loop, scheduler, names and residency of one server, on one thread and a simulated clock.

The code is the server's. The next actor (a client, an operator, a reading thread, the engine) is
drawn, so a seed determines a history, and failures are reproducible.
"""

from __future__ import annotations

import random
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

from simulation.parts import (
    Clock,
    Files,
    Inbox,
    Letters,
    Runner,
    Silent,
    Threads,
    check_progress,
    drafter_of,
    facts_of_size,
)

from turret.server.adapters.adapter import Adapter, AdapterRef, Mix, Source
from turret.server.adapters.base import ChangedBase
from turret.server.adapters.leases import Leases
from turret.server.adapters.name_table import NameLocks, NameTable, Registration
from turret.server.adapters.registry import Unloads
from turret.server.adapters.state_dir import NoStateDir
from turret.server.engine.answer import Answer, AnswerText
from turret.server.engine.loop import BaseChange, EngineLoop, Outbox
from turret.server.engine.scheduling.block_pool import BlockPool
from turret.server.engine.scheduling.request import Output, Request, StopConditions
from turret.server.engine.scheduling.scheduler import Scheduler
from turret.server.engine.scheduling.sequence import Sequence, SequenceState
from turret.server.engine.speculation import Speculation, StepCost
from turret.server.errors import TurretError

NAMES = ("a", "b", "c", "d")
HOST_BYTES = 6
NUM_BLOCKS, BLOCK_SIZE = 24, 4
MAX_SEQS, MAX_TOKENS = 3, 12
STEP_SECONDS, PREEMPT_SECONDS = 0.1, 1.0
# The wait before preemption, one step per preemption, and the steps before and after them.
MOST_BLOCKED_SECONDS = PREEMPT_SECONDS + (MAX_SEQS + 3) * STEP_SECONDS
# Maximum number of engine turns until requests end without other events.
MOST_TURNS = 3000


class World:
    """A server and its environment.

    Args:
        seed: The seed of every choice.
        clock: The replacement of ``time`` in the tested modules.

    Attributes:
        ended: The end of each request, by its stream.
        counts: The numbers of events, which show that the test covers them.
    """

    def __init__(self, seed: int, clock: Clock) -> None:
        self.random = random.Random(seed)
        # Half of the histories have two tenants.
        self._tenants = (b"a", b"b") if seed % 2 else (b"",)
        self.clock = clock
        self.files = Files(self.random)
        self.threads = Threads(self.random)
        self.counts: Counter[str] = Counter()
        lock = threading.RLock()
        silent: Any = Silent()
        # Some servers have less memory for adapters, and long answers, which hold all of it.
        is_memory_short = self.random.random() < 0.3
        self._lengths = (60,) if is_memory_short else (1, 3, 8, 40)
        self._host_bytes = HOST_BYTES - 2 if is_memory_short else HOST_BYTES
        self.leases = Leases(self._host_bytes, self.files.reload, lock=lock, metrics=silent)
        self.leases._executor.shutdown()
        self.leases._executor = self.threads  # type: ignore[assignment]
        self.table = NameTable(lock, self.leases, silent, self._gone)
        self.unloads = Unloads(
            lock,
            self.table,
            NameLocks(),
            NoStateDir(),
            end_users=lambda uuid: self.loop.post(lambda: self.loop.force_unload(uuid)),
            on_gone=self._gone,
        )
        # Some servers have KV blocks for many long answers, and those of one mix fill them.
        self._is_crowded = self.random.random() < 0.3
        self._most_changes = self.random.choice((1, 1, 6))
        self.pool = BlockPool(NUM_BLOCKS * (4 if self._is_crowded else 1), BLOCK_SIZE)
        cost = StepCost()
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=MAX_SEQS,
            max_num_batched_tokens=MAX_TOKENS,
            is_ready=lambda sequence: self.loop.is_ready(sequence),
            preempt_after_seconds=PREEMPT_SECONDS,
            speculation=None if is_memory_short else Speculation(cost),
            cost=cost,
        )
        # Every other device computes while the host does something else.
        is_asynchronous = bool(seed % 2)
        self.runner = Runner(self.random, self.files, BLOCK_SIZE, MAX_TOKENS, is_asynchronous)
        adapters: Any = self
        runner: Any = self.runner
        self.loop = EngineLoop(
            scheduler=self.scheduler,
            runner=runner,
            adapters=adapters,
            metrics=silent,
            send=self._deliver,
        )
        self.loop._inbox = Inbox()  # type: ignore[assignment]
        # Every accepted request, and the end that its client received.
        self.requests: list[Answer] = []
        self.ended: dict[Any, str] = {}
        self.received: defaultdict[Any, list[int]] = defaultdict(list)
        self.open_mixes: set[Mix] = set()
        self.change: BaseChange | None = None
        self._blocked: tuple[Sequence | None, float] = (None, 0.0)
        self._numbers = 0
        for _ in range(12 if is_memory_short else 0):
            self._load()

    # The registry's methods for the engine.

    def wanting(self) -> frozenset[Mix]:
        return self.leases.wanting()

    def hand_over(self, mixes: list[Mix], to: Mix) -> None:
        self.leases.hand_over(mixes, to)
        self.counts["handed over"] += 1

    def release(self, mix: Mix) -> None:
        self.table.release(mix)
        self.open_mixes.discard(mix)

    def _gone(self, adapter: Adapter) -> None:
        assert adapter.in_flight == adapter.holds == 0, f"{adapter} is gone, and in use"
        self.loop.post(lambda: self.runner.forget_adapter(adapter.key))

    def _deliver(self, outbox: Outbox) -> None:
        for stream, item in outbox:
            assert stream not in self.ended, "an output after the last one"
            if isinstance(item, Output):
                self.received[stream] += item.token_ids
            if isinstance(item, TurretError):
                self.ended[stream] = type(item).__name__
            elif isinstance(item, Output) and item.finish is not None:
                self.ended[stream] = item.finish.reason.name

    # The actors.

    def act(self) -> None:
        """Run one event, and check the invariants."""
        actions: dict[Callable[[], None], int] = {
            self._turn: 30,
            self._ask: 12,
            self._read: 8,
            self._cancel: 2,
            self._load: 3,
            self._replace: 2,
            self._unload: 2,
            self._pin: 2,
            self._change_base: 0 if self._is_crowded else self._most_changes,
            self._withdraw_change: 1,
            self._wait: 1,
            self._jump: 1,
        }
        (action,) = self.random.choices(list(actions), list(actions.values()))
        action()
        self.check()

    def _wait(self) -> None:
        self.clock.now += self.random.choice((0.01, 0.5, 2.0))
        # Only the time in which the engine could have acted counts.
        self._blocked = (None, self.clock.now)

    def _jump(self) -> None:
        """Set the wall clock."""
        self.clock.offset = self.random.choice((0.0, 1.0, 1.7e9, 2.1e9))

    def _turn(self) -> None:
        """Run one iteration of the engine's thread."""
        loop = self.loop
        loop._read_inbox()
        loop._expire(self.clock.now)
        # Reading threads do not wait for the engine's thread.
        for _ in range(self.random.choice((0, 0, 1, 2))):
            self._read()
        loop._try_change()
        loop._flush()
        loop._step()
        self.clock.now += STEP_SECONDS
        self._check_blocked()

    def _read(self) -> None:
        if len(self.threads):
            self.threads.run_one()

    def _ask(self) -> None:
        is_long = self._is_crowded and self.random.random() < 0.7
        count = 0 if is_long else self.random.choice((0, 1, 1, 1, 2))
        names = self.random.sample(NAMES, count)
        tenant = self._tenants[self._numbers % len(self._tenants)]
        try:
            mix = self.table.acquire([AdapterRef(name=name) for name in names], tenant)
        except TurretError:
            return
        self._numbers += 1
        deadline = None
        if self.random.random() < 0.1:
            deadline = self.clock.now + self.random.choice((-1.0, 0.05, 1.0, 5.0))
        request = Request(
            request_id=f"{self._numbers}",
            prompt_token_ids=tuple(self.random.choices((1, 2), k=self.random.randint(1, 14))),
            stop=StopConditions(
                max_tokens=60 if is_long else self.random.choice(self._lengths),
                ignore_eos=is_long,
            ),
            deadline=deadline,
            tenant=tenant,
        )
        assert request.stop.max_tokens is not None
        stream: Any = object()
        # Some adapters put a prefix of a whole block before the prompt.
        preset = BLOCK_SIZE if any(a.digest.endswith("2") for a, _ in mix.members) else 0
        sequence = Sequence(request, mix, self.clock.now, num_virtual=preset, num_preset=preset)
        sequence.drafter = drafter_of(sequence, request.stop.max_tokens)
        answer = Answer(
            sequence,
            stream,
            AnswerText(Letters(), request.stop, frozenset((8,))),
            token_text=str,
            max_tokens=request.stop.max_tokens,
        )
        if not mix.is_base:
            self.open_mixes.add(mix)
        self.requests.append(answer)
        self.loop.submit(answer)

    def _cancel(self) -> None:
        if self.requests:
            sequence = self.random.choice(self.requests).sequence
            self.loop.post(lambda: self.loop.cancel(sequence))

    def _adapter(self, name: str, uuid: str, generation: int) -> Adapter:
        size = self.random.randint(1, 4)
        digest = f"{size}-{self.random.randint(0, 3)}"
        return Adapter(name, uuid, generation, Source(name), facts_of_size(digest, size))

    def _enter(self, adapter: Adapter) -> bool:
        """Like the installer, load an adapter to memory if there is room."""
        try:
            loaded = self.files.reload(adapter.name, adapter.source, adapter.digest)
        except TurretError:
            return False
        self.leases.insert(adapter, loaded)
        return True

    def _load(self) -> None:
        name = self.random.choice(NAMES)
        if self.table.get(name) is None:
            self._numbers += 1
            adapter = self._adapter(name, f"u{self._numbers}", 1)
            if self._enter(adapter):
                self.table.add(Registration(adapter))
                self.counts["loaded"] += 1

    def _replace(self) -> None:
        registration = self.table.get(self.random.choice(NAMES))
        if registration is None or registration.current.pinned:
            return
        old = registration.current
        adapter = self._adapter(old.name, old.uuid, old.generation + 1)
        if self._enter(adapter):
            self.table.swap(registration, adapter, ())
            self.counts["replaced"] += 1

    def _unload(self) -> None:
        mode: Any = self.random.choice(("DRAIN", "FORCE"))
        try:
            self.unloads.unload(self.random.choice(NAMES), mode, 0.0, None)
            self.counts["unloaded"] += 1
        except TurretError:
            self.counts["kept"] += 1

    def _pin(self) -> None:
        registration = self.table.get(self.random.choice(NAMES))
        if registration is None:
            return
        adapter = registration.current
        if adapter.pinned:
            self.leases.set_pinned(adapter, False)
        elif adapter.is_resident:
            self.leases.set_pinned(adapter, True)
            self.counts["pinned"] += 1

    def _change_base(self) -> None:
        if self.change is not None and not self.change.outcome.done():
            return
        waiting = BaseChange(self._other_base)
        self.change = waiting
        waiting.outcome.add_done_callback(lambda _: self.loop.post(lambda: None))
        self.loop.post(lambda: self._begin(waiting))

    def _begin(self, change: BaseChange) -> None:
        # The merger requests one change at a time; a withdrawn one may still be waiting.
        if self.loop._change is None:
            self.loop.change_base(change)
        else:
            change.refuse()

    def _other_base(self) -> ChangedBase:
        assert not self.scheduler.running, "the base changes under a request"
        self.files.base_generation += 1
        self.counts["merged"] += 1
        generation = self.files.base_generation
        return ChangedBase(generation, self.leases.change_base(generation))

    def _withdraw_change(self) -> None:
        if self.change is not None:
            self.change.outcome.cancel()

    # Invariants.

    def check(self) -> None:
        """Check the invariants, which hold at any time."""
        self._check_blocks()
        self._check_references()
        memory = self.leases._memory
        assert 0 <= memory.used_bytes <= self._host_bytes, "over the budget"
        entered = memory._entries.values()
        assert memory.used_bytes == sum(adapter.host_bytes_needed for adapter in entered)
        pinned = sum(a.host_bytes_needed for a in entered if a.pinned)
        assert memory._pinned_bytes == pinned
        assert len(self.scheduler.running) <= MAX_SEQS
        waiting, running = list(self.scheduler.waiting), self.scheduler.running
        assert len(waiting) + len(running) == len(self.loop._answers)
        assert {*waiting, *running} == self.loop._answers.keys(), "in no line, or in two"

    def _check_blocks(self) -> None:
        held: set[int] = set()
        for answer in self.loop._answers.values():
            blocks = answer.sequence.blocks
            assert len(set(blocks)) == len(blocks), "a block twice in one sequence"
            held.update(blocks)
            check_progress(answer.sequence, self.pool)
        assert 0 not in held
        assert self.pool.num_active == len(held), "a block without owner"
        assert not held & self.pool._free.keys(), "a block in two places"
        for block in held:
            owners = sum(block in a.sequence.blocks for a in self.loop._answers.values())
            assert self.pool._references[block] == owners

    def _check_references(self) -> None:
        """Check that every count belongs to a request that has not ended."""
        in_flight: Counter[Adapter] = Counter()
        for mix in self.open_mixes:
            in_flight.update(adapter for adapter, _ in mix.members)
        known: set[Adapter] = set(self.leases._memory._entries.values()) | set(in_flight)
        for name in NAMES:
            registration = self.table.get(name)
            if registration is not None:
                known |= {registration.current, *registration.retired}
        for adapter in known:
            assert adapter.in_flight == in_flight[adapter], f"{adapter}: a reference without owner"
            assert 0 <= adapter.holds <= adapter.in_flight
        assert set(self.leases._leases) == self.open_mixes
        assert self.table._mixes == self.open_mixes

    def _check_blocked(self) -> None:
        """Check that the next mix waits briefly while a mix with more places was served more."""
        line, running = self.scheduler.waiting, self.scheduler.running
        first = None if self.scheduler.is_draining else line.peek(self.loop.is_ready)
        richer = first is not None and any(
            line.num_running(s.group) > line.num_running(first.group)
            and line.served(s.group) > line.served(first.group)
            for s in running
        )
        if first is None or not richer or first is not self._blocked[0]:
            self._blocked = (first if richer else None, self.clock.now)
            return
        since = max(self._blocked[1], first.waiting_since)
        self.counts["blocked"] += 1
        assert self.clock.now - since <= MOST_BLOCKED_SECONDS, "starved"

    def finish(self) -> None:
        """Check that without new requests, every request ends and all resources are returned."""
        for name in NAMES:
            registration = self.table.get(name)
            if registration is not None and registration.current.pinned:
                self.leases.set_pinned(registration.current, False)
        for _ in range(MOST_TURNS):
            if len(self.ended) == len(self.requests) and self.loop._inbox.empty():
                break
            self._read()
            self._turn()
            self.check()
        missing = [a for a in self.requests if a.stream not in self.ended]
        assert not missing, f"{len(missing)} requests never ended"
        for answer in self.requests:
            generated = answer.sequence.tokens[answer.sequence.prompt_end :]
            assert self.received[answer.stream] == generated, "not the generated tokens"
        while len(self.threads):
            self._read()
        self._turn()
        self.check()
        assert not self.open_mixes
        assert self.pool.num_active == 0
        assert all(a.sequence.state is not SequenceState.RUNNING for a in self.requests)
        for name in NAMES:
            if self.table.get(name) is not None:
                self.unloads.unload(name, "DRAIN", 0.0, None)
        assert self.leases.used_bytes == 0, "bytes of adapters that are gone"
