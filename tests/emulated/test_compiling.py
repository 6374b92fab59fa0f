"""Kernels that are compiled ahead have the identity of those that launches on a GPU ask for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from kernel_traffic import HALF
from method_oracle import twin
from ptx.launcher import bench_module
from triton import knobs
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver

from turret.kernels.gpu import common
from turret.kernels.gpu.rms_norm import residual_rms_norm
from turret.server.cli import main
from turret.server.engine.step.gpu_executor import (
    GpuExecutor,
    Target,
    compile_launches,
    compile_steps,
)

CPU, META = torch.device("cpu"), torch.device("meta")
# Rows 0, 1 and 3 have adapters, two of them the same one; row 2 uses the base model.
SLOT_OF_ROW = (1, 2, 0, 1)


@pytest.fixture(autouse=True)
def on_a_gpu() -> Iterator[None]:
    """Launches on tensors of the CPU choose the tiles of a GPU."""
    with patch.object(common, "_INTERPRETER", common.Tuning()):
        common.tuning.cache_clear()
        yield
    common.tuning.cache_clear()


def decode_step(device: torch.device) -> Any:
    model = bench_module("cuda.kernel_launches").Model(
        hidden=64, heads=4, kv_heads=2, head_dim=16, inner=192, vocab=128
    )
    return bench_module("cuda.step").DecodeStep(
        model, 3, len(SLOT_OF_ROW), 37, HALF, device, num_tokens=96
    )


def compile_in(executor: GpuExecutor) -> None:
    compile_steps(executor, lambda *_: None)


def specialisations(launches: Callable[[], object]) -> set[str]:
    """Triton's specialisation data of each kernel that is launched, which is not compiled."""
    found: set[str] = set()

    def note(*, compile: Any, **_: Any) -> bool:
        found.add(json.dumps(json.loads(compile["specialization_data"]), sort_keys=True))
        return True

    with knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = note
        launches()
    return found


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_launches_with_memory_ask_for_what_was_compiled_without(method: str) -> None:
    ahead = decode_step(META)
    known = specialisations(lambda: compile_launches(lambda: compile_in(ahead._executor), 80))
    step = decode_step(CPU)
    scenario = bench_module("cuda.step").Scenario(method, SLOT_OF_ROW, (12, 64), method)
    made = step.adapters(scenario)
    # The store gets another size.
    step.forget(made)
    sizes = [
        len(one._executor.store._pack.projections["qkv"].slice_ranks[0]) for one in (ahead, step)
    ]
    assert sizes[0] % 4 != sizes[1] % 4, "the layers' parts of tables begin at other addresses"
    target: Any = Target(80)
    driver.set_active(target)
    with torch.inference_mode():
        found = specialisations(lambda: compile_in(step._executor))
        assert found == known
        assert len(known) > 40
        for slots in (SLOT_OF_ROW, (0,) * 4):
            planned = step.plan([made[slot - 1] if slot else None for slot in slots])
            used = specialisations(lambda planned=planned: step.run(planned))
            assert used
            assert used <= known
    other = specialisations(lambda: compile_launches(lambda: compile_in(ahead._executor), 90))
    assert not other & known


def test_the_command_compiles_for_several_gpus_and_needs_none(tmp_path: Path) -> None:
    places = {"TRITON_CACHE_DIR": str(tmp_path)}
    found = {}
    for memory in ("20MB", "90MB"):
        model = ["--model", str(twin("llama").folder), "--device", "cuda"]
        arguments = ["compile", "--compute-capability", "8.0", "8.9", *model]
        with patch.dict(os.environ, places):
            found[memory] = specialisations(
                lambda arguments=arguments, memory=memory: main(
                    [*arguments, "--adapter-device-bytes", memory]
                )
            )
    assert found["20MB"] == found["90MB"], "the forms of kernels depend on the memory"
    capabilities = [json.loads(form)["target"]["arch"] for form in found["90MB"]]
    assert set(capabilities) == {80, 89}
    assert capabilities.count(80) == capabilities.count(89) > 40


def test_the_target_is_that_of_the_driver() -> None:
    class Device:
        def get_current_device(self) -> int:
            return 0

        def get_device_capability(self, device: int) -> tuple[int, int]:
            return 8, 9

    device: Any = Device()
    assert CudaDriver.get_current_target(device) == Target(89).get_current_target()


def test_compiled_code_is_found_by_a_launch(tmp_path: Path) -> None:
    hits: list[bool] = []

    def compiled(*, cache_hit: bool, **_: Any) -> None:
        hits.append(cache_hit)

    def launch(device: torch.device) -> None:
        hidden, weight = (torch.ones(size, dtype=HALF, device=device) for size in ((3, 64), (64,)))
        residual_rms_norm(hidden, None, weight, 1e-6)

    def launch_with_memory() -> None:
        """Stop before the launch, because there is no GPU."""
        with pytest.raises(AttributeError, match="launcher_cls"):
            launch(CPU)

    with knobs.cache.scope(), knobs.compilation.scope():
        knobs.cache.dir = str(tmp_path)
        knobs.compilation.listener = compiled
        compile_launches(lambda: launch(META), 86)
        assert hits == [False]
        assert list(tmp_path.rglob("*.cubin"))
        # Another device has compiled nothing yet.
        with patch.object(Target, "get_current_device", lambda self: 0):
            launch_with_memory()
        assert hits == [False, True]
