"""The first second of a start: messages, signals, progress, and streams that are full or closed."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest
from builders.bases.tiny_models import save_tiny_model
from checkout import ROOT
from rich.console import Console
from servers.fake_turret import fake_turret

from turret.server import log

FREE = ("--address", "127.0.0.1:0", "--metrics-address", "none")
# A program that sends itself a signal when a module is imported.
PROGRAM = """
import os, signal, sys
module, number, *sys.argv[1:] = sys.argv[1:]
class Sender:
    def find_spec(self, name, path, target=None):
        if name == module: os.kill(os.getpid(), int(number))
sys.meta_path.insert(0, Sender())
from turret.server.command.entry import main
sys.exit(main())
"""


def run(*arguments: str, program: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    how = ("-c", program) if program else ("-m", "turret.server.command.entry")
    return subprocess.run(
        [sys.executable, *how, *arguments], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")} | environ,
    )  # fmt: skip


@pytest.mark.parametrize("module", ["turret.server.command.flags", "turret.server.app"])
def test_sigterm_ends_startup_without_a_failure(module: str) -> None:
    done = run(module, str(int(signal.SIGTERM)), "serve", *FREE, program=PROGRAM)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


def test_sighup_does_not_end_startup() -> None:
    flags = ("serve", "--adapter-root", "/no/such", *FREE)
    done = run("turret.server.command.flags", str(int(signal.SIGHUP)), *flags, program=PROGRAM)
    assert done.returncode == 1
    assert "--adapter-root: " in done.stderr


@pytest.mark.parametrize(
    ("flags", "code", "place", "reason"),
    [
        (("--dtype", "bf16"), 2, "--dtype", "NOT_ONE_OF"),
        (("--max-rank", "0"), 2, "--max-rank", "TOO_SMALL"),
        (("--adapter-root", "/no/such"), 1, "--adapter-root", "FOLDER_MISSING"),
    ],
)
def test_errors_and_notes_have_the_format_of_the_log(
    flags: tuple[str, ...], code: int, place: str, reason: str
) -> None:
    misspelt = {"TURRET_ADRESS": "x"}
    for form, environ in (
        (("--log-format=json",), misspelt),
        ((), misspelt | {"TURRET_LOG_FORMAT": "json"}),
    ):
        done = run("serve", *form, *flags, *FREE, **environ)
        assert done.returncode == code
        lines = [json.loads(line) for line in done.stderr.splitlines()]
        assert (lines[-1]["level"], lines[-1]["message"]) == ("ERROR", "cannot start")
        assert (lines[-1]["field"], lines[-1]["reason"]) == (place, reason)
        if code == 1:
            assert lines[0]["level"] == "WARNING"
            assert (lines[0]["field"], lines[0]["reason"]) == ("TURRET_ADRESS", "UNKNOWN_VARIABLE")


def test_a_missing_settings_file_is_reported_with_the_flag_or_variable() -> None:
    for flags, environ, place, reason in (
        (("--config", "no.toml"), {}, "--config", "FILE_UNREADABLE"),
        ((), {"TURRET_CONFIG": "no.toml"}, "TURRET_CONFIG", "FILE_UNREADABLE"),
        (("--config", "/"), {}, "--config", "FILE_UNREADABLE"),
        (("--config", ""), {}, "--config", "EMPTY"),
    ):
        done = run("serve", "--log-format=json", *flags, *FREE, **environ)
        assert done.returncode == 2
        said = json.loads(done.stderr)
        assert (said["field"], said["reason"]) == (place, reason)


def test_invalid_flags_of_a_fleet_are_reported_in_the_logs_format() -> None:
    done = run("cluster", "serve", "--log-format", "json", "--dtype", "bfloat")
    assert done.returncode == 2
    said = json.loads(done.stderr)
    assert (said["field"], said["reason"]) == ("--dtype", "NOT_ONE_OF")


def test_an_invalid_token_file_is_reported_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("# ours\nhunter2 root\n")
    file.chmod(0o600)
    done = run("serve", "--token-file", str(file), *FREE)
    assert done.returncode == 1
    assert done.stderr.startswith(f"turret serve: error: --token-file: {file}: ")
    assert str(file) in done.stderr
    assert "hunter2" not in done.stderr


ENTRY = "turret.server.command.entry"


def shell(arguments: str, redirection: str) -> tuple[int, str, str]:
    """The exit code and outputs of the command with a shell's redirection."""
    done = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} -m {ENTRY} {arguments} {redirection}"],
        capture_output=True, text=True, stdin=subprocess.DEVNULL,
        # Only a buffered output is lost after the command has printed it.
        env={**os.environ, "PYTHONUNBUFFERED": ""},
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
    # The exit code of a misspelt flag does not depend on whether the error can be printed.
    assert shell("serve --hlp", "2> /dev/full") == (2, "", "")


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
    """The server runs as with ``2>&1 | head -1``."""
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


def test_progress_of_long_work_is_logged_at_intervals(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = iter(range(1000))
    report = log._lines(lambda: 0.5 * next(clock))
    for done in range(40):
        report("Quantising", done, 40)
    said = [record.__dict__["fields"] for record in caplog.records]
    assert [each["total"] for each in said] == [40] * len(said)
    assert 2 <= len(said) <= 4
    report("Quantising", 40, 40)
    report("Loading", 1, 2)
    assert len(caplog.records) == len(said)


def test_log_lines_appear_above_the_progress_bar_and_a_stop_removes_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = io.StringIO()
    console = Console(file=drawn, force_terminal=True, width=60, color_system=None)
    monkeypatch.setattr(log, "Console", lambda **_: console)
    root, handler = logging.getLogger(), logging.StreamHandler(sys.stderr)
    monkeypatch.setattr(root, "handlers", [handler])
    long = "call finished [bold] " + "x" * 100
    with log.progress_bar() as report:
        report("Loading layers", 6, 30)
        root.warning(long)
        # The line before the bar is erased, and the bar is drawn again below the message.
        before, _, after = drawn.getvalue().partition(long)
        assert before.endswith("\x1b[2K")
        assert after.startswith("\n")
        assert "Loading layers" in after
        log.end_bars()
        assert drawn.getvalue().endswith("\x1b[?25h")
        ended = len(drawn.getvalue())
        report("Loading layers", 7, 30)
        root.warning("stopped")
    assert drawn.getvalue()[ended:] == "stopped\n"
    root.warning("after")
    assert capsys.readouterr().err == "after\n"
