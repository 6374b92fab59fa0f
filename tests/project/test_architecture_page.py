"""The pages that describe the code name only files and folders that exist."""

from __future__ import annotations

import re

import pytest
from checkout import ROOT


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_the_files_it_names_exist(page: str) -> None:
    named = set(
        re.findall(
            r"`((?:server|kernels|clients|fleet|training|tests|bench)/[\w/.]+)`",
            (ROOT / page).read_text(),
        )
    )
    assert len(named) > 30
    assert {name for name in named if not (ROOT / name).exists()} == set()
