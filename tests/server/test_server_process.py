"""A server that another process starts never outlives it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

_PARENT = """
import sys, time
from turret.server.server_process import ServerProcess
server = ServerProcess(environment={"PYTHONPATH": sys.argv[1]})
print(server.process.pid, flush=True)
time.sleep(600)
"""


def _is_there(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux's kernel ends it")
@pytest.mark.parametrize("is_early", [True, False])
def test_a_server_ends_if_its_parent_is_killed(is_early: bool, tmp_path: Path):
    # This replaces the real server, which takes seconds and may end because of its output.
    silent = tmp_path / "turret" / "server" / "cli.py"
    silent.parent.mkdir(parents=True)
    silent.write_text(f"import pathlib, time\npathlib.Path({str(tmp_path / 'up')!r}).touch()\n")
    with silent.open("a") as file:
        file.write("time.sleep(600)\n")
    for package in (silent.parent, silent.parent.parent):
        (package / "__init__.py").touch()
    command = [sys.executable, "-c", _PARENT, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        server = psutil.Process(int(parent.stdout.readline()))
        while not (is_early or (tmp_path / "up").exists()):
            time.sleep(0.01)
        parent.kill()
    end = time.monotonic() + 20.0
    try:
        while _is_there(server):
            assert time.monotonic() < end
            time.sleep(0.02)
    finally:
        if _is_there(server):
            server.kill()
