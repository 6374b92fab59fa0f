"""Decode steps whose launches begin before those before them have ended, and whether they may."""

from __future__ import annotations

from dataclasses import replace

import torch
from cuda.scenarios import expected_step
from cuda.setting import Setting
from cuda.step import DecodeStep, Scenario
from cuda.tune import use

from turret.kernels.gpu.shared.tuning import has_early_launches, tuning
from turret.server.engine.scheduling.scheduler import Step

_ADAPTERS = 8


def time_early_launches(setting: Setting) -> None:
    """A step of the base and one of LoRA, with ``launch_pdl`` and without: equal bits, two times.

    Captured, as the server runs it, and replayed a few times for the bits.
    """
    rows, device = setting.rows, setting.device
    found = tuning(device)
    ways = (False, True) if has_early_launches(device) else (False,)
    step = DecodeStep(
        setting.model, setting.num_layers, rows, setting.context, setting.dtype, device
    )
    shape = f"{rows} rows, {setting.num_layers} layers"
    count = min(_ADAPTERS, rows)
    lora = Scenario("lora", tuple(1 + row % count for row in range(rows)), (setting.rank,) * count)
    adapters = step.adapters(lora)
    plans = {
        "base": step.plan([None] * rows),
        f"lora {count} distinct": step.plan([adapters[slot - 1] for slot in lora.slot_of_row]),
    }
    try:
        for name, plan in plans.items():
            serial: tuple[torch.Tensor, float] | None = None
            for is_early in ways:
                use(setting, replace(found, launch_pdl=is_early))
                # Steps captured so far were launched the other way.
                step.forget()
                bits = [_logits(step, plan) for _ in range(6)]
                timing = setting.stopwatch.time(lambda p=plan: step.run(p), cold=False)
                bits.append(_logits(step, plan))
                first = bits[0] if serial is None else serial[0]
                assert all(torch.equal(b, first) for b in bits), f"{name}: other bits"
                facts = {} if serial is None else {"over_serial": timing.p50 / serial[1]}
                kind = "early launches" if is_early else "launches in turn"
                expected = expected_step(setting, rows, None if name == "base" else lora)
                setting.report.add(f"step {name}, {kind}", shape, timing, expected, **facts)
                serial = serial or (first, timing.p50)
    finally:
        use(setting, found)
    if len(ways) == 1:
        print("early launches: skipped, the device has none")


def _logits(step: DecodeStep, plan: Step) -> torch.Tensor:
    logits = step.run(plan).logits
    assert logits is not None
    # Copy the result, because a replay overwrites it.
    return logits.clone()
