"""The stored content of a token file, and its replacement while the server runs."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from turret.server.api.access import TokenTable, WatchedFiles


def test_a_table_holds_no_token() -> None:
    table = TokenTable([("alpha-secret", frozenset({"inference"}))])
    assert table.roles_of("alpha-secret") == {"inference"}
    assert b"alpha" not in pickle.dumps(table)


def test_a_fifo_in_place_of_the_token_file_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    token_file = tmp_path / "tokens"
    token_file.write_text("alpha-secret inference")
    files = WatchedFiles((token_file,), lambda: TokenTable.read(token_file), "tokens")
    token_file.unlink()
    os.mkfifo(token_file)
    for _ in range(2):
        assert not files.look()
        assert "cannot read the tokens again" in caplog.text
        assert files.newest.roles_of("alpha-secret") == {"inference"}
        # SIGHUP has the same effect.
        files.forget()
        caplog.clear()
    token_file.unlink()
    token_file.write_text("delta-secret admin")
    assert files.look()
    assert files.newest.roles_of("delta-secret") == {"admin"}
    assert files.newest.roles_of("alpha-secret") is None
