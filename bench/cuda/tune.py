"""Searches launch parameters, and prints the best ones as a row for ``kernels/gpu/common.py``."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from cuda.adapters import make_pack, make_table
from cuda.setting import Setting, captured, milliseconds
from cuda.step import random_nf4

from turret.kernels.gpu import common as tuning_module
from turret.kernels.gpu.common import Tuning
from turret.kernels.gpu.low_rank import segmented_expand, segmented_shrink
from turret.kernels.gpu.nf4 import nf4_matmul

LOW_RANK = {
    "programs": (264, 528, 1056),
    "shrink_split_k": (512, 1024, 2048),
    "shrink_block_k": (128, 256),
    "expand_block_n": (128, 256),
}
BASE = {"nf4_block_n": (64, 128), "nf4_programs": (256, 512, 1024), "nf4_part_blocks": (4, 8, 16)}


def tune(setting: Setting) -> None:
    """Try every combination on qkv with 8 distinct adapters, and on the base product."""
    inner, outs = setting.model.groups["qkv"]
    ranks = (setting.rank,) * min(8, setting.rows)
    pack = make_pack(inner, outs, ranks, setting.dtype, setting.device)
    slots = [1 + row % len(ranks) for row in range(setting.rows)]
    table = make_table(pack.bounds, slots, setting.device)
    x = setting.random(setting.rows, inner)
    y = setting.random(setting.rows, sum(outs))

    def low_rank() -> None:
        v = segmented_shrink(x, pack.a, pack.slice_ranks, table)
        segmented_expand(y, v, pack.b, pack.slice_ranks, table)

    weight = random_nf4(sum(outs), inner, setting.device)
    few = x[: min(16, setting.rows)]
    best = Tuning()
    for grid, run in ((LOW_RANK, low_rank), (BASE, lambda: nf4_matmul(few, weight))):
        best = _search(setting, best, grid, run)
    print(f'    "{setting.report.name}": {best},')


def _search(setting: Setting, start: Tuning, grid: dict, run) -> Tuning:
    found, best_ms = start, float("inf")
    combinations = list(itertools.product(*grid.values()))
    for values in combinations[: 2 if setting.device.type == "cpu" else None]:
        candidate = replace(start, **dict(zip(grid, values, strict=True)))
        _use(setting, candidate)
        # A launch fails if its parameters need more shared memory than the device has.
        try:
            ms = milliseconds(captured(run))
        except RuntimeError as error:
            print(f"{values}: {type(error).__name__}")
            continue
        print(f"{dict(zip(grid, values, strict=True))}: {ms:.4f} ms")
        if ms < best_ms:
            found, best_ms = candidate, ms
    _use(setting, found)
    return found


def _use(setting: Setting, candidate: Tuning) -> None:
    """Make the kernels use these parameters from now on."""
    if setting.device.type == "cuda":
        tuning_module._TABLE[torch.cuda.get_device_name(setting.device)] = candidate
        tuning_module.tuning.cache_clear()
