"""Scaling of replicas with the load on Ray Serve, in a separate fleet."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from fleets.serving import ServingFleet, start_fleet

from turret.clients.client import TurretClient

pytest.importorskip("ray")
pytestmark = pytest.mark.long

NAMES = ("sql", "json", "label")
PROMPT = "Once upon a time"
TOKENS = 24
# Only a few sequences run per replica, so that a short queue requires another one.
FLAGS = ("--min-replicas", "1", "--max-replicas", "2", "--threads", "1", "--max-num-seqs", "2")


class Asking:
    """Several clients that send requests in sequence, without retries.

    Args:
        address: The address of the fleet.
        wanted: The whole answer by adapter.
        count: The number of clients.
    """

    def __init__(self, address: str, wanted: Mapping[str, str], count: int) -> None:
        self._address, self._wanted = address, wanted
        self._is_over = threading.Event()
        self.failures: list[object] = []
        self.num_answers = 0
        self._threads = [
            threading.Thread(target=self._ask, args=(number,)) for number in range(count)
        ]

    def __enter__(self) -> Asking:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        with TurretClient(self._address, max_retries=0, resume=False, timeout=120.0) as client:
            while not self._is_over.is_set():
                number += 1
                name = NAMES[number % len(NAMES)]
                try:
                    answer = self._streamed(client, name) if number % 2 else _whole(client, name)
                    if answer != self._wanted[name]:
                        self.failures.append((name, answer))
                except Exception as error:
                    self.failures.append(error)
                self.num_answers += 1

    def _streamed(self, client: TurretClient, name: str) -> str:
        chunks = client.generate_stream(
            PROMPT, adapters=[name], max_tokens=TOKENS, temperature=0, ignore_eos=True
        )
        return "".join(chunk.text for chunk in chunks)


def _whole(client: TurretClient, name: str) -> str:
    return client.generate(
        PROMPT, adapters=[name], max_tokens=TOKENS, temperature=0, ignore_eos=True
    ).text


def until_there_are(count: int, fleet: ServingFleet, seconds: float) -> None:
    end = time.monotonic() + seconds
    while len(fleet.replicas()) != count:
        assert time.monotonic() < end, fleet.status()
        time.sleep(0.2)
    fleet.wait_until_whole(count)


def test_replicas_come_and_go_without_a_failed_request(tmp_path: Path) -> None:
    with start_fleet(tmp_path, *FLAGS) as fleet, TurretClient(fleet.address) as client:
        for name in NAMES:
            client.adapters.load(name, name)
        wanted = {name: _whole(client, name) for name in NAMES}
        with Asking(fleet.address, wanted, 10) as many:
            until_there_are(2, fleet, 120.0)
            time.sleep(10.0)
        # One replica suffices for two clients, and serves while the other one stops.
        with Asking(fleet.address, wanted, 2) as few:
            until_there_are(1, fleet, 180.0)
            time.sleep(5.0)
    print("answers", many.num_answers, few.num_answers)
    assert not many.failures
    assert not few.failures
    assert min(many.num_answers, few.num_answers) > 50
