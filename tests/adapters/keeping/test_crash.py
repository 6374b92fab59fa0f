"""The process may end at any step of an operation: a restart finds the state before or after it.

``tests/chaos/test_kills.py`` kills a real server.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from builders.registries import Registries, Waiter, refs, stage_directory, tiny_base

from turret.server.adapters.adapter import AdapterRef
from turret.server.adapters.registry import AdapterRegistry
from turret.server.adapters.state_dir import StateDir

BASE = tiny_base()
# The functions of ``os`` that change the disk.
STEPS = ("open", "mkdir", "rename", "unlink", "fsync", "rmdir")


class Entry(NamedTuple):
    """The registration of a name; an empty uuid or digest stands for any."""

    uuid: str
    generation: int
    digest: str
    pinned: bool
    kept: tuple[int, ...] = ()


State = dict[str, Entry]


def open_registry(root: Path, state_path: Path, keep_generations: int) -> AdapterRegistry:
    state = StateDir(state_path, 1 << 20)
    state.bind(BASE.name, BASE.digest)
    return AdapterRegistry(root, BASE, 1 << 24, 64, state=state, keep_generations=keep_generations)


def entries_of(registry: AdapterRegistry) -> State:
    return {
        r.name: Entry(r.uuid, r.generation, r.facts.digest, r.pinned, r.kept_generations)
        for r in registry.list()
    }


def perform(registry: AdapterRegistry, root: Path, kind: str, path: str) -> None:
    if kind in ("upload", "replace_upload"):
        staged = stage_directory(registry, root / path)
        registry.upload("x", staged, replace=kind == "replace_upload")
        staged.discard()
    elif kind in ("load", "replace"):
        getattr(registry, kind)("x", path)
    else:
        getattr(registry, kind)("x")


def matches(state: State, expected: State) -> bool:
    return state.keys() == expected.keys() and all(
        (found := state[name])
        == entry._replace(uuid=entry.uuid or found.uuid, digest=entry.digest or found.digest)
        for name, entry in expected.items()
    )


def after(state: State, kind: str, digest: str, keep_generations: int) -> State:
    """The state after a complete operation on the name x."""
    if kind == "unload":
        return {}
    if kind in ("load", "upload"):
        return {"x": Entry("", 1, digest, False)}
    old = state["x"]
    if kind == "pin":
        return {"x": old._replace(pinned=True)}
    if kind == "rollback":
        # The digest of the kept generation is checked by reading the adapter.
        return {"x": old._replace(generation=old.kept[-1], digest="", kept=(old.generation,))}
    kept = (old.generation,)[:keep_generations]
    number = max((old.generation, *old.kept)) + 1
    return {"x": old._replace(generation=number, digest=digest, kept=kept)}


class PowerCut(BaseException):
    """A simulated crash. The tested code must not be able to catch it."""


# A dead process closes no files, but this process continues.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("kind", "keep_generations"),
    [
        *[(kind, 0) for kind in ("load", "upload", "replace", "replace_upload", "unload", "pin")],
        *[(kind, 1) for kind in ("replace_upload", "rollback", "unload")],
    ],
)
def test_the_state_is_consistent_after_a_crash_at_any_disk_operation(
    make: Registries,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    keep_generations: int,
) -> None:
    digests = {path: make().load(path, path).facts.digest for path in "ab"}
    is_new = kind in ("load", "upload")
    path = "a" if keep_generations or is_new else "b"
    # By the number of steps before the crash: whether the operation took effect.
    outcomes, was_cut = [], True
    for stop_at in range(60):
        state_path = tmp_path / f"{stop_at}"
        registry = open_registry(make.root, state_path, keep_generations)
        for first in "" if is_new else "ab" if keep_generations else "a":
            perform(registry, make.root, "upload" if first == "a" else "replace_upload", first)
        before = entries_of(registry)
        call = functools.partial(perform, registry, make.root, kind, path)
        was_cut = _cut_after(monkeypatch, stop_at, call)
        # The end of the process releases the directory's lock.
        registry._state.close()
        again = open_registry(make.root, state_path, keep_generations)
        again.restore()
        found = entries_of(again)
        expected = after(before, kind, digests[path], keep_generations)
        assert matches(found, before) or matches(found, expected), stop_at
        outcomes.append(matches(found, expected))
        named = [adapter for name in found for adapter in again._table.find(name).named]
        files = {path.name for path in (state_path / "files").iterdir()}
        assert files == {adapter.key for adapter in named if adapter.source.is_upload}
        for name in found:
            again.pin(name)
        again.close()
        registry.close()
        if not was_cut:
            break
    assert not was_cut
    assert outcomes[-1]
    # The operation takes effect at exactly one point. False comes before True.
    assert outcomes == sorted(outcomes)
    assert len(outcomes) > 2
    assert not outcomes[0]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_alias_ever_loses_its_target(
    make: Registries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process may end at every step of a move that drops the alias's previous target."""
    # By the number of steps before the end: whether the alias moved.
    outcomes, was_cut = [], True
    for stop_at in range(60):
        state_path = tmp_path / f"{stop_at}"
        registry = open_registry(make.root, state_path, 0)
        registry.upload("x", stage_directory(registry, make.root / "a"))
        registry.set_alias("prod", refs("x"))
        registry.upload("x", stage_directory(registry, make.root / "b"), replace=True)
        move = functools.partial(registry.set_alias, "prod", refs("x"))
        was_cut = _cut_after(monkeypatch, stop_at, move)
        registry._state.close()
        again = open_registry(make.root, state_path, 0)
        again.restore()
        ((target,),) = (alias.targets for alias in again.aliases())
        waiter = Waiter(again.acquire([AdapterRef(name="prod", draw=0.5)]))
        assert waiter.wait().error is None
        (adapter, _), *_ = waiter.mix.members
        assert (adapter.name, adapter.generation) == (target.name, target.generation)
        outcomes.append(adapter.generation == 2)
        again.close()
        registry.close()
        if not was_cut:
            break
    assert not was_cut
    assert outcomes == sorted(outcomes)
    assert (outcomes[0], outcomes[-1]) == (False, True)


def _cut_after(monkeypatch: pytest.MonkeyPatch, steps: int, call: Any) -> bool:
    """Run ``call``; returns whether it was cut after this number of steps."""
    left, is_dead, real_open = steps, False, os.open

    def limited(step: Any) -> Any:
        def run(*args: Any, **keywords: Any) -> Any:
            nonlocal left, is_dead
            is_read = step is real_open and not args[1] & os.O_CREAT
            if is_dead or (left == 0 and not is_read):
                is_dead = True
                raise PowerCut
            left -= not is_read
            return step(*args, **keywords)

        return run

    with monkeypatch.context() as patch:
        for name in STEPS:
            patch.setattr(os, name, limited(getattr(os, name)))
        try:
            call()
        except PowerCut:
            return True
    return False
