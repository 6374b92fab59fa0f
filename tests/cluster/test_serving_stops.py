"""How ``turret cluster serve`` ends; a fleet of its own, when the machine has no other."""

from __future__ import annotations

from pathlib import Path

import pytest
from fleets.serving import start_fleet

from turret.clients.client import TurretClient

pytest.importorskip("ray")
pytestmark = pytest.mark.long


def test_sigterm_lets_answers_finish(tmp_path: Path) -> None:
    got: list[int] = []
    with (
        start_fleet(tmp_path, "--replicas", "1") as started,
        TurretClient(started.address) as client,
    ):
        stream = client.generate_stream("Once", max_tokens=120, temperature=0, ignore_eos=True)
        next(stream)
        started.process.terminate()
        got.append(1 + sum(1 for _ in stream))
        assert started.process.wait(90.0) == 0
    assert got[0] > 60
