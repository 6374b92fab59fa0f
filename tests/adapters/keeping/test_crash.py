"""``kill -9`` at random points: a restart finds the state before or after each operation.

Only the process is killed, not the machine. The kernel still writes its buffers, so these tests do
not cover ``fsync``.
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from builders.registries import Registries, Waiter, refs, stage_directory
from checkout import ROOT
from servers.crash_worker import Entry, Operation, entries_of, open_registry, perform

from turret.server.adapters.adapter import AdapterRef

NUM_KILLS = 50
# Maximum number of lines that a worker prints before it is killed; an operation prints two.
MOST_LINES = 16

State = dict[str, Entry]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Registries]:
    registries = Registries(tmp_path)
    yield registries
    registries.close()


def matches(state: State, expected: State) -> bool:
    """Whether two states are equal; an empty uuid or digest matches any."""
    return state.keys() == expected.keys() and all(
        (found := state[name])
        == entry._replace(uuid=entry.uuid or found.uuid, digest=entry.digest or found.digest)
        for name, entry in expected.items()
    )


def after(
    state: State, operation: Operation, digests: dict[str, str], keep_generations: int = 1
) -> State:
    """The state after a complete operation, which keeps one generation or none."""
    kind, name, path, pinned = operation
    state = dict(state)
    if kind == "unload":
        del state[name]
    elif kind in ("load", "upload"):
        state[name] = Entry("", 1, digests[path], pinned)
    elif kind in ("pin", "unpin"):
        state[name] = state[name]._replace(pinned=kind == "pin")
    elif kind == "rollback":
        old = state[name]
        # The digest of the kept generation is checked by reading the adapter.
        state[name] = old._replace(generation=old.kept[-1], digest="", kept=(old.generation,))
    elif state[name].digest != digests[path]:
        old = state[name]
        number = max((old.generation, *old.kept)) + 1
        kept = (old.generation,)[:keep_generations]
        state[name] = old._replace(generation=number, digest=digests[path], kept=kept)
    return state


class Life:
    """One worker, from its start to its violent end."""

    def __init__(self, workers: subprocess.Popen[str], seed: int) -> None:
        assert workers.stdin is not None
        assert workers.stdout is not None
        workers.stdin.write(f"{seed}\n")
        workers.stdin.flush()
        pid, entries, self.uploads, self.incoming, self.errors = json.loads(
            workers.stdout.readline()
        )
        self.restored = _state(entries)
        moment = random.Random(seed)
        # Progress is counted in lines, so that it is the same on busy and idle machines.
        lines_left = moment.randrange(MOST_LINES)
        pause = moment.uniform(0.0, 0.005)
        self.last = self.restored
        self.pending: Operation | None = None
        self.operations: list[str] = []
        if lines_left == 0:
            _kill(pid, pause)
        for line in workers.stdout:
            kind, *rest = json.loads(line)
            lines_left -= 1
            if lines_left == 0:
                _kill(pid, pause)
            if kind == "over":
                return
            if kind == "begin":
                self.pending = Operation(*rest[0])
            else:
                assert self.pending is not None
                self.operations.append(self.pending.kind)
                self.last, self.pending = _state(rest[0]), None
        raise AssertionError("the workers ended")


def _kill(pid: int, pause: float) -> None:
    """Kill a process within its next operations."""
    time.sleep(pause)
    os.kill(pid, signal.SIGKILL)


def _state(entries: dict[str, list[Any]]) -> State:
    found = {name: Entry(*values) for name, values in entries.items()}
    return {name: entry._replace(kept=tuple(entry.kept)) for name, entry in found.items()}


@pytest.fixture
def workers(make: Registries, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = ["servers.crash_worker", str(make.root), str(tmp_path / "state")]
    with subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT / "tests" / "support",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.mark.slow
def test_a_kill_leaves_the_state_before_or_after_each_operation(
    make: Registries, tmp_path: Path, workers: subprocess.Popen[str]
) -> None:
    digests = {path: make().load(path, path).facts.digest for path in "abcd"}
    allowed: list[State] = [{}]
    done: Counter[str] = Counter()
    cut: Counter[str] = Counter()
    for seed in range(NUM_KILLS):
        life = Life(workers, seed)
        found = [matches(life.restored, state) for state in allowed]
        assert any(found), (life.restored, allowed)
        if len(allowed) == 2:
            cut["before" if found[0] else "after"] += 1
        assert life.errors == []
        assert life.incoming == 0
        keys = {
            f"{entry.uuid}.{generation}"
            for entry in life.restored.values()
            for generation in (entry.generation, *entry.kept)
        }
        assert set(life.uploads) <= keys
        allowed = [life.last]
        if life.pending is not None:
            allowed.append(after(life.last, life.pending, digests))
        done.update(life.operations)
    # The kills must have hit every operation; otherwise, the test proves little.
    assert set(done) == {
        *("load", "upload", "replace", "replace_upload", "rollback", "pin", "unpin", "unload")
    }
    assert cut["before"] >= 10
    assert cut["after"] >= 3
    print(f"\n{sum(done.values())} operations done, {sum(cut.values())} cut short: {dict(cut)}")


def test_matching_finds_a_wrong_state() -> None:
    """The check of the test above can fail."""
    entry = Entry("u", 1, "d", False)
    assert matches({"x": entry}, {"x": entry._replace(uuid="")})
    for wrong in (
        {},
        {"y": entry},
        {"x": entry._replace(generation=2)},
        {"x": entry._replace(digest="e")},
        {"x": entry._replace(pinned=True)},
        {"x": entry._replace(uuid="v")},
    ):
        assert not matches({"x": entry}, wrong)


# A crash at each step of an operation on the disk, one after the other.

STEPS = ("open", "mkdir", "rename", "unlink", "fsync", "rmdir")


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
def test_every_step_on_the_disk_may_be_the_last(
    make: Registries,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    keep_generations: int,
) -> None:
    digests = {path: make().load(path, path).facts.digest for path in "ab"}
    is_new = kind in ("load", "upload")
    operation = Operation(kind, "x", "a" if keep_generations or is_new else "b")
    outcomes, was_cut = [], True
    for stop_at in range(60):
        state_path = tmp_path / f"{stop_at}"
        registry = open_registry(make.root, state_path, keep_generations)
        for path in "" if is_new else "ab" if keep_generations else "a":
            staged = stage_directory(registry, make.root / path)
            registry.upload("x", staged, replace=path == "b")
        before = entries_of(registry)
        was_cut = _cut_after(
            monkeypatch, stop_at, functools.partial(perform, registry, make.root, operation)
        )
        # The end of the process releases the directory's lock.
        registry._state.close()
        again = open_registry(make.root, state_path, keep_generations)
        again.restore()
        found = entries_of(again)
        expected = after(before, operation, digests, keep_generations)
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
    # There is exactly one point at which the operation takes effect.
    assert outcomes == sorted(outcomes)
    assert len(outcomes) > 2
    assert not outcomes[0]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_alias_ever_loses_its_target(
    make: Registries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process may end at every step of a move, after which a generation goes that it kept."""
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
