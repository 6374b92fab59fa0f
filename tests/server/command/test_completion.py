"""The completions of the shells."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT
from servers.loaded_examples import examples_loaded
from servers.server_under_test import ServerUnderTest

from turret.server.command.completion import script


def completed(line: str, folder: Path) -> set[str]:
    """The completions of the last word of a line."""
    out = folder / "completions"
    environ = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(out),
    }
    environ |= {"COMP_LINE": line, "COMP_POINT": str(len(line)), "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-m", "turret.server.command.entry"],
        env=os.environ | environ, capture_output=True, text=True, check=True, cwd=folder,
    )  # fmt: skip
    assert done.stderr == ""
    return {word.strip() for word in out.read_text().splitlines()} - {""}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_accepts_its_completion_script(shell: str) -> None:
    if path := shutil.which(shell):
        subprocess.run([path, "-n"], input=script(shell), text=True, check=True)
    assert "turret" in script(shell)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("turret comp", {"compile", "completion"}),
        ("turret adapters lo", {"load"}),
        ("turret serve --dty", {"--dtype"}),
        ("turret serve --log-format ", {"text", "json"}),
        ("turret serve --max-rank ", set()),
        ("turret serve --device c", {"cpu", "cuda"}),
        ("turret train run t.toml --method lor", {"lora"}),
        ("turret train run fi", {"file.toml"}),
        ("turret serve --adapter-root fi", {"file.toml"}),
        ("turret generate fi", set()),
        ("turret generate --address 127.0.0.1:1 -a ", set()),
        ("turret adapters load s", set()),
    ],
)
def test_completions_of_command_lines(line: str, expected: set[str], tmp_path: Path) -> None:
    (tmp_path / "file.toml").touch()
    assert completed(line, tmp_path) == expected


def test_completion_lists_the_adapters_of_the_server(
    live_server: ServerUnderTest, tmp_path: Path
) -> None:
    with examples_loaded(live_server, "json"):
        names = completed(f"turret adapters get --address {live_server.address} ", tmp_path)
    assert "json" in names
