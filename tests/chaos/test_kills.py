"""kill -9 during any admin call leaves the state before or after the call."""

from __future__ import annotations

import random
import threading
from collections import Counter
from pathlib import Path

import grpc
import pytest
from builders.bases.tiny_models import save_tiny_model
from builders.random_adapters import AdapterSpec, arch_of, write_adapter
from chaos.administration import PATHS, Administrator, Entry, Operation, State, is_before_or_after
from servers.zygote import shared_zygote

from turret.clients.errors import TurretRpcError

# Maximum number of seconds from the first call to the kill; a dozen calls fit in this time.
MOST_SECONDS = 0.5
# Rejections: a fusion of unsuitable adapters, a second merge, a component in use.
REFUSALS = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("chaos") / "model")


def write_adapters(model: Path, root: Path) -> None:
    for seed, name in enumerate(PATHS):
        write_adapter(root, arch_of(model), AdapterSpec(name, rank=4), seed)


def _outcome(administrator: Administrator, operation: Operation, state: State) -> grpc.StatusCode:
    try:
        administrator.perform(operation, state)
    except TurretRpcError as error:
        return error.code
    return grpc.StatusCode.OK


@pytest.mark.slow
def test_a_kill_in_any_call_leaves_the_state_before_or_after(
    model: Path, tmp_path: Path, chaos_kills: int
) -> None:
    root, state_dir = tmp_path / "adapters", tmp_path / "state"
    write_adapters(model, root)
    flags = ("--model", str(model), "--adapter-root", str(root), "--state-dir", str(state_dir))
    source = random.Random(3)
    known: State = {}
    pending: Operation | None = None
    done: Counter[str] = Counter()
    cut: Counter[str] = Counter()
    base = ""
    for number in range(chaos_kills + 1):
        life = shared_zygote().start(tmp_path, *flags)
        administrator = Administrator(life.address, root)
        found = administrator.state()
        if pending is None:
            assert found == known
        else:
            assert is_before_or_after(pending, known, found), (pending, known, found)
            cut[f"{pending.kind} {'before' if found == known else 'after'}"] += 1
        # All registered adapters are served, the base is restored, and nothing is left over.
        assert not administrator.client.adapters.get_merge_state().active
        base = base or administrator.generate()
        assert administrator.generate() == base
        for name in found:
            administrator.generate(name)
        assert list((state_dir / "incoming").iterdir()) == []
        kept = {f"files/{e.uuid}.{e.generation}" for e in found.values()}
        assert {f"files/{p.name}" for p in (state_dir / "files").iterdir()} <= kept
        if number == chaos_kills:
            life.process.terminate()
            life.wait()
            break
        known, pending = found, None
        killer = threading.Timer(source.uniform(0.0, MOST_SECONDS), life.kill)
        killer.start()
        while True:
            pending = administrator.choose(source, known)
            ended = _outcome(administrator, pending, known)
            if ended is grpc.StatusCode.UNAVAILABLE:
                break
            if ended is not grpc.StatusCode.OK:
                assert ended in REFUSALS, pending
                done["refused"] += 1
                pending = None
                continue
            try:
                after = administrator.state()
            except TurretRpcError:
                break
            done[pending.kind] += 1
            known, pending = after, None
        killer.join()
        life.wait()
        administrator.client.close()
    print(f"\n{sum(done.values())} calls {dict(done)}; cut short: {dict(cut)}")
    assert sum(cut.values()) > 0


def test_the_oracle_finds_a_wrong_state() -> None:
    entry = Entry("u", 1, "d", False)
    before = {"x": entry, "y": entry}
    replace = Operation("replace", "x")
    assert is_before_or_after(replace, before, before)
    after = {**before, "x": Entry("u", 2, "e", False)}
    assert is_before_or_after(replace, before, after)
    for wrong in (
        {"x": entry},
        {"y": entry},
        {**after, "y": entry._replace(pinned=True)},
        {**before, "x": Entry("u", 3, "e", False)},
        {**before, "x": Entry("v", 2, "e", False)},
        {**after, "z": entry},
    ):
        assert not is_before_or_after(replace, before, wrong)
    assert not is_before_or_after(Operation("merge", "x"), before, after)
