"""The documentation: links, commands, the files in deploy/, and the tutorial."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from checkout import ROOT
from servers.loaded_examples import examples_loaded
from servers.probe import free_port
from servers.server_under_test import ServerUnderTest, start_server

from turret.clients.client import TurretClient
from turret.server.cli import build_parser
from turret.server.command.flags import Settings, read_file, settings, variable_of
from turret.server.config import Config

DOCS = ROOT / "docs"
EACH_PAGE = pytest.mark.parametrize(
    "page",
    [*sorted(ROOT.glob("*.md")), ROOT / "examples" / "README.md", *sorted(DOCS.rglob("*.md"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#([^)\s]*))?\)")


@EACH_PAGE
def test_the_targets_of_links_exist(page: Path) -> None:
    for target, anchor in _LINK.findall(page.read_text()):
        if "://" in target:
            continue
        path = (page.parent / target).resolve()
        assert path.exists(), target
        if anchor and path.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{target}#{anchor}"


def test_the_index_lists_every_page() -> None:
    for folder in (DOCS, DOCS / "adr"):
        named = {target for target, _ in _LINK.findall((folder / "README.md").read_text())}
        pages = {path.name for path in folder.glob("*.md")} - {"README.md"}
        assert pages <= named


def commands(page: Path) -> list[list[str]]:
    """The `turret` commands in a page's code blocks, each up to a pipe."""
    found = []
    for language, block in re.findall(r"```(\w*)\n(.*?)```", page.read_text(), re.DOTALL):
        if language not in ("", "sh", "console"):
            continue
        # A line that ends within quotes continues on the next one.
        pending = ""
        for line in block.splitlines():
            pending += line.removesuffix("\\") + " "
            # Skip output, and the commands of other tools.
            if not re.match(r"(\$ )?turret [a-z]", pending):
                pending = ""
                continue
            with contextlib.suppress(ValueError):
                words = shlex.split(pending.removeprefix("$ "), comments=True)
                if not line.endswith("\\"):
                    found.append(words[1 : words.index("|")] if "|" in words else words[1:])
                    pending = ""
    return found


@EACH_PAGE
def test_every_command_on_a_page_is_valid(page: Path) -> None:
    for words in commands(page):
        try:
            build_parser(words[0]).parse_args(words)
        except SystemExit:
            pytest.fail(f"{page.name}: turret {shlex.join(words)}")


@EACH_PAGE
def test_every_command_in_a_sentence_has_valid_flags(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for said in re.findall(r"`turret ([a-z][^`]*)`", text):
        parser = build_parser(None)
        words = said.split()
        while words and (below := verbs_of(parser).get(words[0])):
            parser = below
            del words[0]
        assert parser.prog != "turret", said
        flags = {word.split("=")[0] for word in words if word.startswith("--")}
        assert flags <= parser._option_string_actions.keys(), said


def verbs_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    kinds = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return {name: verb for kind in kinds for name, verb in kind.choices.items()}


def test_commands_over_several_lines_are_found() -> None:
    found = commands(ROOT / "README.md")
    assert ["adapters", "load", "sql", "sql"] in found
    assert any(words[:3] == ["generate", "--chat", "-a"] and len(words) > 6 for words in found)


def test_the_service_and_the_compose_file_set_existing_settings() -> None:
    known = set(map(variable_of, settings()))
    for name in ("turret.service", "compose.yaml"):
        named = set(re.findall(r"\bTURRET_[A-Z_]+", (ROOT / "deploy" / name).read_text()))
        assert named
        assert named <= known


def test_the_config_in_operations_is_valid(tmp_path: Path) -> None:
    blocks = re.findall(r"```toml\n(.*?)```", (DOCS / "operations.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        tomllib.loads(block)
        (tmp_path / "turret.toml").write_text(block)
        assert Settings(Config, (read_file(tmp_path / "turret.toml"),)).config()


def blocks_of(page: str, heading: str, language: str) -> list[str]:
    """The code blocks of a language below a heading of a page in ``docs``."""
    _, _, below = (DOCS / page).read_text().partition(f"\n## {heading}\n")
    section, _, _ = below.partition("\n## ")
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


def test_the_handmade_router_loads_and_answers(
    live_server: ServerUnderTest, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = blocks_of("combining.md", "Arrow", "python")
    root = live_server.adapter_root
    for said, meant in (
        ("127.0.0.1:50051", live_server.address),
        ('"examples/adapters"', repr(str(root))),
    ):
        assert block.count(said) == 1
        block = block.replace(said, meant)
    with examples_loaded(live_server, "json", "sql") as client:
        exec(compile(block, "combining.md", "exec"), {})
        router = client.adapters.get("router")
        client.adapters.unload("router")
        shutil.rmtree(root / "router")
    assert router.method == "arrow"
    assert "Nora" in capsys.readouterr().out


def test_the_python_example_of_the_readme_prints_its_stated_output(
    live_server: ServerUnderTest, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "README.md").read_text()
    _, block = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert block.count("127.0.0.1:50051") == 1
    with examples_loaded(live_server, "json", "pirate"):
        code = block.replace("127.0.0.1:50051", live_server.address)
        exec(compile(code, "README.md", "exec"), {})
    assert re.findall(r"^# (.+)", block, re.MULTILINE) == capsys.readouterr().out.splitlines()


@pytest.mark.long
def test_the_classifier_of_the_page_can_be_made_and_labels_text(tmp_path: Path) -> None:
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


def tutorial_blocks(language: str, port: int, http_port: int) -> list[str]:
    text = (DOCS / "tutorial.md").read_text()
    blocks = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return [b.replace(":8000", f":{http_port}").replace(":50051", f":{port}") for b in blocks]


def says(output: str, shown: str) -> bool:
    """Whether the shown output equals the actual one, ignoring …, percentages and table layout."""
    output, shown = (re.sub(r"[\d.]+%| +|[━─]+", "", f"\n{t.strip()}\n") for t in (output, shown))
    # On a separate line, … stands for several lines.
    lines = re.escape(shown).replace("\n…\\\n", "\n(?:.*\n)*?").replace("…", ".*")
    return re.fullmatch(lines, output) is not None


def test_a_page_with_other_output_is_detected() -> None:
    shown = "a\n…\nb …/c 1.0% │\nend"
    assert says("a\nx\ny\nb /d/c   22% │\nend\n", shown)
    assert says("x\ny\nend\nz", "…\nend\n…")
    assert not says("a\nx\nb /d/c 1.0% │", shown)
    assert not says("a\nx\nb /d/e 1.0% │\nend", shown)


@pytest.mark.long
def test_the_tutorial_produces_an_adapter_that_answers(tmp_path: Path) -> None:
    port = free_port()
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "TURRET_ADDRESS": f"127.0.0.1:{port}",
        "TURRET_METRICS_ADDRESS": "none",
        "COLUMNS": "160",
    }
    http_port = free_port()
    data, train, serve, ask, judge, change = tutorial_blocks("sh", port, http_port)
    trained, serving, answered, judged, changed = tutorial_blocks("text", port, http_port)

    def run(script: str) -> str:
        done = subprocess.run(
            ["bash", "-euc", script],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-2000:]
        return done.stdout

    run(data)
    said = run(train)
    assert says(said, trained), said
    assert "leaked" not in said
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(shlex.split(serve), cwd=tmp_path, env=environment, stderr=log)
    try:
        deadline = time.monotonic() + 300
        while subprocess.run(["turret", "health"], env=environment, capture_output=True).returncode:
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(1)
        assert says((tmp_path / "server.log").read_text(), serving)
        said = run(ask)
        assert says(said, answered), said
        said = run(judge)
        assert says(said, judged), said
        rows = dict(re.findall(r"(base|hotel)\D+([\d.]+)%", said))
        assert float(rows["hotel"]) >= 90 > float(rows["base"])
        said = run(change)
        assert says(said, changed), said
    finally:
        server.terminate()
        assert server.wait(60) == 0
