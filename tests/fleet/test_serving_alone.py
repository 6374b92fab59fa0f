"""Fleets on Ray Serve that are alone on the machine: their end, and scaling with the load."""

from __future__ import annotations

import os
import signal
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
from fleets.serving import Asking, ServingFleet, start_fleet

from turret.clients.client import TurretClient

pytest.importorskip("ray")
pytestmark = pytest.mark.long


def test_sigterm_to_the_whole_group_lets_answers_finish(tmp_path: Path) -> None:
    got: list[int] = []
    with (
        start_fleet(tmp_path, "--replicas", "1") as started,
        TurretClient(started.address) as client,
    ):
        stream = client.generate_stream("Once", max_tokens=120, temperature=0, ignore_eos=True)
        next(stream)
        tree = psutil.Process(started.process.pid).children(recursive=True)
        assert any("haproxy" in each.name() for each in tree)
        started.process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        os.killpg(started.process.pid, signal.SIGTERM)
        got.append(1 + sum(1 for _ in stream))
        assert started.process.wait(90.0) == 0
        _, left = psutil.wait_procs(tree, 10.0)
        assert left == []
        # Neither Ray nor its ingress logs errors about the requested stop.
        log = started.log.read_text()
        assert not any(word in log for word in ("Traceback", " failed", "crashed")), log
        # The log contains neither Ray's advice nor colours.
        said = ("HAProxy on other nodes", "Started Serve", "will not be applied", "\x1b")
        assert not any(word in log for word in said), log
        assert "nothing to read again: no --token-file" in log
    assert got[0] > 60


@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_a_dead_gcs_ends_the_whole_fleet_within_five_seconds(tmp_path: Path, name: str) -> None:
    with start_fleet(tmp_path, "--replicas", "1") as started:
        tree = started.tree()
        before = started.log.read_text()
        next(each for each in tree if each.name() == name).kill()
        killed = time.monotonic()
        assert started.process.wait(5.0) == 1
        _, left = psutil.wait_procs(tree, killed + 5.0 - time.monotonic())
        assert left == []
        with pytest.raises(OSError, match="refused"):
            urllib.request.urlopen(f"http://{started.http_address}/health", timeout=5)
        *_, line = started.log.read_text().removeprefix(before).splitlines()
        assert line.endswith(f"process={name}")
        assert not (started.state_dir / "cluster.json").exists()


pytest.importorskip("ray")

NAMES = ("sql", "json", "label")
PROMPT = "Once upon a time"
TOKENS = 24
# Only a few sequences run per replica, so that a short queue requires another one.
FLAGS = ("--min-replicas", "1", "--max-replicas", "2", "--threads", "1", "--max-num-seqs", "2")


def whole(client: TurretClient, name: str) -> str:
    return client.generate(
        PROMPT, adapters=[name], max_tokens=TOKENS, temperature=0, ignore_eos=True
    ).text


def streamed(client: TurretClient, name: str) -> str:
    chunks = client.generate_stream(
        PROMPT, adapters=[name], max_tokens=TOKENS, temperature=0, ignore_eos=True
    )
    return "".join(chunk.text for chunk in chunks)


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
        wanted = {name: whole(client, name) for name in NAMES}

        def ask(client: TurretClient, number: int) -> object:
            name = NAMES[number % len(NAMES)]
            answer = streamed(client, name) if number % 2 else whole(client, name)
            return answer != wanted[name] and (name, answer)

        once: Any = {"max_retries": 0, "resume": False}
        with Asking(fleet.address, ask, 10, **once) as many:
            until_there_are(2, fleet, 120.0)
            time.sleep(10.0)
        # One replica suffices for two clients, and serves while the other one stops.
        with Asking(fleet.address, ask, 2, **once) as few:
            until_there_are(1, fleet, 180.0)
            time.sleep(5.0)
    print("answers", many.num_answers, few.num_answers)
    assert not many.failures
    assert not few.failures
    assert min(many.num_answers, few.num_answers) > 50
