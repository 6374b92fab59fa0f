"""The page for tenants lists every call and the limits."""

from __future__ import annotations

from typing import Any

from checkout import ROOT

from turret.server.api.tenants import checkpoints, futures
from turret.server.api.tenants import tenants as sessions
from turret.server.http.tinker import wire
from turret.server.http.tinker.routes import routes

PAGE = (ROOT / "docs" / "tenants.md").read_text()


def test_every_call_is_listed() -> None:
    state: Any = None
    for route in routes(state):
        assert f"`{route.method} {route.path}`" in PAGE, route.path


def test_the_limits_match_the_code() -> None:
    assert f"{sessions.MAX_SESSIONS} sessions" in PAGE
    assert f"{sessions.MAX_MODELS} models" in PAGE
    assert f"{sessions.MAX_SAMPLERS} samplers" in PAGE
    assert f"{checkpoints.MAX_CHECKPOINTS} checkpoints" in PAGE
    assert f"{futures.MAX_FUTURES:,} results" in PAGE
    assert (sessions.SESSION_SECONDS, futures.RESULT_SECONDS) == (300.0, 600.0)
    for loss in wire.LOSSES:
        assert f"`{loss}`" in PAGE
