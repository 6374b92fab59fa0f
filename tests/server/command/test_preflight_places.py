"""Problems of files in flags, and of the server's user, that a start reports."""

from __future__ import annotations

import os
import pwd
from pathlib import Path
from typing import NoReturn

import pytest
from start_problems import found


@pytest.mark.parametrize("flag", ["--token-file", "--tls-cert", "--tls-key", "--tls-client-ca"])
def test_a_file_that_would_keep_its_reader_waiting_is_refused(flag: str, tmp_path: Path) -> None:
    for name in ("cert", "key"):
        (tmp_path / name).write_text("")
    os.mkfifo(tmp_path / "fifo")
    tls = ("--tls-cert", str(tmp_path / "cert"), "--tls-key", str(tmp_path / "key"))
    ((field, text),) = found(*tls, flag, str(tmp_path / "fifo"))
    assert field == f"security.{flag[2:].replace('-', '_')}"
    assert (text.reason, text.params["path"]) == ("FILE_UNREADABLE", tmp_path / "fifo")


def test_a_user_without_a_home_directory_gets_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A container that runs as a numeric user is like this."""

    def unknown(uid: int) -> NoReturn:
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    (problem,) = found()
    assert problem.field == "model.model"
    assert problem.text.reason == "NO_HOME_DIRECTORY"
