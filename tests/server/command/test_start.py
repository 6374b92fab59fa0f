"""The first second of a start: what it says, in which form, and what signals do to it."""

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
# Sends a signal to itself when a module is looked for.
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
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_sigterm_ends_a_start_with_a_line(module: str, log_format: str) -> None:
    flags = ("serve", "--log-format", log_format, *FREE)
    done = run(module, str(int(signal.SIGTERM)), *flags, program=PROGRAM)
    assert done.returncode == 0
    last = done.stderr.splitlines()[-1]
    if log_format == "json":
        said = json.loads(last)
        assert (said["message"], said["signal"]) == ("stopped while starting", "SIGTERM")
    else:
        assert last == "turret serve: stopped by SIGTERM"
    assert "Traceback" not in done.stderr


def test_sighup_does_not_end_a_start() -> None:
    flags = ("serve", "--adapter-root", "/no/such", *FREE)
    done = run("turret.server.command.flags", str(int(signal.SIGHUP)), *flags, program=PROGRAM)
    assert done.returncode == 1
    assert "--adapter-root: /no/such does not exist" in done.stderr


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("--dtype", "bf16"), 2, "argument --dtype: invalid choice: 'bf16'"),
        (("--max-rank", "0"), 2, "--max-rank must be at least 1, not 0"),
        (("--adapter-root", "/no/such"), 1, "--adapter-root: /no/such does not exist"),
    ],
)
def test_refusals_and_notes_have_the_form_of_the_log(
    flags: tuple[str, ...], code: int, said: str
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
        assert lines[-1]["reason"].startswith(said)
        if code == 1:
            assert lines[0]["level"] == "WARNING"
            assert "did you mean 'TURRET_ADDRESS'?" in lines[0]["reason"]


def test_a_file_of_settings_that_is_not_there_is_named_by_who_asked_for_it() -> None:
    missing = "no.toml: No such file or directory"
    for flags, environ, said in (
        (("--config", "no.toml"), {}, f"--config: {missing}"),
        ((), {"TURRET_CONFIG": "no.toml"}, f"TURRET_CONFIG: {missing}"),
        (("--config", "/"), {}, "--config: / is a directory; it is a TOML file of settings"),
        (("--config", ""), {}, "argument --config: is empty"),
    ):
        done = run("serve", *flags, *FREE, **environ)
        assert done.returncode == 2
        assert done.stderr.startswith(f"turret serve: error: {said}\n")


def test_a_fleet_that_cannot_be_told_its_flags_says_so_in_the_form_of_the_log() -> None:
    done = run("cluster", "serve", "--log-format", "json", "--dtype", "bfloat")
    assert done.returncode == 2
    assert json.loads(done.stderr)["reason"].endswith("did you mean 'bfloat16'?")


def test_a_token_file_that_makes_no_sense_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("# ours\nhunter2 root\n")
    file.chmod(0o600)
    done = run("serve", "--token-file", str(file), *FREE)
    assert done.returncode == 1
    assert done.stderr == (
        f"turret serve: error: --token-file: {file}: line 2: a word after the token is no"
        " role; roles are inference, admin, metrics\n"
    )
