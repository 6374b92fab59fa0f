"""The pages for a first hour: their links, the files in deploy/, and the tutorial as it stands."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from checkout import ROOT
from servers.server_under_test import ServerUnderTest, start_server

from turret.clients.client import TurretClient
from turret.server.cli import build_parser
from turret.server.command.settings import settings

DOCS = ROOT / "docs"
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#([^)\s]*))?\)")


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda path: path.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in _LINK.findall(page.read_text()):
        if "://" in target:
            continue
        path = (page.parent / target).resolve()
        assert path.exists(), target
        if anchor and path.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{target}#{anchor}"


def test_the_index_names_every_page() -> None:
    named = {target for target, _ in _LINK.findall((DOCS / "README.md").read_text())}
    pages = {path.name for path in DOCS.glob("*.md")} - {"README.md"}
    assert pages <= named


def commands(page: Path) -> list[list[str]]:
    """The `turret` commands in a page's blocks, each up to a pipe."""
    found = []
    for language, block in re.findall(r"```(\w*)\n(.*?)```", page.read_text(), re.DOTALL):
        if language not in ("", "sh"):
            continue
        # A line that ends in a quoted text's middle goes on in the next one.
        pending = ""
        for line in block.splitlines():
            pending += line.removesuffix("\\") + " "
            # Not the drawing of how the parts fit together.
            if not re.match(r"(\$ )?turret [a-z]", pending):
                pending = ""
                continue
            with contextlib.suppress(ValueError):
                words = shlex.split(pending.removeprefix("$ "), comments=True)
                if not line.endswith("\\"):
                    found.append(words[1 : words.index("|")] if "|" in words else words[1:])
                    pending = ""
    return found


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda path: path.stem
)
def test_every_command_of_a_page_is_one(page: Path) -> None:
    for words in commands(page):
        try:
            build_parser(words[0]).parse_args(words)
        except SystemExit:
            pytest.fail(f"{page.name}: turret {shlex.join(words)}")


def test_commands_over_several_lines_are_found() -> None:
    found = commands(ROOT / "README.md")
    assert ["adapters", "load", "sql", "sql"] in found
    assert any(words[:3] == ["generate", "--chat", "-a"] and len(words) > 6 for words in found)


def test_the_service_and_the_compose_file_set_what_there_is() -> None:
    known = {setting.variable for setting in settings()}
    for name in ("turret.service", "compose.yaml"):
        named = set(re.findall(r"\bTURRET_[A-Z_]+", (ROOT / "deploy" / name).read_text()))
        assert named
        assert named <= known


def test_the_config_in_operations_is_one(tmp_path: Path) -> None:
    from turret.server.command.settings import read_file

    blocks = re.findall(r"```toml\n(.*?)```", (DOCS / "operations.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        tomllib.loads(block)
        (tmp_path / "turret.toml").write_text(block)
        assert read_file(tmp_path / "turret.toml").values


def blocks_of(page: str, heading: str, language: str) -> list[str]:
    """The blocks of a language below a heading of a page in ``docs``."""
    _, _, below = (DOCS / page).read_text().partition(f"\n## {heading}\n")
    section, _, _ = below.partition("\n## ")
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


def test_the_router_made_by_hand_is_loaded_and_answers(
    live_server: ServerUnderTest, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = blocks_of("adapters.md", "Arrow", "python")
    root = live_server.adapter_root
    for said, meant in (
        ("127.0.0.1:50051", live_server.address),
        ('"examples/adapters"', repr(str(root))),
    ):
        assert block.count(said) == 1
        block = block.replace(said, meant)
    with TurretClient(live_server.address) as client:
        for name in ("json", "sql"):
            shutil.copytree(ROOT / "examples" / "adapters" / name, root / name)
            client.adapters.load(name, name)
        exec(compile(block, "adapters.md", "exec"), {})
        router = client.adapters.get("router")
        for name in ("router", "json", "sql"):
            client.adapters.unload(name)
            shutil.rmtree(root / name)
    assert router.method == "arrow"
    assert "Nora" in capsys.readouterr().out


@pytest.mark.long
def test_the_classifier_of_the_page_is_made_and_labels(tmp_path: Path) -> None:
    make, _ = blocks_of("heads.md", "Classify", "sh")[0].rsplit("\n", 2)[:2]
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "COLUMNS": "160"}
    subprocess.run(["bash", "-euc", make], cwd=tmp_path, env=environment, check=True)
    with start_server(tmp_path, "--adapter-root", str(tmp_path / "topics")) as server:
        with TurretClient(server.address) as client:
            client.adapters.load("topics", "adapter")
        environment["TURRET_ADDRESS"] = server.address
        ask = next(words for words in commands(DOCS / "heads.md") if words[0] == "classify")
        done = subprocess.run(
            ["turret", *ask], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    assert {"shipping", "billing"} <= set(re.findall(r"[a-z]+", done.stdout))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def tutorial_blocks(http_port: int) -> list[str]:
    text = (DOCS / "tutorial.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    return [block.replace(":8000", f":{http_port}") for block in blocks]


@pytest.mark.long
def test_the_tutorial_makes_an_adapter_that_answers(tmp_path: Path) -> None:
    port = free_port()
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "TURRET_ADDRESS": f"127.0.0.1:{port}",
        "TURRET_METRICS_ADDRESS": "none",
        "COLUMNS": "160",
    }
    data, train, serve, ask, judge, change = tutorial_blocks(free_port())

    def run(script: str) -> str:
        done = subprocess.run(
            ["bash", "-euc", script], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout + done.stderr

    run(data)
    said = run(train)
    assert "adapter written: " in said
    assert "turret serve --adapter-root" in said
    assert "leaked" not in said
    server = subprocess.Popen(
        shlex.split(serve), cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 300
        while subprocess.run(["turret", "health"], env=environment, capture_output=True).returncode:
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(1)
        lines = [line for line in run(ask).splitlines() if line.strip()]
        assert lines[0].strip() == "invoice"
        reply = json.loads(next(line for line in lines if line.startswith("{")))
        assert reply["choices"][0]["message"]["content"].strip() == "complaint"
        rows = dict(re.findall(r"(base|hotel)\D+([\d.]+)%", run(judge)))
        assert float(rows["hotel"]) >= 90 > float(rows["base"])
        assert "replaced hotel@2: lora of rank 8, " in run(change)
    finally:
        server.terminate()
        assert server.wait(60) == 0
