"""Work on threads: fair pools and cancellation."""

from __future__ import annotations

import asyncio
import functools
import gc
import threading
import weakref
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from turret.server.basics.turns import FairPool, LoopTurns, completed
from turret.server.basics.work import Cancellation
from turret.server.errors import InvalidRequestError, UnavailableError


async def test_tenants_take_turns_and_a_cancelled_job_never_runs() -> None:
    pool, is_open, begun, ran = (
        FairPool(ThreadPoolExecutor(1)),
        threading.Event(),
        threading.Event(),
        [],
    )

    def block() -> None:
        begun.set()
        is_open.wait()

    asked = [asyncio.create_task(pool.run(b"a", block))]
    await asyncio.to_thread(begun.wait)
    jobs = [(b"a", 0), (b"a", 1), (b"b", 2), (b"a", 3), (b"c", 4), (b"b", 5), (b"b", 6)]
    asked += [
        asyncio.create_task(pool.run(tenant, lambda name=name: ran.append(name)))
        for tenant, name in jobs
    ]
    await asyncio.sleep(0)
    asked[1 + 3].cancel()
    await asyncio.sleep(0.01)
    is_open.set()
    await asyncio.gather(*asked, return_exceptions=True)
    assert ran == [0, 2, 4, 1, 5, 6]


async def test_a_cancelled_job_is_freed_while_all_threads_are_busy() -> None:
    pool, is_open = FairPool(ThreadPoolExecutor(1)), threading.Event()
    first, kept = pool.submit(b"a", is_open.wait), []
    for tenant in (b"a", b"b"):
        job = functools.partial(print, "never")
        kept.append(weakref.ref(job))
        asked = pool.submit(tenant, job)
        asked.cancel()
        del asked, job
    found = [each() for each in kept]
    is_open.set()
    assert first.result(30)
    assert found == [None, None]


async def test_running_jobs_of_one_tenant_leave_threads_for_others() -> None:
    pool, is_open = FairPool(ThreadPoolExecutor(4), 3), threading.Event()
    ran = list[int]()

    def take(number: int) -> None:
        is_open.wait()
        ran.append(number)

    asked = [asyncio.ensure_future(pool.run(b"a", lambda n=n: take(n))) for n in range(6)]
    try:
        for _ in range(3):
            assert await asyncio.wait_for(pool.run(b"b", lambda: 5), 30) == 5
        # A caller that is gone gives back no thread.
        asked[0].cancel()
        assert await asyncio.wait_for(pool.run(b"b", lambda: 5), 30) == 5
        assert not ran
    finally:
        is_open.set()
    # The jobs for which no thread was free also run.
    await asyncio.gather(*asked, return_exceptions=True)
    for _ in range(3000):
        if len(ran) == len(asked):
            break
        await asyncio.sleep(0.01)
    assert sorted(ran) == list(range(6))


class _Body:
    pass


async def test_a_job_that_fails_leaves_nothing_behind() -> None:
    pool, body = FairPool(ThreadPoolExecutor(1)), _Body()
    left = weakref.ref(body)

    def fail(body: _Body = body) -> None:
        raise ValueError(body)

    gc.collect()
    gc.disable()
    try:
        with pytest.raises(ValueError, match="_Body"):
            await pool.run(b"", fail)
        del body, fail
        # The thread drops the job after it has set the result.
        await pool.run(b"", lambda: None)
        assert left() is None
    finally:
        gc.enable()


async def test_one_coroutine_continues_per_turn_of_the_event_loop() -> None:
    turns, ran = LoopTurns(), list[tuple[int, bytes]]()
    tick = 0

    async def take(tenant: bytes) -> None:
        await turns.wait(tenant)
        ran.append((tick, tenant))

    asked = [asyncio.create_task(take(tenant)) for tenant in (b"a", b"a", b"a", b"a", b"b", b"b")]
    await asyncio.sleep(0)
    asked[3].cancel()
    while not all(task.done() for task in asked):
        tick += 1
        await asyncio.sleep(0)
    ticks, tenants = zip(*ran, strict=True)
    assert len(set(ticks)) == 5
    assert tenants == (b"a", b"b", b"a", b"b", b"a")
    await asyncio.wait_for(turns.wait(b"a"), 10)


@pytest.mark.parametrize("fails", [False, True])
async def test_work_is_completed_however_often_its_caller_is_cancelled(fails: bool) -> None:
    may_end, is_done, logged = asyncio.Event(), False, []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: logged.append(context))

    async def work() -> None:
        nonlocal is_done
        await may_end.wait()
        is_done = True
        if fails:
            raise InvalidRequestError("late")

    caller = asyncio.create_task(completed(work()))
    for _ in range(3):
        await asyncio.sleep(0)
        caller.cancel()
    await asyncio.sleep(0)
    assert not caller.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert is_done
    gc.collect()
    assert not logged, "nobody waits for the error any more"


def test_the_first_error_counts() -> None:
    cancellation = Cancellation()
    cancellation.check()
    assert not cancellation.is_set
    cancellation.set(UnavailableError("enough"))
    cancellation.set(InvalidRequestError("too late"))
    assert cancellation.is_set
    for _ in range(2):
        with pytest.raises(UnavailableError, match="enough"):
            cancellation.check()


@pytest.mark.parametrize("is_answered", [True, False])
def test_a_waiting_thread_is_woken_by_the_answer_or_the_cancellation(is_answered: bool) -> None:
    cancellation, future = Cancellation(), Future[int]()
    outcomes: list[bool] = []
    waiting = threading.Thread(target=lambda: outcomes.append(cancellation.wait(future)))
    waiting.start()
    if is_answered:
        future.set_result(1)
    else:
        cancellation.set(UnavailableError("enough"))
    waiting.join(10)
    assert outcomes == [is_answered]
