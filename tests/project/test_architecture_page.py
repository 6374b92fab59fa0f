"""docs/architecture.md lists every package, and only existing files."""

from __future__ import annotations

import re

from checkout import ROOT
from pages.architecture_page import PAGE, caption, rendered, rooms


def test_every_room_is_listed_with_its_caption() -> None:
    assert all(caption(room).endswith(".") for room in rooms())
    page = PAGE.read_text()
    assert page == rendered(page), "run `make pages`"


def test_the_files_it_names_exist() -> None:
    named = set(
        re.findall(
            r"`((?:server|kernels|clients|fleet|training|tests|bench)/[\w/.]+)`", PAGE.read_text()
        )
    )
    assert len(named) > 30
    assert {name for name in named if not (ROOT / name).exists()} == set()
