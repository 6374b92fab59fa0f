"""Decode steps whose launches begin before those before them have ended (``launch_pdl``)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_traffic import HALF, make_pack, traffic
from ptx.fault import Fault
from ptx.launcher import bench_module, emulated

from turret.kernels.gpu.adapters.segmented_shrink import segmented_shrink
from turret.kernels.gpu.clamped_swiglu import clamped_swiglu
from turret.kernels.gpu.gelu_mul import gelu_mul
from turret.kernels.gpu.shared import tuning as tuning_module
from turret.kernels.gpu.shared.tuning import Tuning
from turret.kernels.gpu.tables.segment_table import SegmentTable

SLOT_OF_ROW = (1, 2, 0, 1)
# Triton 3.6 gives the instruction a result that nobody reads.
WAIT = r"griddepcontrol\.wait\s*;"
# Behind what torch does: the first of the step, and the draw.
BASE = {"nf4_rotate", "nf4_matmul", "paged_attention", "residual_rms_norm"}
LORA = {
    *("nf4_shrink", "expand_rotated", "paged_attention", "segmented_expand", "expand_gated"),
    "residual_rms_norm",
}
LOHA = {"nf4_matmul", "rope_kv_write", "paged_attention", "residual_rms_norm", "silu_mul"}


def logits(method: str | None) -> torch.Tensor:
    """Of a small model's decode step."""
    torch.manual_seed(0)
    model = bench_module("cuda.kernel_launches").Model(
        hidden=64, heads=4, kv_heads=2, head_dim=16, inner=192, vocab=128
    )
    steps = bench_module("cuda.step")
    step = steps.DecodeStep(model, 2, len(SLOT_OF_ROW), 37, HALF, torch.device("cpu"))
    chosen: list[Any] = [None] * len(SLOT_OF_ROW)
    if method is not None:
        made = step.adapters(steps.Scenario(method, SLOT_OF_ROW, (12, 64), method))
        chosen = [made[slot - 1] if slot else None for slot in SLOT_OF_ROW]
    return step.run(step.plan(chosen)).logits.clone()


def names(launched: Any) -> set[str]:
    return {name.removesuffix("_kernel") for name in launched}


@pytest.mark.parametrize(
    ("method", "early"), [(None, BASE), ("lora", LORA), ("dora", LORA), ("loha", LOHA)]
)
def test_a_step_has_the_same_bits(method, early):
    """Every kernel waits, or there were a fault; of the base and LoRA all launches are early."""
    with emulated("sm_90"):
        serial = logits(method)
    with emulated("sm_90", launch_pdl=True) as launcher:
        assert torch.equal(logits(method), serial)
    assert names(launcher.early) == early
    others = names(launcher.launches) - early
    assert others == ({"sample_rows"} if method != "loha" else {
        "sample_rows", "hadamard_shrink", "hadamard_expand",
    })  # fmt: skip


def test_the_programs_order_does_not_matter():
    bits = []
    for backwards in (False, True):
        with emulated("sm_90", launch_pdl=True) as launcher:
            launcher.backwards = backwards
            bits.append(logits("lora"))
    assert torch.equal(*bits)


def shrunk() -> torch.Tensor:
    torch.manual_seed(0)
    pack = make_pack(128, (40,), HALF)
    table = SegmentTable(
        max_rows=64, max_row_rank=256, max_components=4, device=torch.device("cpu")
    )
    table.load(next(runs for name, runs, _ in traffic(pack) if name == "mixes"))
    return segmented_shrink(behind(5, 128), pack.a, pack.slice_ranks, table)


def behind(*shape: int) -> torch.Tensor:
    """What an addition on the device before the next launch gives."""
    values = torch.linspace(-2, 2, shape[0] * shape[1]).to(HALF).view(shape)
    return values + 1


@pytest.mark.parametrize(
    "launch",
    [
        shrunk,
        lambda: gelu_mul(behind(3, 256)),
        lambda: clamped_swiglu(behind(3, 256), 1.702, 7.0),
    ],
)
def test_what_other_steps_launch(launch):
    with emulated("sm_90", launch_pdl=True) as launcher:
        early = launch()
    assert launcher.early == set(launcher.launches)
    with emulated("sm_90"):
        assert torch.equal(torch.nan_to_num(early), torch.nan_to_num(launch()))


def edited(kernel: str, edit: Callable[[str], str]) -> Callable[[str], str]:
    """Changes the text of one kernel where it is launched early."""

    def only(ptx: str) -> str:
        is_it = f".entry {kernel}_kernel(" in ptx and re.search(WAIT, ptx)
        return edit(ptx) if is_it else ptx

    return only


def without_wait(ptx: str) -> str:
    return re.sub(WAIT, "", ptx)


def waiting_late(ptx: str) -> str:
    """Before the first store, not before the first load."""
    store = re.search(r"(@%p\d+ )?(st|atom)\.global", without_wait(ptx))
    assert store is not None
    text = without_wait(ptx)
    return f"{text[: store.start()]} griddepcontrol.wait; {text[store.start() :]}"


def leaving(ptx: str) -> str:
    """One program does not wait: it has nothing to do."""
    leave = (
        "{ .reg .pred leaves; .reg .b32 own; mov.u32 own, %ctaid.x;"
        " setp.eq.s32 leaves, own, 1; @leaves ret; } "
    )
    return re.sub(WAIT, lambda match: leave + match[0], ptx)


def fails(method: str | None, edit: Callable[[str], str], message: str) -> None:
    with emulated("sm_90", launch_pdl=True, edit=edit), pytest.raises(Fault, match=message):
        logits(method)


STEPS = {**dict.fromkeys(LOHA | BASE, "loha"), **dict.fromkeys(LORA, "lora"), "nf4_rotate": None}


@pytest.mark.parametrize("kernel", sorted(STEPS))
def test_a_dropped_wait(kernel):
    message = rf"{kernel}_kernel, program .*(before the program has waited|has not waited)"
    fails(STEPS[kernel], edited(kernel, without_wait), message)


@pytest.mark.parametrize("kernel", sorted(STEPS))
def test_a_wait_behind_the_first_load(kernel):
    message = rf"{kernel}_kernel, program .*race: a load .*, which \w.* writes, before"
    fails(STEPS[kernel], edited(kernel, waiting_late), message)


@pytest.mark.parametrize("kernel", ["nf4_shrink", "segmented_expand", "silu_mul"])
def test_a_program_that_leaves_without_waiting(kernel):
    fails(STEPS[kernel], edited(kernel, leaving), rf"{kernel}_kernel, .*ends and has not waited")


def test_an_early_launch_behind_a_copy_is_a_fault():
    with emulated("sm_90", launch_pdl=True):
        x = behind(2, 64).clone()
        with pytest.raises(Fault, match="launched early behind a copy"):
            gelu_mul(x)


def test_the_benchmark_compares_both(monkeypatch):
    """What it does on a device with early launches, here with the emulator for one."""
    early, setting = bench_module("cuda.early"), bench_module("cuda.setting").Setting.tiny()
    seen: list[bool] = []

    def use(_: object, candidate: Tuning) -> None:
        seen.append(candidate.launch_pdl)
        monkeypatch.setattr(tuning_module, "_INTERPRETER", candidate)
        tuning_module.tuning.cache_clear()

    monkeypatch.setattr(early, "use", use)
    monkeypatch.setattr(early, "has_early_launches", lambda _: True)
    with emulated("sm_90") as launcher:
        early.time_early_launches(setting)
    assert seen == [False, True, False, True, False]
    assert names(launcher.early) == BASE | LORA
    kinds = [(row["scenario"], "over_serial" in row) for row in setting.report.rows]
    assert kinds == [
        ("step base, launches in turn", False),
        ("step base, early launches", True),
        ("step lora 4 distinct, launches in turn", False),
        ("step lora 4 distinct, early launches", True),
    ]
