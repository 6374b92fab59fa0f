"""No path leads out of the adapter root, whatever somebody does to it meanwhile."""

from __future__ import annotations

import collections
import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from turret.server.adapters.checkpoint import adapter_root
from turret.server.adapters.checkpoint.adapter_root import AdapterRoot
from turret.server.errors import AdapterCheckpointError

NAMES = ("one", "two")
# renameat2's flag that swaps two names at once, and its stand-in for the working directory.
_EXCHANGE, _AT_CWD = 2, -100
TRIES = 4000


def fill(folder: Path, text: str) -> None:
    folder.mkdir(parents=True)
    for name in NAMES:
        (folder / name).write_text(text)


def exchange(first: Path, second: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.renameat2(_AT_CWD, bytes(first), _AT_CWD, bytes(second), _EXCHANGE)
    assert done == 0, os.strerror(ctypes.get_errno())


def read(root: AdapterRoot, path: str) -> list[str]:
    """What both files hold."""
    with root.open_directory(path) as directory:
        texts = []
        for name in NAMES:
            with directory.open_file(name) as file:
                texts.append(file.read().decode())
        return texts


def _link_directory(swapped: Path, outside: Path) -> None:
    swapped.symlink_to(outside)


def _link_above(swapped: Path, outside: Path) -> None:
    up = "../" * (len(swapped.parent.parts) - 1)
    swapped.symlink_to(f"{up}{str(outside)[1:]}")


def _link_files(swapped: Path, outside: Path) -> None:
    swapped.mkdir()
    for name in NAMES:
        (swapped / name).symlink_to(outside / name)


SWAPS: dict[str, Callable[[Path, Path], None]] = {
    "an absolute link": _link_directory,
    "a relative link": _link_above,
    "a directory of links": _link_files,
}


@pytest.fixture(params=SWAPS)
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A root with ``parent/a`` inside and, to be swapped for it, ``parent/b`` that leads out."""
    outside = tmp_path / "outside"
    fill(outside, "outside")
    fill(tmp_path / "root" / "parent" / "a", "inside")
    SWAPS[request.param](tmp_path / "root" / "parent" / "b", outside)
    return tmp_path / "root"


def test_a_swap_before_any_system_call_leads_nowhere(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory is swapped just before the first look-up of its files, the second, ..."""
    root = AdapterRoot(tree)
    calls = ("open", "readlink")
    real = {name: getattr(os, name) for name in calls}
    outcomes: collections.Counter[str] = collections.Counter()
    for when in range(40):
        count = 0

        def swapping(name: str, when: int = when) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                if count == when:
                    exchange(tree / "parent" / "a", tree / "parent" / "b")
                count += 1
                return real[name](*args, **kwargs)

            return call

        for name in calls:
            monkeypatch.setattr(adapter_root.os, name, swapping(name))
        try:
            texts = read(root, "parent/a")
        except AdapterCheckpointError as error:
            texts = [str(error)]
        for name in calls:
            monkeypatch.setattr(adapter_root.os, name, real[name])
        assert "outside" not in texts, when
        outcomes["read" if texts == ["inside", "inside"] else "refused"] += 1
        if count > when:
            exchange(tree / "parent" / "a", tree / "parent" / "b")
        else:
            # The swap came too late to happen at all.
            break
    else:
        pytest.fail("the walk has more steps than were tried")
    assert outcomes["read"] > 0
    assert outcomes["refused"] > 0


@pytest.fixture
def swapper(tree: Path) -> Iterator[None]:
    """Another process that swaps without a pause."""
    script = (
        "import ctypes, sys; call = ctypes.CDLL(None).renameat2\n"
        "a, b = (name.encode() for name in sys.argv[1:])\n"
        f"while True: call({_AT_CWD}, a, {_AT_CWD}, b, {_EXCHANGE})"
    )
    names = [str(tree / "parent" / name) for name in "ab"]
    process = subprocess.Popen([sys.executable, "-c", script, *names])
    yield
    process.kill()
    process.wait()


def test_swaps_without_a_pause_lead_nowhere(tree: Path, swapper: None) -> None:
    root, outcomes = AdapterRoot(tree), collections.Counter[str]()
    while outcomes.total() < TRIES or len(outcomes) < 2:
        try:
            texts = read(root, "parent/a")
        except AdapterCheckpointError:
            outcomes["refused"] += 1
            continue
        assert texts == ["inside", "inside"]
        outcomes["read"] += 1
    assert sorted(outcomes) == ["read", "refused"]


def test_links_inside_are_followed_however_they_are_written(tmp_path: Path) -> None:
    root = tmp_path / "root"
    fill(root / "blobs" / "x", "inside")
    (tmp_path / "alias").symlink_to(root)
    snapshot = root / "models" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "one").symlink_to("../../../blobs/x/one")
    (snapshot / "two").symlink_to(tmp_path / "alias" / "blobs" / "x" / "two")
    (root / "absolute").symlink_to(snapshot)
    (root / "chain").symlink_to("models/../absolute/./")
    for path in ("models/snapshots/1", "absolute", "chain", "./chain/", "blobs//x"):
        assert read(AdapterRoot(root), path) == ["inside", "inside"], path


@pytest.mark.parametrize("target", ["..", "../root", "/", "/proc/self/root", "a/../../root/a"])
def test_links_that_leave_the_root_are_refused(tmp_path: Path, target: str) -> None:
    fill(tmp_path / "root" / "a", "inside")
    (tmp_path / "root" / "link").symlink_to(target)
    with pytest.raises(AdapterCheckpointError, match="leaves the adapter root"):
        read(AdapterRoot(tmp_path / "root"), "link")


def test_what_is_not_there_is_told_with_what_is_near(tmp_path: Path) -> None:
    fill(tmp_path / "hotel", "inside")
    root = AdapterRoot(tmp_path)
    (tmp_path / "hotel" / "adapter").mkdir(parents=True, exist_ok=True)
    for path, meant in (("hotl/adapter", "did you mean 'hotel/adapter'"), ("hotl/b", "hub:hotl/b")):
        with pytest.raises(AdapterCheckpointError, match=f"does not exist .* {meant}"):
            AdapterRoot(tmp_path).open_directory(path)
    with pytest.raises(AdapterCheckpointError, match=r"does not exist .* did you mean 'hotel'\?"):
        read(root, "hotl")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(AdapterCheckpointError) as refused:
        read(root, "quite another")
    step = "put the adapter's folder there, or let `turret adapters upload NAME DIR` send it"
    assert str(refused.value).endswith(f"the adapter root {tmp_path}, which has hotel; {step}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterCheckpointError) as refused:
        read(AdapterRoot(tmp_path / "empty"), "hotel")
    assert str(refused.value).endswith(f"which is empty; {step}")
    with pytest.raises(AdapterCheckpointError, match="what lies elsewhere can be uploaded"):
        read(root, "/hotel")
    # The root itself may have gone since the start.
    (tmp_path / "empty").rmdir()
    for path in (".", "./", "hotel"):
        with pytest.raises(AdapterCheckpointError, match=r"does not exist .*, which is empty"):
            read(AdapterRoot(tmp_path / "empty"), path)


def test_a_path_one_level_off_is_told_by_the_one_that_is_there(tmp_path: Path) -> None:
    root = tmp_path / "examples" / "adapters"
    (root / "hotel" / "next").mkdir(parents=True)
    (root / "json").mkdir()
    for path, told in (
        # From where the server was started, as after --adapter-root.
        ("adapters/json", "does not exist .*; did you mean 'json'"),
        ("examples/adapters/hotel/next", "does not exist .*; did you mean 'hotel/next'"),
        (str(root / "hotel" / "next"), "and stay inside it; from there it is 'hotel/next'"),
        ("next", "does not exist .*; did you mean 'hotel/next'"),
        ("hotel/nexd", "does not exist .*; did you mean 'hotel/next'"),
        (str(tmp_path), "and stay inside it; what lies elsewhere can be uploaded"),
        (f"{root}/../adapters/json", "and stay inside it; from there it is 'json'"),
        ("../adapters/json", "and stay inside it; from there it is 'json'"),
        ("../../json", "and stay inside it; what lies elsewhere can be uploaded"),
    ):
        with pytest.raises(AdapterCheckpointError, match=told):
            AdapterRoot(root).open_directory(path)
    # Two have it: neither is proposed.
    (root / "json" / "next").mkdir()
    with pytest.raises(AdapterCheckpointError, match=r"which has hotel, json; put"):
        AdapterRoot(root).open_directory("next")


def test_a_walk_ends_and_leaves_no_descriptor(tmp_path: Path) -> None:
    root = tmp_path / "root"
    fill(root / "a", "inside")
    (root / "loop").symlink_to("loop")
    (root / "ping").symlink_to("pong")
    (root / "pong").symlink_to("ping")
    (root / "growing").symlink_to("./growing/growing")
    (root / "files").mkdir()
    (root / "files" / "one").symlink_to("one")
    before = len(os.listdir("/proc/self/fd"))
    for path in ("loop", "ping", "growing", "files", "nothing", "a/one", "a/" * 500):
        with pytest.raises(AdapterCheckpointError):
            read(AdapterRoot(root), path)
    assert read(AdapterRoot(root), "a") == ["inside", "inside"]
    assert len(os.listdir("/proc/self/fd")) == before
