"""The speed of a server beside a busy process, which with OpenMP would drop to a hundredth."""

from __future__ import annotations

import importlib

import pytest
from checkout import ROOT

from turret.clients.client import TurretClient
from turret.kernels.cpu.native import library

# The share is at least 0.5 on an idle machine, but tests run in parallel.
LEAST_SHARE = 0.15


@pytest.mark.long
@pytest.mark.skipif(library() is None, reason="there is no C compiler")
def test_one_request_keeps_its_share_beside_a_busy_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")
    neighbours = importlib.import_module("neighbours")
    common = importlib.import_module("common.session")
    args = common.make_parser("", 1).parse_args(["--force", "--no-save"])
    with common.session("neighbours", args) as run:
        loras = run.write.loras(1, 8)
        with run.serving(loras) as server, TurretClient(server.address) as client:
            source = neighbours.PromptSource(client, 64)
            neighbours.decode_rate(source, server.address, loras, 8)
            alone = neighbours.decode_rate(source, server.address, loras)
            with neighbours.busy_loop():
                beside = neighbours.decode_rate(source, server.address, loras)
    assert beside > LEAST_SHARE * alone
