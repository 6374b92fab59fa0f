"""README.md and docs/choosing.md quote the newest measured rates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pages.rates_page import PAGES, SHOWN, newest_rates, rendered


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_figures_match_the_newest_run(path: Path) -> None:
    page = path.read_text()
    assert page == rendered(path, page), "run `make pages`"


def test_a_later_row_replaces_an_earlier_one(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    rows = [
        {
            "bench": "decode",
            "scenario": {"name": name},
            "values": {"decode_tokens_per_second": rate},
        }
        for rate in (1.0, 2.0)
        for name in SHOWN
    ]
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert set(newest_rates(results).values()) == {2.0}
