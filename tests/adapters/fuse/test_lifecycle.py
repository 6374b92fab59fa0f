"""Fusions on a running registry: holds, interruptions, names, restarts."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from builders.adapters import base_of
from builders.mixes.fuse import Fusions, Turnstile, cancellations, model
from builders.registries import WAIT_SECONDS, in_thread, until
from said import says

from turret.server.adapters.module_fuser import FusedModule, ModuleFuser
from turret.server.adapters.registry import AdapterRegistry
from turret.server.adapters.state_dir import StateDir
from turret.server.basics.work import Cancellation
from turret.server.errors import (
    AdapterExistsError,
    AdapterInUseError,
    AdapterNotFoundError,
    AdapterUnloadedError,
    BudgetExceededError,
    InvalidRequestError,
    QueueFullError,
    UnavailableError,
)

MIX = {"a": 1.0, "b": 0.5}


@pytest.fixture
def fusions(tmp_path: Path) -> Iterator[Fusions]:
    made = Fusions(tmp_path)
    for seed, name in enumerate(MIX):
        made.add(name, seed=seed)
    yield made
    made.close()


def check_nothing_is_left(fusions: Fusions) -> None:
    assert [record.name for record in fusions.registry.list()] == ["a", "b"]
    assert {record.in_flight for record in fusions.registry.list()} == {0}
    assert list((fusions.state / "files").iterdir()) == []
    assert list((fusions.state / "incoming").iterdir()) == []
    assert sorted(path.name for path in (fusions.state / "adapters").iterdir()) == [
        "a.json",
        "b.json",
    ]


def test_a_cancellation_ends_a_fusion_between_modules(
    fusions: Fusions, monkeypatch: pytest.MonkeyPatch
) -> None:
    turnstile, cancellation = Turnstile(monkeypatch), Cancellation()
    running = fusions.start(MIX, cancellation=cancellation)
    turnstile.wait()
    assert {record.in_flight for record in fusions.registry.list()} == {1}
    cancellation.set(UnavailableError("enough"))
    cancellation.set(InvalidRequestError("the first one counts"))
    turnstile.opened.set()
    with pytest.raises(UnavailableError, match="enough"):
        running.result(WAIT_SECONDS)
    assert turnstile.passed == 3
    check_nothing_is_left(fusions)
    assert fusions.fuse(MIX).relative_error < 1e-6


def test_a_cancellation_ends_a_fusion_while_it_writes(
    fusions: Fusions, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancellation = Cancellation()
    stage = fusions.registry.stage

    def staged(files: Any) -> Any:
        upload = stage(files)
        write = upload.write

        def one_and_no_more(name: str, data: bytes | memoryview) -> None:
            write(name, data)
            if name.endswith(".safetensors"):
                cancellation.set(UnavailableError("enough"))

        upload.write = one_and_no_more
        return upload

    monkeypatch.setattr(fusions.registry, "stage", staged)
    with pytest.raises(UnavailableError, match="enough"):
        fusions.start(MIX, cancellation=cancellation).result(WAIT_SECONDS)
    check_nothing_is_left(fusions)


def test_only_one_fusion_runs_at_a_time(fusions: Fusions, monkeypatch: pytest.MonkeyPatch) -> None:
    turnstile = Turnstile(monkeypatch)
    running = fusions.start(MIX)
    turnstile.wait()
    with pytest.raises(QueueFullError):
        fusions.start(MIX)
    turnstile.opened.set()
    assert running.result(WAIT_SECONDS).record.name == "fused-0"
    assert fusions.fuse(MIX).record.name == "fused-2"


def test_unload_waits_for_a_fusion_or_ends_it(
    fusions: Fusions, monkeypatch: pytest.MonkeyPatch
) -> None:
    turnstile = Turnstile(monkeypatch)
    running = fusions.start(MIX)
    turnstile.wait()
    with pytest.raises(AdapterInUseError):
        fusions.registry.unload("a", timeout_seconds=0.01)
    thread, results = in_thread(lambda: fusions.registry.unload("b", "FORCE"))
    until(lambda: fusions.registry.get("b").state == "DELETING")
    turnstile.opened.set()
    with pytest.raises(AdapterUnloadedError, check=says("UNLOADED_WHILE_FUSED", adapter="b")):
        running.result(WAIT_SECONDS)
    thread.join(WAIT_SECONDS)
    assert results == [None]
    assert [record.name for record in fusions.registry.list()] == ["a"]
    with pytest.raises(AdapterNotFoundError):
        fusions.fuse(MIX)


def test_a_member_replaced_during_a_fusion_is_fused_as_it_was(
    fusions: Fusions, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fusions.fuse(MIX).record.facts.digest
    turnstile = Turnstile(monkeypatch)
    running = fusions.start(MIX)
    turnstile.wait()
    fusions.registry.replace("a", "b")
    turnstile.opened.set()
    assert running.result(WAIT_SECONDS).record.facts.digest == before
    assert fusions.fuse(MIX).record.facts.digest != before


def test_closing_ends_a_fusion(fusions: Fusions, monkeypatch: pytest.MonkeyPatch) -> None:
    turnstile = Turnstile(monkeypatch)
    running = fusions.start(MIX)
    turnstile.wait()
    asked = cancellations(monkeypatch)
    thread, _ = in_thread(fusions.close)
    assert asked.wait(WAIT_SECONDS)
    turnstile.opened.set()
    with pytest.raises(UnavailableError, check=says("SHUTTING_DOWN")):
        running.result(WAIT_SECONDS)
    thread.join(WAIT_SECONDS)
    check_nothing_is_left(fusions)
    with pytest.raises(UnavailableError, check=says("SHUTTING_DOWN")):
        fusions.start(MIX)


def test_a_retry_finds_the_result_and_other_content_is_refused(fusions: Fusions) -> None:
    first = fusions.fuse(MIX, name="both")
    again = fusions.fuse(MIX, name="both")
    assert (again.record.uuid, again.record.generation) == (first.record.uuid, 1)
    assert again.modules == first.modules
    with pytest.raises(AdapterExistsError, check=says("ADAPTER_EXISTS")):
        fusions.fuse({"a": 1.0, "b": 0.75}, name="both")
    assert len(list((fusions.state / "files").iterdir())) == 1


def test_a_fused_adapter_survives_a_restart_and_is_deleted_when_unloaded(fusions: Fusions) -> None:
    result = fusions.fuse(MIX, name="both")
    exact = fusions.exact(MIX)
    fusions.close()
    registry = AdapterRegistry(
        fusions.root, base_of(model()), 1 << 28, 64, state=StateDir(fusions.state, 1 << 24)
    )
    assert registry.restore() == 3
    record = registry.pin("both")
    assert (record.facts.digest, record.uuid) == (result.record.facts.digest, result.record.uuid)
    assert fusions.deltas(result).keys() == exact.keys()
    registry.unpin("both")
    registry.unload("both")
    assert list((fusions.state / "files").iterdir()) == []
    registry.close()


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities on Linux alone")
def test_requests_take_precedence_over_a_fusion(
    fusions: Fusions, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.getpriority(os.PRIO_PROCESS, 0) >= 10:
        pytest.skip("everything here is nice already")
    priorities: list[int] = []
    fuse = ModuleFuser.fuse

    def watched(fuser: ModuleFuser, *args: Any) -> FusedModule:
        priorities.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return fuse(fuser, *args)

    monkeypatch.setattr(ModuleFuser, "fuse", watched)
    mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    fusions.fuse(MIX)
    assert set(priorities) == {10}
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == mine < 10


def test_a_result_that_is_too_large_ends_the_fusion_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fusions = Fusions(tmp_path, max_upload_bytes=1 << 12)
    fusions.add("a")
    turnstile = Turnstile(monkeypatch)
    turnstile.opened.set()
    with pytest.raises(BudgetExceededError, check=says("UPLOAD_TOO_LARGE", max_upload_bytes=4096)):
        fusions.fuse({"a": 1.0})
    # At rank 4 in fp32, the first two modules have 2048 and 1536 bytes, the third has 1536.
    assert turnstile.passed == 3
    fusions.close()
