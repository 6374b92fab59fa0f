"""docs/operations.md, docs/lifecycle.md and docs/security.md match the code."""

from __future__ import annotations

import re

from checkout import ROOT
from pages.operations_page import PAGE, meanings, rendered

from turret.server import errors
from turret.server.api.admin import MAX_UPLOADS
from turret.server.api.uploads import IDLE_SECONDS, MAX_CONFIG_BYTES
from turret.server.metrics import MAX_ADAPTER_LABELS, Metrics
from turret.v1 import adapters_pb2

LIFECYCLE = ROOT / "docs" / "lifecycle.md"
SECURITY = ROOT / "docs" / "security.md"


def test_the_tables_match_the_code() -> None:
    page = PAGE.read_text()
    assert page == rendered(page), "run `make pages`"


def test_every_error_that_is_raised_is_explained() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    kinds = [kind for kind in kinds if issubclass(kind, errors.TurretError)]
    leaves = [kind for kind in kinds if not kind.__subclasses__()]
    assert {kind.__name__ for kind in leaves} <= meanings().keys()


def test_every_series_is_listed() -> None:
    page = PAGE.read_text()
    for family in Metrics().registry.collect():
        if family.name.startswith("turret"):
            assert f"`{family.name}" in page


def test_the_numbers_on_the_page_are_correct() -> None:
    page = " ".join((PAGE.read_text() + LIFECYCLE.read_text() + SECURITY.read_text()).split())
    assert (MAX_UPLOADS, IDLE_SECONDS, MAX_CONFIG_BYTES) == (8, 60.0, 1 << 20)
    assert "may pause for one minute" in page
    assert "At most 8 uploads" in page
    assert "`adapter_config.json` (at most 1 MiB)" in page
    assert f"first {MAX_ADAPTER_LABELS} registered adapters" in page


def test_the_calls_on_the_page_exist() -> None:
    service = adapters_pb2.DESCRIPTOR.services_by_name["Adapters"]
    named = set(re.findall(r"`(\w+Adapters?)`", LIFECYCLE.read_text()))
    assert len(named) >= 7
    assert named <= set(service.methods_by_name)
