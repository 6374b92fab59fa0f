"""The queue compared with its rules, and under traffic on a simulated clock."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import pytest
from builders.sequences import advance, make_scheduler, sequence_of
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from turret.server.engine.scheduling.fair_queue import FairQueue
from turret.server.engine.scheduling.sequence import Sequence

GROUPS = ("a", "b", "c")


@dataclass(eq=False)
class Item:
    group: str
    number: int = 0
    is_ready: bool = True
    party: str = ""
    tenant: bytes = b""


def is_ready(item: Item) -> bool:
    return item.is_ready


class FairQueueMachine(RuleBasedStateMachine):
    """Items arrive, are served, preempted, abandoned and finished, as in a simple model."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: FairQueue[Item] = FairQueue()
        self.lines: dict[str, deque[Item]] = {group: deque() for group in GROUPS}
        self.running: list[Item] = []
        # The tokens served to each group since it became busy; only groups that were always busy
        # are compared.
        self.busy_since: dict[str, int] = {}
        self.served: dict[str, int] = {}
        self.events = 0

    def _touch(self) -> None:
        """Forget groups that neither wait nor run, and add new ones."""
        self.events += 1
        for group in GROUPS:
            is_busy = bool(self.lines[group]) or any(i.group == group for i in self.running)
            if is_busy and group not in self.busy_since:
                self.busy_since[group], self.served[group] = self.events, 0
            elif not is_busy:
                self.busy_since.pop(group, None)

    @rule(group=st.sampled_from(GROUPS), ready=st.booleans())
    def push(self, group: str, ready: bool) -> None:
        item = Item(group, self.events, ready)
        self.queue.push(item)
        self.lines[group].append(item)
        self._touch()

    @rule()
    def load(self) -> None:
        for line in self.lines.values():
            for item in line:
                item.is_ready = True

    @precondition(lambda self: any(self.lines.values()))
    @rule(tokens=st.integers(1, 50))
    def serve(self, tokens: int) -> None:
        item = self.queue.peek(is_ready)
        heads = [
            next(filter(is_ready, line)) for line in self.lines.values() if any(map(is_ready, line))
        ]
        if item is None:
            assert not heads
            return
        # Ready items of a group are served in order of arrival; a group that is passed over has had
        # more tokens.
        assert item in heads
        for other in heads:
            if self.busy_since[other.group] == self.busy_since[item.group]:
                assert self.served[item.group] <= self.served[other.group]
        self.queue.start(item)
        self.queue.remove(item)
        self.queue.charge(item.group, tokens)
        self.lines[item.group].remove(item)
        self.running.append(item)
        self._touch()
        self.served[item.group] += tokens

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        item = data.draw(st.sampled_from(self.running))
        self.running.remove(item)
        # Push the item to the front, because the group has not been idle.
        self.queue.push_front(item)
        self.queue.stop(item)
        self.lines[item.group].appendleft(item)
        self._touch()

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        item = data.draw(st.sampled_from(self.running))
        self.running.remove(item)
        self.queue.stop(item)
        self._touch()

    @precondition(lambda self: any(self.lines.values()))
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        item = data.draw(st.sampled_from([i for line in self.lines.values() for i in line]))
        self.queue.remove(item)
        self.lines[item.group].remove(item)
        self._touch()

    @invariant()
    def lines_agree(self) -> None:
        waiting = [item for line in self.lines.values() for item in line]
        assert len(self.queue) == len(waiting)
        assert set(self.queue) == set(waiting)

    @rule(group=st.sampled_from(GROUPS))
    def absent_items_are_refused(self, group: str) -> None:
        with pytest.raises(ValueError):  # noqa: PT011 - the message is deque's own
            self.queue.remove(Item(group))


TestFairQueue = FairQueueMachine.TestCase
TestFairQueue.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def serve_one(queue: FairQueue[Item]) -> Item:
    """Serve the next item completely."""
    item = queue.peek(is_ready)
    assert item is not None
    queue.start(item)
    queue.remove(item)
    queue.charge(item.group, 10)
    queue.stop(item)
    return item


def test_newcomers_do_not_starve_a_group_that_is_ahead() -> None:
    """A popular adapter had the server to itself; now new adapters arrive continuously."""
    queue: FairQueue[Item] = FairQueue()
    for _ in range(400):
        queue.push(Item("popular"))
    # This item stays at counter 0, the lowest, at which newcomers would enter.
    queue.push(Item("slow loading", is_ready=False))
    for _ in range(20):
        assert serve_one(queue).group == "popular"
    served = []
    for i in range(300):
        queue.push(Item(f"newcomer {i}"))
        served.append(serve_one(queue).group)
    # Newcomers alone use the whole capacity, so more of them wait in every round, and the share of
    # "popular" shrinks.
    assert served.count("popular") >= 10
    assert served[-50:].count("popular") >= 1


def test_a_party_with_many_requests_delays_another_of_its_group_by_one() -> None:
    queue: FairQueue[Item] = FairQueue()
    for number in range(64):
        queue.push(Item("base", number, party="bulk"))
    for _ in range(10):
        serve_one(queue)
    for number in range(3):
        queue.push(Item("base", number, party="other"))
    served = [serve_one(queue) for _ in range(7)]
    assert [item.party for item in served] == ["bulk", "other"] * 3 + ["bulk"]
    assert [item.number for item in served if item.party == "other"] == [0, 1, 2]


def test_withdrawn_requests_delay_no_others() -> None:
    queue: FairQueue[Item] = FairQueue()
    items = [Item("base", number, party="bulk") for number in range(64)]
    for item in items:
        queue.push(item)
    for item in items[32:]:
        queue.remove(item)
    queue.push(Item("base", party="other"))
    assert "other" in [serve_one(queue).party for _ in range(3)]


def test_newcomers_do_not_starve_a_party_of_their_group() -> None:
    queue: FairQueue[Item] = FairQueue()
    for number in range(50):
        queue.push(Item("base", number, party="bulk"))
    queue.push(Item("base", party="first"))
    served = []
    for number in range(100):
        queue.push(Item("base", party=f"newcomer {number}"))
        served.append(serve_one(queue).party)
    # Two others wait in each round, and one more for each time that "bulk" is served.
    assert served.count("bulk") >= 10


def queue_times(
    shares: dict[str, float], load: float, steps: int = 4000, slots: int = 8
) -> dict[str, list[int]]:
    """The waits until the first scheduling, in steps and by adapter, in the real scheduler.

    Args:
        shares: The shares of the arrivals, by adapter.
        load: The arriving work over the scheduler's capacity.
        steps: The number of steps during which requests arrive.
        slots: The value of ``max_num_seqs``; a request takes 10 steps.
    """
    scheduler = make_scheduler(1024, max_num_seqs=slots, max_num_batched_tokens=4 * slots)
    due = dict.fromkeys(shares, 0.0)
    arrived: dict[Sequence, tuple[str, int]] = {}
    waits: dict[str, list[int]] = {name: [] for name in shares}
    for now in range(steps):
        for name, share in shares.items():
            due[name] += load * share * slots / 10
            while due[name] >= 1.0:
                due[name] -= 1.0
                sequence = sequence_of([1, 2, 3], name, max_tokens=10)
                arrived[sequence] = name, now
                scheduler.add(sequence)
        for item in advance(scheduler).scheduled:
            if item.sequence in arrived:
                name, since = arrived.pop(item.sequence)
                waits[name].append(now - since)
    return waits


def quantile(values: list[int], q: float) -> int:
    return sorted(values)[math.ceil(q * len(values)) - 1]


def test_a_rare_adapter_does_not_wait_for_a_popular_ones_overload() -> None:
    waits = queue_times({"popular": 0.9, "rare": 0.1}, load=2.0)
    assert len(waits["rare"]) > 500
    p99_rare, p50_popular = quantile(waits["rare"], 0.99), quantile(waits["popular"], 0.5)
    assert p99_rare <= 3 * p50_popular
    # Only the popular adapter suffers from its overload: the rare one waits just for a slot.
    assert p99_rare <= 20
    assert p50_popular > 100


def test_admissions_of_one_step_alternate_between_mixes() -> None:
    """Requests admitted in the same step already count as served."""
    scheduler = make_scheduler()
    for name in ("popular", "rare"):
        for _ in range(10):
            scheduler.add(sequence_of([1, 2, 3], name))
    step = scheduler.schedule()
    names = [item.sequence.mix.key[0][0] for item in step.scheduled]
    assert names == ["popular", "rare"] * 4
