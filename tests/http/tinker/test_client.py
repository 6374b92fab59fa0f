"""The client ``tinker`` trains on a server, in a process of its own."""

from __future__ import annotations

import asyncio
import io
import json
import os
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from servers.fakes import MODEL_INFO
from servers.http_harness import http_harness
from servers.table_training import TableTraining
from servers.tinker_versions import CLIENTS

PROGRAM = Path(__file__).parents[2] / "support" / "servers" / "tinker_client.py"


async def run(url: str, folder: str) -> dict[str, Any]:
    """Run the program against a server; returns its output."""
    path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH", ""))))
    # The client would send its telemetry to the server, which discards it.
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, PROGRAM, url, MODEL_INFO.name),
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    said, complaints = await process.communicate()
    assert process.returncode == 0, complaints.decode()[-6000:]
    return json.loads(said)


@pytest.mark.parametrize("folder", CLIENTS)
async def test_a_client_trains_saves_and_samples(folder: str, tmp_path: Path) -> None:
    training = TableTraining(MODEL_INFO.vocab_size)
    async with http_harness(trainer=training, training=tmp_path / "training") as server:
        found = await run(f"http://{server.server.address}", folder)
        assert found["models"] == [MODEL_INFO.name]
        assert found["info"] == [MODEL_INFO.name, 4, True]
        assert found["many"] == [2 + index % 4 for index in range(9)]
        assert found["losses"] == sorted(found["losses"], reverse=True)
        assert found["losses"][-1] < 0.9 * found["losses"][0]
        # The losses with a ratio of 1 are sums of advantages.
        for loss in ("importance_sampling", "ppo"):
            assert found[loss] == pytest.approx(-2.5, abs=1e-5)
        assert found["saved"].endswith("/weights/first")
        assert found["same"], "resumed and uninterrupted training differ"
        assert found["fresh"] == found["scored"]
        for name, samples in found["samples"].items():
            # The fake engine's answer, which has two tokens.
            assert samples == [["stop", [72, 105], [-0.5, -0.25]]] * 3, name
        assert found["prompt"] == [None, *(-float(index) for index in range(1, 6))]
        used = {ref.name for request in server.engine.requests for ref in request.adapters}
        assert len(used) == 3
        for name in ("nan", "short", "outside", "loss", "method", "taken"):
            assert found[name][0] == "RequestFailedError", found[name]
        assert found["base_model"][0] == found["missing"][0] == "NotFoundError"
        assert found["last"][0] > 0
        run_id = found["saved"].split("/")[2]
        assert [run_id, 4] in found["runs"]
        assert found["checkpoints"] == ["sampler_weights/first", "weights/first"]
        assert (found["expires"], found["after"], found["rank"]) == (
            1,
            ["sampler_weights/first"],
            4,
        )
        assert found["async"] == 1
        if "archive" in found:
            answer = await server.client.get(found["archive"])
            with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
                names = archive.getnames()
            assert names == ["adapter_config.json", "adapter_model.safetensors"]
        for name, url in found.get("files", {}).items():
            answer = await server.client.get(url)
            assert len(answer.content) == int(answer.headers["content-length"]) > 0, name
        assert found.get("files", {"adapter_config.json": ""}).keys() >= {"adapter_config.json"}
