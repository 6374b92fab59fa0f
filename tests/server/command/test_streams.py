"""The command with standard streams that are full or no longer read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest
from builders.bases.tiny_models import save_tiny_model
from servers.fake_turret import fake_turret

ENTRY = "turret.server.command.entry"


def shell(arguments: str, redirection: str) -> tuple[int, str, str]:
    """The exit code and outputs of the command with a shell's redirection."""
    done = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} -m {ENTRY} {arguments} {redirection}"],
        capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_lost_output_is_reported_on_one_line() -> None:
    with fake_turret() as server:
        at = f"--address {server.address}"
        verbs = [f"generate hi {at}", f"generate hi --json {at}", f"adapters list {at}"]
        for arguments in [*verbs, "completion bash", "--help", "serve --help", "--version"]:
            code, out, err = shell(arguments, "> /dev/full")
            assert (code, out, err.count("\n")) == (1, "", 1), arguments
            assert err.endswith("No space left on device\n")


def test_a_closed_output_pipe_is_not_reported_as_an_error() -> None:
    program = f"{sys.executable} -m {ENTRY} completion bash; echo $? >&2"
    done = subprocess.run(
        ["bash", "-c", f"({program}) | true"], capture_output=True, text=True
    )  # fmt: skip
    assert done.stderr == "141\n"


def test_a_server_without_an_output_stops_with_0(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model")
    flags = f"--model {model} --address 127.0.0.1:0 --metrics-address none"
    command = f"exec {sys.executable} -m {ENTRY} serve {flags} >&- <&-"
    with subprocess.Popen(["sh", "-c", command], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if " serving " in line:
                break
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(30) == 0
    assert rest.splitlines()[-1].endswith("stopped exit_code=0")


def test_a_server_keeps_running_after_its_log_pipe_is_closed(tmp_path: Path) -> None:
    """The server runs like with ``2>&1 | head -1``."""
    model = save_tiny_model("llama", tmp_path / "model")
    socket_path = tmp_path / "socket"
    flags = f"--model {model} --address unix:{socket_path} --metrics-address none"
    command = [sys.executable, "-m", ENTRY, "serve", *flags.split()]
    reader, writer = os.pipe()
    os.close(reader)
    with subprocess.Popen(command, stdout=writer, stderr=writer) as process:
        os.close(writer)
        end = time.monotonic() + 60
        while not socket_path.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        with grpc.insecure_channel(f"unix:{socket_path}") as channel:
            grpc.channel_ready_future(channel).result(30)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
