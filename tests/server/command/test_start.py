"""The first second of a start: its messages, their format, and signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT

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
