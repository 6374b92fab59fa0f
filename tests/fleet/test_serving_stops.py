"""The end of ``turret cluster serve``, in a separate fleet that is alone on the machine."""

from __future__ import annotations

import os
import signal
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
from fleets.serving import start_fleet

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
