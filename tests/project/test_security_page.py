"""docs/security.md, the code and the proto files are consistent."""

from __future__ import annotations

import re

from checkout import ROOT
from pages.security_page import PAGE, rendered

from turret.server.adapters.checkpoint import adapter_root
from turret.server.api import limits
from turret.server.api.uploads import MAX_CHUNK_BYTES, UPLOAD_FILES
from turret.server.api.violations import MAX_VIOLATIONS


def test_the_table_matches_the_code() -> None:
    page = PAGE.read_text()
    assert page == rendered(page), "run `make pages`"


def test_every_test_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`(tests/[\w/.]+)(?:::(\w+))?`", PAGE.read_text()))
    assert len(named) > 40
    for path, test in named:
        assert (ROOT / path).exists(), path
        if test:
            assert f"def {test}(" in (ROOT / path).read_text(), f"{path}::{test}"


def test_limits_that_are_written_twice_are_equal() -> None:
    assert adapter_root.MAX_PATH_CHARS == limits.MAX_PATH_CHARS
    assert len(UPLOAD_FILES) == limits.MAX_UPLOAD_FILES
    assert MAX_CHUNK_BYTES == 1 << 20
    assert f"lists at most {MAX_VIOLATIONS} violations" in PAGE.read_text()
