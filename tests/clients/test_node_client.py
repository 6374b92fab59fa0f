"""A client in another language, generated from the .proto files alone, with the real server."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Protocol

import pytest

HERE = Path(__file__).parent
PROTO = HERE.parent.parent / "proto"
# npm's errors without a network, as opposed to an invalid dependency.
NO_NETWORK = ("ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ECONNRESET", "ETIMEDOUT", "ENETUNREACH")


class LiveServer(Protocol):
    """The fixture ``live_server``: a running turret."""

    address: str


@pytest.fixture(scope="module")
def node_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client with its dependencies, installed from the lock file."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("node")
    for name in ("package.json", "package-lock.json", "client.mjs"):
        shutil.copy(HERE / "node" / name, folder)
    command = ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100)
    if result.returncode != 0 and any(word in result.stderr for word in NO_NETWORK):
        pytest.skip("npm reaches no registry")
    assert result.returncode == 0, result.stderr
    return folder


def test_the_node_client_is_served(node_folder: Path, live_server: LiveServer):
    command = ["node", "client.mjs", live_server.address, str(PROTO)]
    result = subprocess.run(command, cwd=node_folder, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)

    assert answer["model"]["vocab_size"] > 0
    assert answer["model"]["quantization"] == "nf4"

    whole, chunks = answer["generate"], answer["stream"]
    assert whole["finish_reason"] in ("STOP", "LENGTH")
    assert whole["usage"]["completion_tokens"] > 0
    assert whole["adapters_used"] == []
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    assert [i for chunk in chunks for i in chunk["token_ids"]] == whole["token_ids"]
    assert {c["finish_reason"] for c in chunks[:-1]} <= {"FINISH_REASON_UNSPECIFIED"}
    assert chunks[-1]["finish_reason"] == whole["finish_reason"]
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]

    assert answer["refusal"]["code"] == "NOT_FOUND"
    assert "no-such-adapter" in answer["refusal"]["message"]
    assert answer["refusal"]["has_reason"]
    assert answer["cancelled"] == "CANCELLED"
