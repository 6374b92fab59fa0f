"""The cost of switching adapters: resident ones cost nothing, and cold ones delay no other step."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import torch
from cuda.scenarios import expected_step
from cuda.setting import Setting
from cuda.step import Adapter, DecodeStep, Scenario
from cuda.timing import Timing

from turret.server.adapters.lowering.lowered import in_one_block
from turret.server.engine.scheduling.sequence import Step

_ROWS = 8
# Number of adapters, and of steps during which none arrives; few in the interpreter.
_COUNTS = {"cuda": (4, 30), "cpu": (1, 1)}


def time_switching(setting: Setting) -> None:
    """Steps that alternate between adapters on the device, and steps while adapters arrive."""
    rows, (num_adapters, num_steps) = min(_ROWS, setting.rows), _COUNTS[setting.device.type]
    step = DecodeStep(
        setting.model, setting.num_layers, rows, setting.context, setting.dtype, setting.device
    )
    shape = f"{rows} rows, {setting.num_layers} layers"
    lora = Scenario("lora", (1,) * rows, (setting.rank,) * num_adapters)
    adapters = step.adapters(lora)
    # Each adapter is also copied to the device again, under another key (``_on_host``).
    step.forget(adapters * 2)
    plans = [step.plan([adapter] * rows) for adapter in adapters]
    for plan in plans * 3:
        step.run(plan)
    same = setting.stopwatch.time(lambda: step.run(plans[0]), cold=False)
    turns = itertools.cycle(plans)
    switched = setting.stopwatch.time(lambda: step.run(next(turns)), cold=False)
    setting.report.add(
        "switch, adapters on device", shape, switched, expected_step(setting, rows, lora),
        over_same=switched.p50 / same.p50,
    )  # fmt: skip
    base = step.plan([None] * rows)
    for _ in range(3):
        # The first run compiles, the second captures, the third replays.
        step.run(base)
    alone = [_seconds(step, base) for _ in range(num_steps)]
    beside: list[float] = []
    first: list[float] = []
    for number, adapter in enumerate(adapters):
        cold = _on_host(adapter, f"cold {number}")
        start = time.perf_counter()
        while not step.is_near(cold) and time.perf_counter() - start < 1.0:
            beside.append(_seconds(step, base))
        beside.append(_seconds(step, base))
        first.append(_seconds(step, step.plan([cold] * rows)))
    timing = Timing.of([1e3 * seconds for seconds in beside])
    setting.report.add(
        "step beside a cold adapter", shape, timing, expected_step(setting, rows, None),
        over_alone=timing.p50 / (1e3 * sorted(alone)[num_steps // 2]),
        worst_ms=1e3 * max(beside), worst_alone_ms=1e3 * max(alone),
        first_step_ms=1e3 * sorted(first)[len(first) // 2],
    )  # fmt: skip


def _seconds(step: DecodeStep, plan: Step) -> float:
    """The time of a step, from the start of the host's work to the end of the device's."""
    start = time.perf_counter()
    step.run(plan)
    if step.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _on_host(adapter: Adapter, key: str) -> Adapter:
    """The same adapter, in the form of a server's host memory."""
    modules = {
        name: module.with_tensors(tensor.cpu() for tensor in module.tensors())
        for name, module in adapter.operators.modules.items()
    }
    return Adapter(key, replace(adapter.operators, modules=in_one_block(modules)[0]))
