"""Orders waiting items by tenant, then by group, then by turn. No torch.

- A *tenant* is a bearer token. Each of its running items takes a *place*.
- A *group* is one mix of adapters; the base alone is a group, too.
- A *party* is one of those that share a group: a bearer token, or a call if there are no tokens.
- A *turn* is a number by which the items of a group are ordered. It counts rounds of the parties.

Each group has a virtual token counter (VTC, arXiv 2401.00588). Every token computed for a group
advances its counter, and the waiting group with the lowest counter is served next. A group that
was idle re-enters at the lowest counter of the busy groups, so that idle time is not a credit. So a
popular adapter delays a rare one at most by the work that is already running, however many requests
wait for the popular one.

A request whose adapters are still being read is not ready: all ready requests may overtake it, even
those of its own mix.

An endless stream of new groups, each at the lowest counter, cannot starve a group with a higher
counter. No group enters below the counter that a group with exactly its fair share would have (the
virtual time of fair queueing, Parekh and Gallager 1993). That counter catches up with any lead.

Tenants come before groups: the tenant that runs the fewest items is served next, whatever mixes it
asks for. So neither many requests nor many mixes give a tenant more than its share of the places
while others wait. Without tenants, only groups and parties count.

Within a group, parties take turns. Each request of a party needs a turn, so a call with a thousand
prompts delays the next party by only one of them. The turn at which a party enters also advances by
one per round.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from operator import itemgetter
from typing import Generic, Protocol, TypeVar


class Grouped(Protocol):
    """An item that belongs to a group, and to one of the parties that share the group."""

    @property
    def group(self) -> Hashable: ...

    @property
    def party(self) -> Hashable: ...

    @property
    def tenant(self) -> bytes: ...


T = TypeVar("T", bound=Grouped)


class _Line(Generic[T]):
    """The items of one group, in the order of their turns."""

    def __init__(self) -> None:
        # Turns ascend. Items with the same turn are in the order in which they came.
        self._items: list[tuple[float, T]] = []
        # A party without waiting items enters at this turn.
        self._now = 0.0
        # Party → number of its items and the last of their turns.
        self._parties: dict[Hashable, tuple[int, float]] = {}

    def __iter__(self) -> Iterator[T]:
        return (item for _, item in self._items)

    def __len__(self) -> int:
        return len(self._items)

    def first(self, ready: Callable[[T], bool], places: Callable[[T], int]) -> T | None:
        """The first ready item among those whose tenants run the fewest items."""
        best, fewest, seen = None, math.inf, set[Hashable]()
        # Look past the head, because a ready request may hold memory for which the head waits.
        for _, item in self._items:
            if item.party in seen or not ready(item):
                continue
            if (found := places(item)) < fewest:
                best, fewest = item, found
            seen.add(item.party)
            if not found or len(seen) == len(self._parties):
                break
        return best

    def push(self, item: T) -> None:
        count, last = self._parties.get(item.party, (0, -math.inf))
        turn = max(self._now, last + 1)
        self._parties[item.party] = (count + 1, turn)
        bisect.insort_right(self._items, (turn, item), key=itemgetter(0))

    def push_front(self, item: T) -> None:
        turn = self._items[0][0] if self._items else self._now
        count, last = self._parties.get(item.party, (0, turn))
        self._parties[item.party] = (count + 1, last)
        self._items.insert(0, (turn, item))

    def remove(self, item: T) -> None:
        index = next((i for i, (_, each) in enumerate(self._items) if each is item), None)
        if index is None:
            raise ValueError("not waiting")
        del self._items[index]
        self._now += 1 / len(self._parties)
        if self._items:
            # Items that were cancelled instead of served must not delay new ones.
            self._now = min(self._now, self._items[0][0] + 1)
        count, last = self._parties.pop(item.party)
        if count > 1:
            self._parties[item.party] = (count - 1, last)


class FairQueue(Generic[T]):
    """Waiting items by group. Report served tokens to ``charge``."""

    def __init__(self) -> None:
        self._lines: dict[Hashable, _Line[T]] = {}
        self._served: dict[Hashable, float] = {}
        self._running: dict[Hashable, int] = {}
        self._places: Counter[bytes] = Counter()
        self._waiting: Counter[bytes] = Counter()
        self._fair_share = 0.0
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[T]:
        for line in self._lines.values():
            yield from line

    def push(self, item: T) -> None:
        """Add an item to its group's queue, at its party's next turn."""
        self._line(item.group).push(item)
        self._count(item, 1)

    def push_front(self, item: T) -> None:
        """Return a preempted item to the head of its group's queue."""
        self._line(item.group).push_front(item)
        self._count(item, 1)

    def peek(self, ready: Callable[[T], bool]) -> T | None:
        """The next item to serve: the first ready one, by tenant, group and turn."""
        best, least = None, (math.inf, math.inf)
        for group, line in self._lines.items():
            item = line.first(ready, self._places_of)
            if item is None:
                continue
            rank = self._places_of(item), self._served[group]
            if rank < least:
                best, least = item, rank
        return best

    def served(self, group: Hashable) -> float:
        """A group's service counter: the higher it is, the more the group was served."""
        return self._served[group]

    def _places_of(self, item: T) -> int:
        """Number of running items of this item's tenant; 0 if it has no tenant."""
        return self._places[item.tenant] if item.tenant else 0

    def num_waiting(self, tenant: bytes) -> int:
        """Number of waiting items of a tenant."""
        return self._waiting[tenant]

    def num_running(self, group: Hashable) -> int:
        """Number of running items of a group."""
        return self._running.get(group, 0)

    def remove(self, item: T) -> None:
        """Remove an item from any position in the queue. Raises ValueError if it is not waiting."""
        line = self._lines.get(item.group)
        if line is None:
            raise ValueError("not waiting")
        line.remove(item)
        self._count(item, -1)
        if not line:
            del self._lines[item.group]
            self._forget(item.group)

    def start(self, item: T) -> None:
        """Record that an item left the queue and runs, so its group stays busy."""
        self._running[item.group] = self._running.get(item.group, 0) + 1
        self._served.setdefault(item.group, self._floor())
        self._places[item.tenant] += 1

    def stop(self, item: T) -> None:
        """Record that an item no longer runs."""
        self._places[item.tenant] -= 1
        if not self._places[item.tenant]:
            del self._places[item.tenant]
        left = self._running[item.group] - 1
        if left:
            self._running[item.group] = left
        else:
            del self._running[item.group]
            self._forget(item.group)

    def charge(self, group: Hashable, num_tokens: int) -> None:
        """Record tokens computed for a busy group; a negative number undoes the last charge."""
        if group in self._served:
            self._served[group] += num_tokens
            self._fair_share += num_tokens / len(self._served)

    def _count(self, item: T, change: int) -> None:
        self._length += change
        self._waiting[item.tenant] += change
        if not self._waiting[item.tenant]:
            del self._waiting[item.tenant]

    def _line(self, group: Hashable) -> _Line[T]:
        line = self._lines.get(group)
        if line is None:
            self._served.setdefault(group, self._floor())
            line = self._lines[group] = _Line()
        return line

    def _floor(self) -> float:
        """Counter at which a group enters: the lowest busy group's, or the fair share if higher."""
        return max(self._fair_share, min(self._served.values(), default=0.0))

    def _forget(self, group: Hashable) -> None:
        if group not in self._lines and group not in self._running:
            self._served.pop(group, None)
