"""Whole decode steps of the server, with many adapters in one batch."""

from __future__ import annotations

import itertools

import torch
from cuda.setting import Setting, milliseconds
from cuda.step import DecodeStep, Scenario

from turret.server.engine.scheduling.sequence import Step


def scenarios(setting: Setting) -> list[Scenario]:
    """LoRA adapters of one rank and of mixed ranks, and 8 adapters of each other method."""

    def in_turn(count: int) -> tuple[int, ...]:
        return tuple(1 + row % count for row in range(setting.rows))

    most, rank = setting.adapters[-1], setting.rank
    few = min(8, most)
    mixed = tuple(itertools.islice(itertools.cycle(setting.mixed_ranks), most))
    return [
        *(Scenario(f"lora {n} distinct", in_turn(n), (rank,) * n) for n in setting.adapters),
        Scenario(f"lora {most} distinct, ranks mixed", in_turn(most), mixed),
        *(
            Scenario(f"{method} {few} distinct", in_turn(few), (rank,) * few, method)
            for method in ("dora", "loha", "lokr")
        ),
    ]


def one_step(setting: Setting) -> None:
    """Run a step of one layer with adapters, for ``compute-sanitizer``; nothing is measured."""
    step = DecodeStep(setting.model, 1, setting.rows, 300, setting.dtype, setting.device)
    scenario = scenarios(setting)[min(1, len(setting.adapters) - 1)]
    adapters = step.adapters(scenario)
    step.forget(adapters)
    plan = step.plan([adapters[slot - 1] for slot in scenario.slot_of_row])
    assert torch.isfinite(_logits(step, plan)).all()


def time_step(setting: Setting) -> None:
    """Time the base alone, the base with sampling, and each scenario, at several batch sizes."""
    step = DecodeStep(
        setting.model,
        setting.num_layers,
        setting.rows,
        setting.context,
        setting.dtype,
        setting.device,
    )
    for rows in sorted({1, 8, setting.rows} & set(range(setting.rows + 1))):
        base = _time(setting, step, None, rows, 0.0)
        if rows == setting.rows:
            plain = step.plan([None] * rows)
            ms = milliseconds(lambda p=plain: step.draw(p), cold=False)
            shape = f"{rows} rows, {setting.num_layers} layers"
            setting.report.add(
                "step base, tokens drawn", shape, ms, step.base_bytes, over_base=ms / base
            )
            chosen = scenarios(setting)
        else:
            chosen = [Scenario(f"lora {rows} distinct", tuple(range(1, rows + 1)), (16,) * rows)]
        for scenario in chosen:
            try:
                _time(setting, step, scenario, rows, base)
            except torch.cuda.OutOfMemoryError:
                print(f"step {scenario.name}: skipped, its adapters do not fit beside the base")


def _time(
    setting: Setting, step: DecodeStep, scenario: Scenario | None, rows: int, base: float
) -> float:
    """The time of a step in milliseconds. Captured and replayed steps must have the same bits."""
    adapters = [] if scenario is None else step.adapters(scenario)
    step.forget(adapters)
    slots = (0,) * rows if scenario is None else scenario.slot_of_row
    plan = step.plan([adapters[slot - 1] if slot else None for slot in slots])
    name = "base" if scenario is None else scenario.name
    # The first run compiles, the second captures, the third replays.
    runs = [_logits(step, plan) for _ in range(3)]
    assert torch.isfinite(runs[0]).all(), name
    assert torch.equal(runs[0], runs[1]), f"{name}: captured bits differ"
    assert torch.equal(runs[0], runs[2]), f"{name}: replayed bits differ"
    ms = milliseconds(lambda: step.run(plan), cold=False)
    size = step.base_bytes + sum(adapter.operators.num_bytes for adapter in adapters)
    found = {"over_base": ms / base} if base else {}
    shape = f"{rows} rows, {setting.num_layers} layers"
    setting.report.add(f"step {name}", shape, ms, size, **found)
    return ms


def _logits(step: DecodeStep, plan: Step) -> torch.Tensor:
    logits = step.run(plan).logits
    assert logits is not None
    # Copy the result, because a replay overwrites it.
    return logits.clone()
