"""The order of a model's commands, and what becomes of their results."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter

import pytest

from turret.server.api import futures
from turret.server.api.futures import CommandLog, Future, Futures, Result, Run
from turret.server.errors import InvalidRequestError, QueueFullError

OWNER = "somebody"


class Log:
    """A log whose commands record their numbers."""

    def __init__(self) -> None:
        self.futures = Futures()
        self.bytes: Counter[str] = Counter()
        self.log = CommandLog(self.futures, self.bytes)
        self.ran: list[int] = []
        self.may_run = asyncio.Event()
        self.may_run.set()

    def add(self, number: int, size: int = 0, error: Exception | None = None) -> Future:
        async def run() -> Result:
            await self.may_run.wait()
            self.ran.append(number)
            if error is not None:
                raise error
            return Result.of(number=number)

        work: Run = run
        return self.log.add(number, OWNER, f"r{number}", work, size)


async def result_of(future: Future) -> dict[str, object]:
    result = await future.wait(10)
    assert result is not None
    return json.loads(result.body)


async def test_commands_run_in_numerical_order_regardless_of_arrival() -> None:
    for seed in range(20):
        log, numbers = Log(), list(range(30))
        random.Random(seed).shuffle(numbers)
        found = {}
        for number in numbers:
            found[number] = log.add(number)
            if random.Random(seed + number).random() < 0.3:
                await asyncio.sleep(0)
        for number, future in found.items():
            assert await result_of(future) == {"number": number}
        assert log.ran == list(range(30))
        assert log.log.is_past(29)
        assert not log.log.is_past(30)


async def test_a_failed_command_does_not_stop_those_after_it() -> None:
    log = Log()
    failed = log.add(0, error=InvalidRequestError("no"))
    broken = log.add(1, error=RuntimeError("secret"))
    after = log.add(2)
    assert await result_of(failed) == {"error": "no", "category": "user"}
    said = await result_of(broken)
    assert said["category"] == "server"
    assert "secret" not in str(said["error"])
    assert await result_of(after) == {"number": 2}


async def test_a_full_queue_accepts_only_the_next_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(futures, "MAX_WAITING_BYTES", 100)
    log = Log()
    log.add(2, 60)
    with pytest.raises(QueueFullError):
        log.add(1, 60)
    assert log.futures.find(OWNER, "r1") is None
    first = log.add(0, 60)
    await result_of(first)
    second = log.add(1, 60)
    await result_of(second)
    await asyncio.sleep(0)
    assert log.ran == [0, 1, 2]
    assert not log.bytes


async def test_commands_do_not_wait_forever_for_one_that_never_arrives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = Log()
    later = [log.add(3), log.add(4, 10)]
    log.log.give_up()
    assert later[0].result is None
    monkeypatch.setattr(futures, "GAP_SECONDS", 0.0)
    log.log.give_up()
    for future in later:
        assert (await result_of(future))["category"] == "user"
    assert await result_of(log.add(5)) == {"number": 5}
    assert log.ran == [5]
    assert not log.bytes


async def test_a_closed_log_ends_the_command_that_runs_and_fails_the_others() -> None:
    log = Log()
    log.may_run.clear()
    first, second = log.add(0), log.add(1)
    await asyncio.sleep(0)
    log.log.abandon()
    closing = asyncio.ensure_future(log.log.close())
    assert (await result_of(second))["category"] == "server"
    assert not closing.done()
    log.may_run.set()
    await closing
    assert await result_of(first) == {"number": 0}


async def test_results_are_dropped_by_age_number_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(futures, "MAX_FUTURES", 3)
    monkeypatch.setattr(futures, "MAX_RESULT_BYTES", 50)
    kept = Futures()
    some = [kept.begin(OWNER, f"r{index}") for index in range(3)]
    with pytest.raises(QueueFullError):
        kept.begin(OWNER, "r3")
    # Another owner has room, and sees nothing of these.
    other = kept.begin("other", "r4")
    assert kept.find("other", "r0") is None
    kept.settle(some[1], Result(b"x" * 30))
    kept.settle(some[1], Result(b"second"))
    assert some[1].result == Result(b"x" * 30)
    kept.begin(OWNER, "r3")
    assert kept.find(OWNER, "r1") is None
    kept.settle(some[0], Result(b"x" * 30))
    kept.settle(some[2], Result(b"x" * 30))
    assert kept.find(OWNER, "r0") is None
    kept.settle(other, Result(b"x" * 500))
    assert kept.find("other", "r4") is other, "a large result must be there to be fetched once"
    monkeypatch.setattr(futures, "FETCHED_SECONDS", 0.0)
    other.fetched()
    kept.sweep()
    assert kept.find("other", "r4") is None
    assert [kept.find(OWNER, f"r{n}") is not None for n in range(4)] == [False, False, True, True]
