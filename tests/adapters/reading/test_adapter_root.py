"""No path leads out of the adapter root, even if it is changed at the same time."""

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
from said import says, texts_of

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
    """The content of both files."""
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
    """A root with ``parent/a``, and a ``parent/b`` to swap with it that leads outside."""
    outside = tmp_path / "outside"
    fill(outside, "outside")
    fill(tmp_path / "root" / "parent" / "a", "inside")
    SWAPS[request.param](tmp_path / "root" / "parent" / "b", outside)
    return tmp_path / "root"


def test_a_swap_before_any_system_call_never_leaves_the_root(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory is swapped just before the first, second, … lookup of its files."""
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
            # There were fewer lookups, so the swap did not happen.
            break
    else:
        pytest.fail("the walk has more steps than were tried")
    assert outcomes["read"] > 0
    assert outcomes["refused"] > 0


@pytest.fixture
def swapper(tree: Path) -> Iterator[None]:
    """Another process that swaps continuously."""
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


def test_continuous_swaps_never_leave_the_root(tree: Path, swapper: None) -> None:
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


def test_links_within_the_root_are_followed_in_any_spelling(tmp_path: Path) -> None:
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


def test_an_absolute_path_inside_is_a_path_from_the_root(tmp_path: Path) -> None:
    fill(tmp_path / "root" / "a", "inside")
    root = AdapterRoot(tmp_path / "root")
    inside = root.relative(f"{tmp_path}/root/./a/")
    assert (inside, read(root, inside)) == ("a", ["inside", "inside"])
    for outside in (f"{tmp_path}/root/../other", f"{tmp_path}/rooted/a"):
        with pytest.raises(AdapterCheckpointError, check=says("PATH_OUTSIDE_ROOT")):
            read(root, root.relative(outside))
    assert AdapterRoot(None).relative("/a") == "/a"


@pytest.mark.parametrize("target", ["..", "../root", "/", "/proc/self/root", "a/../../root/a"])
def test_links_that_leave_the_root_are_refused(tmp_path: Path, target: str) -> None:
    fill(tmp_path / "root" / "a", "inside")
    (tmp_path / "root" / "link").symlink_to(target)
    with pytest.raises(AdapterCheckpointError, check=says("LINK_OUTSIDE_ROOT")):
        read(AdapterRoot(tmp_path / "root"), "link")


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("hotl/adapter", "hotel/adapter"),
        ("hotel/adaptr", "hotel/adapter"),
        ("hotl", "hotel"),
        ("hotl/b", None),
        ("ROOT/hotel", "hotel"),
        ("quite another", None),
    ],
)
def test_for_a_missing_path_the_closest_is_suggested(
    path: str, meant: str | None, tmp_path: Path
) -> None:
    fill(tmp_path / "hotel", "inside")
    (tmp_path / "hotel" / "adapter").mkdir()
    with pytest.raises(AdapterCheckpointError) as refused:
        AdapterRoot(tmp_path).open_directory(path.replace("ROOT", tmp_path.name))
    (why,) = (text for text in texts_of(refused.value.message) if text.reason == "NO_SUCH_PATH")
    assert why.params.get("closest") == meant


def test_a_missing_root_is_reported(tmp_path: Path) -> None:
    for path in (".", "./", "hotel"):
        with pytest.raises(AdapterCheckpointError, check=says("NO_SUCH_PATH")):
            AdapterRoot(tmp_path / "gone").open_directory(path)


def test_a_walk_ends_and_closes_every_descriptor(tmp_path: Path) -> None:
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
