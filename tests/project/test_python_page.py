"""docs/python.md is made from the docstrings, and says all that is public."""

from __future__ import annotations

from pages.python_page import PAGE, rendered

import turret
from turret.clients import errors


def test_the_page_is_that_of_the_code() -> None:
    assert PAGE.read_text() == rendered(), "run `make pages`"


def test_every_public_name_is_there() -> None:
    page = PAGE.read_text()
    kinds = [name for name in vars(errors) if name.endswith("Error")]
    assert len(kinds) > 10
    for name in (*turret.__all__, *kinds):
        assert f"### `{name}`" in page
