"""Fixtures: a server with canned answers, its client, and the command's verbs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from servers.command import parse_and_run
from servers.fake_turret import FakeTurret, fake_turret

from turret.clients.client import TurretClient

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def server() -> Iterator[FakeTurret]:
    with fake_turret() as running:
        yield running


@pytest.fixture
def client(server: FakeTurret) -> Iterator[TurretClient]:
    with TurretClient(server.address) as connected:
        yield connected


@pytest.fixture
def run(server: FakeTurret, capsys: pytest.CaptureFixture[str], monkeypatch) -> Run:
    """Run a verb against the server; returns exit code, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: object) -> tuple[int, str, str]:
        code = parse_and_run(*map(str, arguments), "--address", server.address)
        out, err = capsys.readouterr()
        return code, out, err

    return run
