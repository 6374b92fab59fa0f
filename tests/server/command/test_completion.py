"""What the shells complete, each asked itself."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from turret.server.cli import build_parser
from turret.server.command.completion import script


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_verb_and_flag(shell: str) -> None:
    text = script(build_parser(None), shell)
    for word in ("generate", "merge-state", "max-rank", "log-format", "sweep"):
        assert word in text
    if path := shutil.which(shell):
        subprocess.run([path, "-n"], input=text, text=True, check=True)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["turret", "comp"], "completion"),
        (["turret", "adapters", "lo"], "load"),
        (["turret", "serve", "--dty"], "--dtype"),
        (["turret", "serve", "--log-format", ""], "text json"),
        (["turret", "serve", "--max-rank", ""], ""),
        (["turret", "train", "run", "--method", "lor"], "lora"),
        (["turret", "serve", "--adapter-root", "/us"], "/usr"),
    ],
)
def test_bash_completes(words: list[str], expected: str) -> None:
    call = f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; _turret"
    offers = {"train run:--method": ("lora", "dora")}
    code = script(build_parser(None), "bash", offers) + call + '; echo "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


COMPLETED = [
    ("turret comp", "completion"),
    ("turret adapters unl", "unload"),
    ("turret serve --dty", "--dtype"),
    ("turret serve --log-format j", "json"),
]

# A terminal of its own, in which the line is begun and the tabulator pressed; waits for the rest.
ZSH = """
zmodload zsh/zpty
zpty shell "zsh -f -i"
zpty -w shell "PROMPT=; source $1; print re''ady"
zpty -r -m shell out "*ready*"
zpty -w -n shell "$2"$'\\t'
zpty -r -m shell out "*$3*"
"""


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh")
@pytest.mark.parametrize(("line", "expected"), COMPLETED)
def test_zsh_completes(line: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "script").write_text(script(build_parser(None), "zsh"))
    rest = expected.removeprefix(line.rpartition(" ")[2])
    assert rest not in line
    command = ["zsh", "-f", "-c", ZSH, "zsh", str(tmp_path / "script"), line, rest]
    subprocess.run(command, check=True, timeout=30)


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish")
@pytest.mark.parametrize(("line", "expected"), COMPLETED)
def test_fish_completes(line: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "script").write_text(script(build_parser(None), "fish"))
    code = f"source {tmp_path / 'script'}; complete -C {shlex.quote(line)}"
    done = subprocess.run(
        ["fish", "--no-config", "-c", code], capture_output=True, text=True, check=True
    )
    # Behind what begins with the word come words that hold its letters.
    assert done.stdout.split("\t")[0] == expected
