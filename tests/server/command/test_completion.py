"""What the shells complete, each asked itself."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from turret.server.cli import build_parser
from turret.server.command.completion import script

OFFERS = {"train run:--method": ("lora", "dora"), "serve:--device": ("auto", "cpu", "cuda")}
# Stands for the command where a server is asked; of each there is another answer.
FAKE = """#!/bin/sh
case "$*" in
  "adapters list --json --timeout 1") names="json sql" ;;
  "adapters list --json --timeout 1 --address far:1") names='quux $(touch${IFS}x)' ;;
  *) echo "error: no turret server answers" >&2; exit 1 ;;
esac
for name in $names; do printf '  {\n    "name": "%s",\n    "source": "x",\n  }\n' "$name"; done
"""


@pytest.fixture
def turret(tmp_path: Path) -> dict[str, str]:
    """An environment in which ``turret`` is ``FAKE``."""
    file = tmp_path / "bin" / "turret"
    file.parent.mkdir()
    file.write_text(FAKE)
    file.chmod(0o755)
    return os.environ | {"PATH": f"{file.parent}:{os.environ['PATH']}"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_verb_and_flag(shell: str) -> None:
    text = script(build_parser(None), shell)
    for word in ("generate", "merge-state", "max-rank", "log-format", "sweep"):
        assert word in text
    # Flags that a verb takes only to refuse them.
    assert "SUPPRESS" not in text
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
        (["turret", "serve", "--device", ""], "auto cpu cuda"),
        (["turret", "serve", "--device", "="], "auto cpu cuda"),
        (["turret", "serve", "--device", "=", "cu"], "cuda"),
        (["turret", "convert", "--device", ""], "cpu cuda"),
        (["turret", "generate", "-a", ""], "json sql"),
        (["turret", "generate", "--adapter", "s"], "sql"),
        (["turret", "eval", "-m", "j"], "json"),
        (["turret", "generate", "--address", "far:1", "-a", ""], "quux"),
        (["turret", "generate", "--address", "down:1", "-a", ""], ""),
        (["turret", "generate", "--json-schema", "/us"], "/usr"),
        (["turret", "adapters", "unload", ""], "json sql"),
        (["turret", "adapters", "replace", "s"], "sql"),
        (["turret", "adapters", "replace", "sql", "/us"], "/usr"),
        (["turret", "adapters", "pin", "--force", "--timeout", "3", ""], "json sql"),
        (["turret", "adapters", "get", "--address", "far", ":", "1", ""], "quux"),
        (["turret", "adapters", "get", "--address", "=", "far", ":", "1", ""], "quux"),
        (["turret", "adapters", "get", "--address", "down:1", ""], ""),
        (["turret", "adapters", "export", "--js"], "--json"),
        (["turret", "adapters", "load", "s"], ""),
        (["turret", "adapters", "fuse", "-a", "load", "-a", "j"], "json"),
        (["turret", "train", "plan", "/us"], "/usr"),
        (["turret", "generate", "/us"], ""),
    ],
)
def test_bash_completes(words: list[str], expected: str, turret: dict[str, str]) -> None:
    line = shlex.join(words)
    typed = line.replace(" : ", ":").replace(" = ", "=")
    call = f"COMP_LINE={shlex.quote(typed)}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}"
    code = f'{script(build_parser(None), "bash", OFFERS)}{call}; _turret; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(
        ["bash", "-c", code], capture_output=True, text=True, check=True, env=turret
    )
    assert done.stdout.strip() == expected
    assert done.stderr == ""


COMPLETED = [
    ("turret comp", "completion"),
    ("turret adapters unl", "unload"),
    ("turret serve --dty", "--dtype"),
    ("turret serve --log-format j", "json"),
    ("turret serve --device cu", "cuda"),
    ("turret serve --adapter-root /et", "/etc"),
    ("turret generate -a sq", "sql"),
    ("turret generate --address far:1 --adapter q", "quux"),
    ("turret adapters unload s", "sql"),
    ("turret adapters replace --timeout 3 s", "sql"),
    ("turret adapters get --address=far:1 q", "quux"),
    ("turret adapters upload sql /et", "/etc"),
    ("turret train plan /et", "/etc"),
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
def test_zsh_completes(line: str, expected: str, tmp_path: Path, turret: dict[str, str]) -> None:
    (tmp_path / "script").write_text(script(build_parser(None), "zsh", OFFERS))
    rest = expected.removeprefix(line.rpartition(" ")[2])
    assert rest not in line
    command = ["zsh", "-f", "-c", ZSH, "zsh", str(tmp_path / "script"), line, rest]
    subprocess.run(command, check=True, timeout=30, env=turret)


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish")
@pytest.mark.parametrize(("line", "expected"), COMPLETED)
def test_fish_completes(line: str, expected: str, tmp_path: Path, turret: dict[str, str]) -> None:
    (tmp_path / "script").write_text(script(build_parser(None), "fish", OFFERS))
    code = f"source {tmp_path / 'script'}; complete -C {shlex.quote(line)}"
    done = subprocess.run(
        ["fish", "--no-config", "-c", code], capture_output=True, text=True, check=True, env=turret
    )
    # Behind what begins with the word come words that hold its letters.
    assert done.stdout.split("\t")[0].rstrip("/\n") == expected
