"""docs/training.md matches the code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pages.training_page import PAGE, rendered

from turret.training.errors import DataError
from turret.training.examples import read_examples


def test_the_tables_match_the_code() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == rendered(page), "run `make pages`"


def test_the_error_it_shows_is_about_that_line_and_field(tmp_path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    (shown,) = re.findall(r"^error: /data/(train\.jsonl:7: \S+: )", page, re.MULTILINE)
    roles = [{"role": role, "content": "a"} for role in ("user", "assistant", "tool")]
    path = tmp_path / "train.jsonl"
    path.write_text("\n" * 6 + json.dumps({"messages": roles}), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_examples(path)
    assert str(caught.value).startswith(f"{tmp_path}/{shown}")
