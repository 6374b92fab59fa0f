"""Real third-party servers on this machine: an S3 server, and an OCI registry."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from servers.probe import free_port

needs_registry = pytest.mark.skipif(
    shutil.which("docker-registry") is None, reason="Debian's docker-registry is not installed"
)


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """The address of moto's server."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _running(command, port, folder / "moto.log"):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def oci_registry(folder: Path) -> Iterator[str]:
    """HOST:PORT of Docker's registry."""
    port = free_port()
    settings = {
        "version": 0.1,
        "storage": {"filesystem": {"rootdirectory": str(folder / "registry")}},
        "http": {"addr": f"127.0.0.1:{port}"},
    }
    config = folder / "registry.yml"
    # YAML is a superset of JSON.
    config.write_text(json.dumps(settings))
    command = ["docker-registry", "serve", str(config)]
    with _running(command, port, folder / "registry.log"):
        yield f"127.0.0.1:{port}"


@contextlib.contextmanager
def _running(command: Sequence[str], port: int, log: Path) -> Iterator[None]:
    with log.open("wb") as written:
        process = subprocess.Popen(command, stdout=written, stderr=written)
    try:
        end = time.monotonic() + 60.0
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1.0).close()
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(10.0)
