"""A server with a user that owns only its state directory and its cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from builders.random_adapters import AdapterSpec, arch_of, write_adapter
from method_oracle import twin
from servers.server_under_test import start_server

from turret.clients.client import TurretClient
from turret.clients.errors import TurretRpcError

NOBODY = 65534


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory that every user can read, unlike pytest's directories."""
    if os.geteuid() != 0:
        pytest.skip("only root can start a server as another user")
    try:
        subprocess.run([sys.executable, "-c", ""], user=NOBODY, extra_groups=(), check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("another user cannot run this interpreter")
    folder = Path(tempfile.mkdtemp(prefix="turret-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
def test_a_server_needs_to_write_only_its_state_and_its_cache(folder: Path) -> None:
    model = shutil.copytree(twin("llama").folder, folder / "model")
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    for seed, name in enumerate(("a", "private")):
        write_adapter(folder / "adapters", arch_of(model), AdapterSpec(name, rank=4), seed)
    for path in folder.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    (folder / "adapters" / "private" / "adapter_config.json").chmod(0o400)
    for name in ("state", "cache"):
        (folder / name).mkdir()
        os.chown(folder / name, NOBODY, NOBODY)
    before = set(folder.rglob("*"))
    environment = {"XDG_CACHE_HOME": str(folder / "cache"), "HOME": "/nonexistent"}
    flags = ("--model", str(model), "--state-dir", str(folder / "state"))
    start = start_server(folder, *flags, environment=environment, user=NOBODY)
    with start as server, TurretClient(server.address) as client:
        client.adapters.load("a", "a")
        client.adapters.upload("b", folder / "adapters" / "a")
        for name in ("a", "b"):
            assert client.generate("a", max_tokens=2, adapters=name)
        assert client.chat("hi", max_tokens=2)
        with pytest.raises(TurretRpcError) as refused:
            client.adapters.load("private", "private")
        assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT
    # No other file was written; start_server checked that the server stopped correctly.
    written = set(folder.rglob("*")) - before
    own = (folder / "state", folder / "cache", folder / "server.log")
    assert not [path for path in written if not any(map(path.is_relative_to, own))]
    assert "internal error" not in (folder / "server.log").read_text()
