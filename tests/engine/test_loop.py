"""The engine thread's loop on a real registry and scheduler, run step by step without a model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from builders.registries import Gate, Registries, refs, until
from method_oracle import serve
from said import says
from simulation.parts import Clock

from turret.kernels.cpu import library, num_threads
from turret.server.adapters import leases
from turret.server.adapters.device import AdapterMemoryError
from turret.server.adapters.registry import AdapterRegistry
from turret.server.engine import loop
from turret.server.engine.answer import Answer, AnswerMemory, AnswerText, Stream
from turret.server.engine.loop import EngineLoop, Outbox
from turret.server.engine.scheduling.block_pool import BlockPool
from turret.server.engine.scheduling.request import Output, Request, StopConditions
from turret.server.engine.scheduling.scheduler import Scheduler
from turret.server.engine.scheduling.sequence import Sequence, Step
from turret.server.engine.step.runner import DeviceFullError, StepResult
from turret.server.engine.step.sampler import Draw
from turret.server.errors import BudgetExceededError, TurretError
from turret.server.metrics import Metrics
from turret.server.models.tokenizer import TokenStream

MAX_STEPS = 200


class FakeText(TokenStream):
    """A text stream for tokens without text."""

    def __init__(self) -> None:
        pass

    def push(self, token_id: int) -> str:
        return ""


class FakeRunner:
    """Draws token 1 for all sequences."""

    is_asynchronous = False

    def run(self, step: Step, meanwhile: Callable[[], None] = lambda: None) -> StepResult:
        meanwhile()
        return StepResult(
            {item.sequence: [Draw(1, 0.0)] for item in step.scheduled if item.samples}
        )

    def forget(self, sequence: Sequence) -> None: ...
    def forget_adapter(self, key: str) -> None: ...
    def refusal(self, sequence: Sequence) -> None: ...


class Driven:
    """A loop whose iterations are the test's clock.

    Attributes:
        ended: The ended requests, in order.
        events: A request's name and the number of its tokens, for each output, in order.
        errors: The errors of requests that did not finish.
        num_schedules: The number of calls of the scheduler.
    """

    def __init__(
        self,
        registry: AdapterRegistry,
        fits: Callable[[Sequence, list[Sequence]], bool] = lambda _s, _r: True,
        preempt_after_seconds: float | None = None,
    ) -> None:
        self.ended: list[str] = []
        self.events: list[str] = []
        self.errors: dict[str, TurretError] = {}
        self.num_schedules = 0
        self.registry = registry
        self.scheduler = Scheduler(
            BlockPool(64, 4),
            max_num_seqs=8,
            max_num_batched_tokens=64,
            is_ready=lambda sequence: self.loop.is_ready(sequence),
            fits=fits,
            preempt_after_seconds=preempt_after_seconds,
        )
        schedule = self.scheduler.schedule

        def counted(now: float) -> Step:
            self.num_schedules += 1
            return schedule(now)

        self.scheduler.schedule = counted  # type: ignore[method-assign]
        runner: Any = FakeRunner()
        self.metrics = Metrics()
        self.loop = EngineLoop(
            scheduler=self.scheduler,
            runner=runner,
            adapters=registry,
            metrics=self.metrics,
            send=self._took,
        )
        self._names: dict[Stream, str] = {}

    def ask(
        self,
        name: str,
        adapters: str,
        max_tokens: int = 1,
        *,
        text: AnswerText | None = None,
        deadline: float | None = None,
        tenant: bytes = b"",
    ) -> Sequence:
        """Post a request for these one-letter adapters."""
        request = Request(
            request_id=name,
            prompt_token_ids=(1, 2, 3),
            stop=StopConditions(max_tokens=max_tokens),
            deadline=deadline,
            tenant=tenant,
        )
        sequence = Sequence(request, self.registry.acquire(refs(adapters)), loop.time.monotonic())
        stream = Stream(lambda: None, AnswerMemory(1 << 30))
        answer = Answer(
            sequence,
            stream,
            text or AnswerText(FakeText(), request.stop, frozenset()),
            token_text=str,
            max_tokens=max_tokens,
        )
        self._names[stream] = name
        self.loop.submit(answer)
        return sequence

    def read(self) -> None:
        """Process the posted items."""
        # This item keeps reading from blocking the test.
        self.loop.post(lambda: None)
        self.loop._read_inbox()

    def step(self) -> None:
        """One iteration of the loop."""
        self.read()
        self.loop._flush()
        self.loop._step()

    def finish(self, *names: str) -> None:
        """Run steps until these requests have ended."""
        for _ in range(MAX_STEPS):
            if set(names) <= set(self.ended):
                return
            self.step()
            # A read on another thread may be the only pending work.
            time.sleep(0.001)
        raise AssertionError(f"{set(names) - set(self.ended)} never ended")

    def _took(self, outbox: Outbox) -> None:
        for stream, item in outbox:
            if isinstance(item, Output):
                self.events.append(f"{self._names[stream]} {len(item.token_ids)}")
            if isinstance(item, TurretError):
                self.errors[self._names[stream]] = item
            if isinstance(item, TurretError) or item.finish is not None:
                self.ended.append(self._names[stream])


@pytest.fixture(autouse=True, params=[False, True], ids=["at once", "later"])
def is_asynchronous(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether tokens are handed out while the device computes the next step."""
    monkeypatch.setattr(FakeRunner, "is_asynchronous", request.param)
    return request.param


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Registries]:
    registries = Registries(tmp_path)
    yield registries
    registries.close()


def test_requests_survive_a_device_without_memory(make: Registries) -> None:
    """Steps of more than twelve tokens fail, but all requests are served by the engine."""
    driven = Driven(make(2, load="a"))
    runner = FakeRunner()
    sizes = []

    def run(step: Step, meanwhile: Callable[[], None]) -> StepResult:
        sizes.append(sum(item.num_new for item in step.scheduled))
        if sizes[-1] > 12:
            raise DeviceFullError("CUDA out of memory")
        return FakeRunner.run(runner, step)

    with patch.object(driven.loop._runner, "run", run):
        for number in range(8):
            driven.ask(f"{number}", "a", max_tokens=3)
        driven.finish(*map(str, range(8)))
    assert driven.errors == {}
    assert sizes[0] == 8 * 3
    # The loop tries larger steps again only when requests end.
    assert sum(size > 12 for size in sizes) <= 8
    assert not driven.loop.is_dead


def test_a_long_answer_does_not_keep_another_tenants_adapter_out(
    make: Registries, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is memory for one adapter."""
    clock = Clock()
    for module in (loop, leases):
        monkeypatch.setattr(module, "time", clock)
    driven = Driven(make(1, load="ab"), preempt_after_seconds=5.0)
    long = driven.ask("long", "b", max_tokens=150, tenant=b"hog")
    driven.step()
    driven.ask("short", "a", max_tokens=2, tenant=b"polite")
    while long.num_preemptions == 0:
        driven.step()
        assert "long" not in driven.ended
        clock.now += 0.1
    until(lambda: driven.step() or "short" in driven.ended)
    # The adapter of the long answer comes back, and the answer goes on.
    assert "long" not in driven.ended
    until(lambda: driven.step() or "long" in driven.ended)
    assert driven.errors == {}
    assert long.num_generated == 150


def test_a_request_that_can_never_fit_is_the_only_one_to_end(make: Registries) -> None:
    driven = Driven(make(2, load="a"))
    runner = FakeRunner()

    def run(step: Step, meanwhile: Callable[[], None]) -> StepResult:
        if any(item.sequence.mix.members for item in step.scheduled):
            raise DeviceFullError("CUDA out of memory")
        return FakeRunner.run(runner, step)

    with patch.object(driven.loop._runner, "run", run):
        driven.ask("small", "", max_tokens=9)
        driven.ask("large", "a", max_tokens=3)
        driven.finish("small", "large")
    assert set(driven.errors) == {"large"}
    assert isinstance(driven.errors["large"], BudgetExceededError)


def test_an_adapter_that_does_not_fit_ends_only_its_own_requests(make: Registries) -> None:
    """No other request is preempted, and steps stay as large."""
    driven = Driven(make(2, load="ab"))
    runner, sizes = FakeRunner(), list[int]()

    def run(step: Step, meanwhile: Callable[[], None]) -> StepResult:
        sizes.append(len(step.scheduled))
        for item in step.scheduled:
            for adapter, _ in item.sequence.mix.members:
                if adapter.name == "b":
                    raise AdapterMemoryError(adapter.key)
        return FakeRunner.run(runner, step)

    with patch.object(driven.loop._runner, "run", run):
        for number in range(4):
            driven.ask(f"a{number}", "a", max_tokens=3)
        for number in range(2):
            driven.ask(f"b{number}", "b", max_tokens=3)
        driven.finish(*(f"a{number}" for number in range(4)), "b0", "b1")
    assert set(driven.errors) == {"b0", "b1"}
    assert all(says("DEVICE_MEMORY_SHORT")(error) for error in driven.errors.values())
    assert sizes[:2] == [6, 4]


def test_a_ready_request_does_not_wait_for_one_of_its_mix_that_is_not(make: Registries) -> None:
    """Otherwise, both wait forever: the second holds the adapter that the first needs evicted.

    There is room for two adapters. ``first`` requested ``d`` while it was on disk, and is behind
    ``both`` in the cache's queue. ``second`` requested ``d`` when it was resident, and holds it.
    ``both`` needs the place of ``d``, so ``first`` gets its turn after ``second`` has ended.
    """
    registry = make(2, load="dabc")
    driven = Driven(registry)
    gate = Gate(registry)
    gate.open()
    driven.ask("b", "b", max_tokens=30)
    driven.ask("c", "c", max_tokens=3)
    driven.step()
    driven.ask("early", "d", max_tokens=30)
    driven.ask("both", "ac")
    first = driven.ask("first", "d")
    driven.finish("c")
    until(lambda: registry.get("d").residency == "host")
    second = driven.ask("second", "d")
    driven.read()
    assert driven.loop.is_ready(second)
    assert not driven.loop.is_ready(first)
    driven.finish("second", "both", "first", "early", "b")
    assert driven.ended.index("second") < driven.ended.index("both") < driven.ended.index("first")
    assert registry.get("d").in_flight == 0


def test_the_thread_sleeps_while_nothing_can_be_computed(make: Registries) -> None:
    """The reason does not matter; here, the adapters of the ready request do not fit."""
    registry = make(2, load="a")
    fits = threading.Event()
    driven = Driven(registry, fits=lambda _s, _r: fits.is_set())
    thread = threading.Thread(target=driven.loop.run, daemon=True)
    thread.start()
    driven.ask("a", "a")
    until(lambda: driven.num_schedules > 0)
    time.sleep(0.2)
    assert driven.num_schedules <= 3
    fits.set()
    driven.loop.post(lambda: None)
    until(lambda: driven.ended == ["a"])
    driven.loop.post(driven.loop.stop)
    thread.join(10)
    assert not thread.is_alive()


def test_only_requests_count_as_waiting(make: Registries) -> None:
    """Otherwise, a server would reject requests because of arriving adapters or cancellations."""
    driven = Driven(make(2, load="a"))
    for _ in range(5):
        driven.loop.post(lambda: None)
    assert driven.loop.num_waiting == 0
    waiting = lambda: (driven.loop.num_waiting, *map(driven.loop.num_waiting_of, (b"x", b"y")))  # noqa: E731
    driven.ask("one", "a", tenant=b"x")
    assert waiting() == (1, 1, 0)
    driven.read()
    driven.ask("two", "a", tenant=b"y")
    driven.ask("three", "a", tenant=b"x")
    assert waiting() == (3, 2, 1)
    driven.read()
    assert waiting() == (3, 2, 1)
    driven.finish("one", "two", "three")
    assert waiting() == (0, 0, 0)


class BrokenText(AnswerText):
    """A text stream that fails for a token or at the end."""

    def __init__(self, broken: str) -> None:
        super().__init__(FakeText(), StopConditions(), frozenset())
        self._broken = broken

    def take(self) -> str:
        if self._broken == "take":
            raise OverflowError("take")
        return ""

    def flush(self) -> str:
        if self._broken != "take":
            raise OverflowError("flush")
        return ""


@pytest.mark.parametrize("broken", ["take", "flush", "wait", "cancel", "late"])
def test_a_fault_in_one_request_ends_only_that_request(
    make: Registries, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """After any fault in a request, the others continue, and nothing of that request remains."""
    registry = make(2, load="ab")
    driven = Driven(registry)
    driven.ask("polite", "a", max_tokens=20)
    driven.step()
    bad = driven.ask(
        "bad",
        "b",
        max_tokens=2 if broken == "flush" else 50,
        text=BrokenText(broken),
        deadline=time.monotonic() + 1000 if broken == "late" else None,
    )
    with monkeypatch.context() as patch:
        if broken == "wait":

            def fail(self: object, callback: object) -> bool:
                raise OverflowError("wait")

            patch.setattr(type(bad.mix), "ensure_host", fail)
        driven.step()
    if broken == "take":
        # The fault ends the request at its first token, not at its last one.
        driven.step()
        assert list(driven.errors) == ["bad"]
    if broken == "cancel":
        driven.loop.post(lambda: driven.loop.cancel(bad))
    if broken == "late":
        driven.loop._expire(time.monotonic() + 1001)
    driven.finish("bad", "polite")
    assert list(driven.errors) == ["bad"]
    assert driven.errors["bad"].reason == "INTERNAL"
    assert not driven.loop.is_dead
    assert registry.get("b").in_flight == 0
    driven.ask("next", "b")
    driven.finish("next")
    assert driven.scheduler.blocks.num_active == 0


@pytest.mark.parametrize("kind", [OverflowError, BaseException])
def test_an_error_that_ends_the_thread_ends_every_request(
    make: Registries, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    """Panics of libraries in Rust are not Exceptions."""
    registry = make(1, load="a")
    driven = Driven(registry)

    def fail(now: float) -> None:
        raise kind("schedule")

    monkeypatch.setattr(driven.scheduler, "schedule", fail)
    driven.ask("one", "a")
    driven.ask("two", "a")
    driven.loop.run()
    assert driven.loop.is_dead
    assert sorted(driven.errors) == ["one", "two"]
    assert registry.get("a").in_flight == 0


def test_a_deadline_in_ten_thousand_years_is_accepted(make: Registries) -> None:
    driven = Driven(make(2, load="a"))
    thread = threading.Thread(target=driven.loop.run, daemon=True)
    thread.start()
    gate = Gate(driven.registry)
    driven.ask("far", "a", deadline=time.monotonic() + 3.6e11)
    time.sleep(0.1)
    gate.open()
    until(lambda: driven.ended == ["far"])
    assert not driven.errors
    driven.loop.post(driven.loop.stop)
    thread.join(10)
    assert not thread.is_alive()


def test_tokens_are_delivered_while_the_next_step_is_computed(
    make: Registries, is_asynchronous: bool
) -> None:
    driven = Driven(make(1, load="a"))
    events, run = driven.events, driven.loop._runner.run

    def noting(step: Step, meanwhile: Callable[[], None]) -> StepResult:
        events.append("launched")
        meanwhile()
        events.append("computed")
        return run(step, lambda: None)

    with patch.object(driven.loop._runner, "run", noting):
        driven.ask("one", "a", max_tokens=3)
        cut = driven.ask("two", "a", max_tokens=9)
        for _ in range(3):
            driven.step()
        driven.loop.post(lambda: driven.loop.cancel(cut))
        driven.read()
        driven.loop._flush()
    between = ["one 1", "two 1"]
    first = ["launched", "computed", *([] if is_asynchronous else between)]
    second = ["launched", *(between if is_asynchronous else []), "computed"]
    third = ["launched", *(between if is_asynchronous else []), "computed"]
    # An answer that ends is handed out at once. A cancelled one gets its tokens first.
    last = ["one 1", "two 1", "two 0"]
    assert events == [*first, *second, *([] if is_asynchronous else between), *third, *last]
    assert driven.ended == ["one", "two"]


def test_every_step_and_every_gap_between_tokens_is_reported_once(make: Registries) -> None:
    driven = Driven(make(2, load="ab"))
    driven.ask("one", "a", max_tokens=3)
    driven.ask("two", "b", max_tokens=5)
    driven.finish("one", "two")
    # The step after the last one has nothing to compute.
    driven.step()
    counts = {
        name: driven.metrics.registry.get_sample_value(f"turret_{name}_count")
        for name in ("step_tokens", "inter_token_seconds", "time_to_first_token_seconds")
    }
    steps = 5
    assert counts == {
        "step_tokens": steps,
        "inter_token_seconds": 2 + 4,
        "time_to_first_token_seconds": 2,
    }


def test_tokens_are_delivered_if_there_is_no_next_step(make: Registries) -> None:
    """The scheduler may hold a running sequence back."""
    driven = Driven(make(1, load="a"))
    driven.ask("one", "a", max_tokens=3)
    driven.step()
    schedule = driven.scheduler.schedule
    driven.scheduler.schedule = lambda now: Step((), (), 0)  # type: ignore[method-assign]
    driven.step()
    assert driven.events == ["one 1"]
    driven.scheduler.schedule = schedule  # type: ignore[method-assign]
    driven.finish("one")
    assert driven.events == ["one 1"] * 3


# The threads that compute for the engine's thread.


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
async def test_torch_uses_one_thread_if_the_kernels_have_their_own(
    dtype: str, tmp_path: Path
) -> None:
    """Two teams that spin while they wait compete for the processors."""
    found: list[tuple[int, int]] = []
    asked = threading.Event()

    def ask() -> None:
        found.append((num_threads(), torch.get_num_threads()))
        asked.set()

    async with serve("llama", tmp_path, dtype=dtype) as harness:
        harness.engine._loop.post(ask)
        assert asked.wait(30)
    has_own = dtype == "bfloat16" and library() is not None
    every = torch.get_num_threads()
    assert found == [(every, 1 if has_own else every)]
