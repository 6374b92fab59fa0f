"""Cancellation of work on another thread."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import pytest

from turret.server.basics.work import Cancellation
from turret.server.errors import InvalidRequestError, UnavailableError


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
