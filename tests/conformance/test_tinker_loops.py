"""Loops with the client ``tinker`` on a server with the bundled model: `make conformance`."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from checkout import ROOT
from servers.server_under_test import ServerUnderTest, start_server
from servers.tinker_versions import CLIENTS

from turret.server.models.model_source import resolve_model
from turret.server.models.sources.check import default_cache_dir

PROGRAM = ROOT / "tests" / "support" / "servers" / "tinker_loops.py"

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerUnderTest]:
    folder = tmp_path_factory.mktemp("tinker")
    flags = ("--training", "--state-dir", str(folder / "state"), "--http-address", "127.0.0.1:0")
    with start_server(folder, *flags) as running:
        yield running


def run(server: ServerUnderTest, folder: str, loop: str, steps: int) -> dict[str, Any]:
    """Run a loop of the program; returns the results that it prints."""
    path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH", ""))))
    tokenizer = resolve_model(None, default_cache_dir()).files
    done = subprocess.run(
        [
            sys.executable,
            PROGRAM,
            f"http://{server.http_address}",
            "base",
            tokenizer,
            loop,
            str(steps),
        ],
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("folder", CLIENTS)
def test_a_preference_is_learned_by_a_custom_loss(server: ServerUnderTest, folder: str) -> None:
    found = run(server, folder, "dpo", 8)
    losses, margins = zip(*found["curve"], strict=True)
    # Before the first step, the adapter is the reference.
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < 0.5 * losses[0]
    assert margins[-1] > margins[0]
    assert found["after"] > found["before"]


@pytest.mark.parametrize("folder", CLIENTS)
def test_a_reward_is_learned(server: ServerUnderTest, folder: str) -> None:
    found = run(server, folder, "rl", 16)
    # The sampler's log probabilities are the trainer's, bit by bit.
    assert found["exact"]
    assert found["tokens"] > 500
    curve = found["curve"]
    assert sum(curve[-3:]) / 3 > curve[0] + 0.4, curve
