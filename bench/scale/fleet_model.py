"""A fleet on a simulated clock: replicas with step costs and residency, behind an ingress.

A replica computes steps as the engine does (continuous batching, prompts in chunks within a budget
of tokens) and takes for each what such a step takes here. It keeps its most recently used adapters;
another is read first, beside the steps, which it slows down.
"""

from __future__ import annotations

import bisect
import hashlib
import heapq
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from scale.workload import Arrival

# As HAProxy's hash-balance-factor of 150.
BOUND = 1.5
_POINTS = 64


@dataclass(frozen=True, slots=True)
class Costs:
    """Milliseconds, of ``bench/steps.py`` on two cores of an AMD EPYC.

    Attributes:
        step: Of any step.
        row: Each row more, with the base alone.
        adapted_row: What an adapter adds to a row.
        adapter: Each different adapter in a step.
        cold: Until an adapter that is not in memory can be used.
        stolen: The share of that which steps lose meanwhile.
        resume: From the loss of a replica until its requests are asked elsewhere.
    """

    step: float = 5.5
    row: float = 0.79
    adapted_row: float = 0.36
    adapter: float = 0.13
    cold: float = 14.8
    stolen: float = 0.5
    resume: float = 500.0


@dataclass(eq=False, slots=True)
class Job:
    """One request on its way; times in milliseconds."""

    arrival: Arrival
    asked: float
    left_prompt: int
    left_tokens: int
    first: float | None = None
    ready: float = 0.0
    is_cold: bool = False


@dataclass(eq=False, slots=True)
class Replica:
    """One engine.

    Args:
        number: Its place.
        costs: What steps take.
        room: Adapters that it keeps in memory.
        max_num_seqs, max_num_batched_tokens: As the server's flags.
    """

    number: int
    costs: Costs
    room: int
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    waiting: deque[Job] = field(default_factory=deque)
    running: list[Job] = field(default_factory=list)
    resident: OrderedDict[str, None] = field(default_factory=OrderedDict)
    stolen: float = 0.0
    is_busy: bool = False

    @property
    def load(self) -> int:
        return len(self.waiting) + len(self.running)

    def take(self, job: Job, now: float) -> None:
        """Queues a request, and begins to read its adapter if it has to."""
        job.ready = now
        name = job.arrival.adapter
        if name in self.resident:
            self.resident.move_to_end(name)
        else:
            job.is_cold = True
            job.ready += self.costs.cold
            self.stolen += self.costs.cold * self.costs.stolen
            self.resident[name] = None
            if len(self.resident) > self.room:
                self.resident.popitem(last=False)
        self.waiting.append(job)

    def step(self, now: float) -> tuple[float, list[Job]]:
        """Computes a step that begins now: when it ends, and which requests end with it."""
        self._admit(now)
        rows, names, budget = 0, set(), self.max_num_batched_tokens
        decoding = [job for job in self.running if not job.left_prompt]
        budget -= len(decoding)
        rows += len(decoding)
        names.update(job.arrival.adapter for job in decoding)
        prefilled: list[Job] = []
        for job in self.running:
            chunk = min(job.left_prompt, budget)
            if chunk <= 0:
                continue
            job.left_prompt -= chunk
            budget -= chunk
            rows += chunk
            names.add(job.arrival.adapter)
            if not job.left_prompt:
                prefilled.append(job)
        costs = self.costs
        took = costs.step + rows * (costs.row + costs.adapted_row) + len(names) * costs.adapter
        end = now + took + self.stolen
        self.stolen = 0.0
        for job in (*decoding, *prefilled):
            job.left_tokens -= 1
            if job.first is None:
                job.first = end
        done = [job for job in self.running if not job.left_prompt and job.left_tokens <= 0]
        if done:
            self.running = [job for job in self.running if job not in done]
        return end, done

    def _admit(self, now: float) -> None:
        passed: list[Job] = []
        while self.waiting and len(self.running) < self.max_num_seqs:
            job = self.waiting.popleft()
            (self.running if job.ready <= now else passed).append(job)
        self.waiting.extendleft(reversed(passed))

    def next_ready(self) -> float:
        """When the first of the requests that wait for an adapter can go on."""
        return min(job.ready for job in self.waiting)


Route = Callable[[str, Sequence[Replica]], Replica]


def by_mix(count: int) -> Route:
    """Consistent hashing with bounded load, of the header ``x-turret-mix``."""
    ring = sorted((_hash(f"{n}/{point}"), n) for n in range(count) for point in range(_POINTS))
    places = [place for place, _ in ring]

    def route(mix: str, replicas: Sequence[Replica]) -> Replica:
        living = {replica.number: replica for replica in replicas}
        mean = (sum(replica.load for replica in replicas) + 1) / len(replicas)
        first = bisect.bisect(places, _hash(mix))
        for offset in range(len(ring)):
            replica = living.get(ring[(first + offset) % len(ring)][1])
            if replica is not None and replica.load + 1 <= max(BOUND * mean, 1):
                return replica
        return min(replicas, key=lambda replica: replica.load)

    return route


def evenly(count: int) -> Route:
    """Each request to the replica with the fewest."""

    def route(mix: str, replicas: Sequence[Replica]) -> Replica:
        return min(replicas, key=lambda replica: replica.load)

    return route


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


@dataclass(slots=True)
class Run:
    """The result of replaying a trace.

    Attributes:
        jobs: All requests, those that ended and those that had not when the trace was over.
        ends: When each that ended did, in seconds.
        seconds: Of the trace.
    """

    jobs: list[Job]
    ends: list[float]
    seconds: float


class _Clock:
    """The events of one run, by time.

    Args:
        num_replicas: Of the fleet.
        route: Which replica a mix goes to.
        room: Adapters that a replica keeps.
        costs: What steps take.
    """

    def __init__(self, num_replicas: int, route: Route, room: int, costs: Costs) -> None:
        self._route = route
        self._room = room
        self._costs = costs
        self._living = [Replica(number, costs, room) for number in range(num_replicas)]
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = 0
        self.ends: list[float] = []

    def at(self, time: float, what: Callable[[float], None]) -> None:
        """Schedule an event at a time."""
        self._order += 1
        heapq.heappush(self._events, (time, self._order, what))

    def run(self, over: float) -> None:
        """Run all events until then."""
        while self._events and self._events[0][0] <= over:
            now, _, what = heapq.heappop(self._events)
            what(now)

    def ask(self, job: Job, now: float) -> None:
        """Handle a request that comes in."""
        replica = self._route(job.arrival.adapter, self._living)
        replica.take(job, now)
        self._work(replica, now)

    def _work(self, replica: Replica, now: float) -> None:
        if replica.is_busy or not replica.load:
            return
        end = now
        if not replica.running and replica.next_ready() > now:
            end = replica.next_ready()
        else:
            end, done = replica.step(now)
            self.ends.extend([end / 1e3] * len(done))
        replica.is_busy = True
        self.at(end, lambda then: self._stepped(replica, then))

    def _stepped(self, replica: Replica, now: float) -> None:
        if replica in self._living:
            replica.is_busy = False
            self._work(replica, now)

    def lose(self, now: float) -> None:
        """Lose the first replica; its requests go on elsewhere, after the tokens they have."""
        gone = self._living.pop(0)
        for job in (*gone.running, *gone.waiting):
            job.left_prompt = len(job.arrival.prompt) + job.arrival.new_tokens - job.left_tokens
            self.at(now + self._costs.resume, lambda then, job=job: self.ask(job, then))

    def replace(self, now: float) -> None:
        """Start another replica in its place, with nothing in memory."""
        self._living.insert(0, Replica(0, self._costs, self._room))


def simulate(
    trace: Sequence[Arrival],
    num_replicas: int,
    route: Route,
    *,
    room: int,
    costs: Costs | None = None,
    kill_at: float | None = None,
    back_after: float = 15.0,
) -> Run:
    """Plays a trace to its last arrival.

    Args:
        trace: By time.
        num_replicas: Of the fleet.
        route: Which replica a mix goes to.
        room: Adapters that a replica keeps.
        costs: What steps take.
        kill_at: Seconds until replica 0 is lost.
        back_after: Seconds until another takes its place.
    """
    clock = _Clock(num_replicas, route, room, costs or Costs())
    jobs = [Job(a, a.seconds * 1e3, len(a.prompt), a.new_tokens) for a in trace]
    for job in jobs:
        clock.at(job.asked, lambda now, job=job: clock.ask(job, now))
    if kill_at is not None:
        clock.at(kill_at * 1e3, clock.lose)
        clock.at((kill_at + back_after) * 1e3, clock.replace)
    clock.run(trace[-1].seconds * 1e3)
    return Run(jobs, clock.ends, trace[-1].seconds)
