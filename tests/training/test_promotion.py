"""``turret train promote`` on a real server: only a better adapter replaces the served one."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkout import ROOT
from servers.server_under_test import start_server

from turret.clients.client import TurretClient
from turret.clients.verbs import promote as promote_verb
from turret.server.cli import main

DATA = ROOT / "examples/data/label.test.jsonl"
FLAGS = ("--limit", "6", "--max-tokens", "8")
Promote = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("promotion")
    state = ("--state-dir", str(folder / "state"), "--keep-generations", "2")
    with start_server(folder, *state) as server:
        yield server.address


@pytest.fixture
def client(address: str) -> Iterator[TurretClient]:
    with TurretClient(address) as connected:
        yield connected


@pytest.fixture
def promote(address: str, capsys: pytest.CaptureFixture[str]) -> Promote:
    def run(*arguments: object) -> tuple[int, str, str]:
        words = ["train", "promote", *map(str, arguments), *FLAGS, "--address", address]
        code = main(words)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_only_a_better_adapter_is_promoted_and_can_be_rolled_back(
    client: TurretClient, promote: Promote, tmp_path: Path
):
    for name in ("label", "sql"):
        shutil.copytree(ROOT / "examples/adapters" / name, tmp_path / name)
    provenance = tmp_path / "label/provenance.json"
    trained = {"data": {"digest": "ab" * 32}, "config": {"run": {"seed": 1}}}
    provenance.write_text(json.dumps(trained))
    first = client.adapters.upload("served", tmp_path / "sql")
    # An adapter of the user, with the content that is promoted.
    client.adapters.upload("served-candidate", tmp_path / "label")

    code, out, err = promote("served", tmp_path / "label", DATA, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    served = client.adapters.get("served")
    assert (found["promoted"], found["generation"], served.generation) == (True, 2, 2)
    gain = found["scores"]["perplexity"]["gain"]
    assert 0 < gain["low"] < gain["value"] < gain["high"]

    written = json.loads(provenance.read_text())
    promotion = written.pop("promotion")
    assert written == trained
    assert {**promotion, "promoted": True, "generation": 2} == found
    assert promotion["digest"] == served.digest
    assert promotion["parent"] == {"generation": 1, "digest": first.digest}
    digest = hashlib.sha256(DATA.read_bytes()).hexdigest()
    assert promotion["test"] == {"digest": digest, "num_examples": 6}

    metrics = ("--metric", "perplexity", "--metric", "exact_match")
    code, out, err = promote("served", tmp_path / "sql", DATA, *metrics)
    assert (code, err) == (3, ""), out
    assert client.adapters.get("served").digest == served.digest
    assert not (tmp_path / "sql/provenance.json").exists()
    # An equal adapter is not better.
    assert promote("served", tmp_path / "label", DATA)[0] == 3

    assert client.adapters.rollback("served").digest == first.digest
    assert {each.name for each in client.adapters.list()} == {"served", "served-candidate"}
    client.adapters.unload("served-candidate")


def test_a_failed_promotion_leaves_nothing_behind(
    client: TurretClient, promote: Promote, tmp_path: Path
):
    folder = tmp_path / "sql"
    shutil.copytree(ROOT / "examples/adapters/sql", folder)
    assert promote("nobody", folder, DATA)[0] == 1
    assert promote("nobody", folder, tmp_path / "missing.jsonl")[0] == 1
    (folder / "provenance.json").write_text("[]")
    assert promote("nobody", folder, DATA)[0] == 2
    assert not [each.name for each in client.adapters.list() if each.name != "served"]


def test_a_replaced_adapter_is_not_overwritten(
    client: TurretClient, promote: Promote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("label", "pirate", "sql"):
        shutil.copytree(ROOT / "examples/adapters" / name, tmp_path / name)
    client.adapters.upload("other", tmp_path / "sql")
    judge = promote_verb.judge

    def judge_slowly(*arguments: Any) -> Any:
        reports = judge(*arguments)
        client.adapters.upload("other", tmp_path / "pirate", replace=True)
        return reports

    monkeypatch.setattr(promote_verb, "judge", judge_slowly)
    code, _, err = promote("other", tmp_path / "label", DATA)
    assert (code, "ADAPTER_GENERATION" in err) == (1, True), err
    assert client.adapters.get("other").generation == 2
    assert not (tmp_path / "label/provenance.json").exists()
