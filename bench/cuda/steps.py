"""Whole decode steps of the server, with many adapters in one batch."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch
from cuda.setting import Setting, milliseconds
from cuda.step import ROOM, DecodeStep, Scenario

from turret.server.engine.scheduling.sequence import Step


def scenarios(setting: Setting) -> list[Scenario]:
    """LoRA adapters of one rank and of mixed ranks, and up to 8 DoRA, LoHa or LoKr adapters."""

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
    step = _decode_step(setting, num_layers=1, context=min(300, setting.context))
    scenario = scenarios(setting)[min(1, len(setting.adapters) - 1)]
    adapters = step.adapters(scenario)
    step.forget(adapters)
    plan = step.plan([adapters[slot - 1] for slot in scenario.slot_of_row])
    assert torch.isfinite(_logits(step, plan)).all()


def time_step(setting: Setting) -> None:
    """Time the base alone, and each scenario, at several batch sizes."""
    step = _decode_step(setting)
    for rows in sorted({1, 16, setting.rows} & set(range(setting.rows + 1))):
        base = _time(setting, step, None, rows, 0.0)
        chosen = scenarios(setting)
        if rows < setting.rows:
            ranks = (setting.rank,) * rows
            chosen = [Scenario(f"lora {rows} distinct", tuple(range(1, rows + 1)), ranks)]
        for scenario in chosen:
            try:
                _time(setting, step, scenario, rows, base)
            except torch.cuda.OutOfMemoryError:
                setting.report.skip(f"step {scenario.name}", f"{rows} rows")


def time_wide_step(setting: Setting) -> None:
    """Time the base with so many rows that its products take four passes over the weights."""
    rows = 4 * setting.rows
    step = _decode_step(setting, rows=rows, context=min(64, setting.context))
    _time(setting, step, None, rows, 0.0)


def same_bits(setting: Setting) -> None:
    """Check that a row has the same bits in every batch, whether the step is captured or not."""
    step = _decode_step(setting, num_layers=min(4, setting.num_layers))
    scenario = scenarios(setting)[1]
    adapters = step.adapters(scenario)
    step.forget(adapters)
    # Every other row uses the base alone.
    slots = [slot if row % 2 else 0 for row, slot in enumerate(scenario.slot_of_row)]
    plan = step.plan([adapters[slot - 1] if slot else None for slot in slots])
    whole = _logits(step, plan)
    for count in sorted({1, 2, 3, 4, 8, 12, 16, 24, 32, 48} & set(range(setting.rows))):
        part = Step(plan.scheduled[:count], (), 0)
        alone = _logits(step, part)
        step.capture(part)
        for name, found in (("eager", alone), ("captured", _logits(step, part))):
            differ = int((found != whole[:count]).any(dim=1).sum())
            assert differ == 0, f"{differ} of {count} rows differ from the whole batch, {name}"


def prefill(setting: Setting) -> None:
    """Time a prompt without adapters, in two steps, as the server computes it."""
    length, size = setting.prompt, setting.prompt // 2
    model, layers = setting.model, setting.num_layers
    step = DecodeStep(model, layers, 1, length, setting.dtype, setting.device, num_tokens=size)
    parts = [step.prompt(0, size), step.prompt(size, length)]
    ms = _wall(lambda: [step.draw(part) for part in parts], setting)
    setting.report.add(
        "prefill", f"{length} tokens", ms, step.base_bytes, tokens_s=round(1e3 * length / ms)
    )


def _decode_step(
    setting: Setting,
    num_layers: int | None = None,
    context: int | None = None,
    rows: int | None = None,
) -> DecodeStep:
    return DecodeStep(
        setting.model,
        num_layers or setting.num_layers,
        rows or setting.rows,
        context or setting.context,
        setting.dtype,
        setting.device,
    )


def _time(
    setting: Setting, step: DecodeStep, scenario: Scenario | None, rows: int, base: float
) -> float:
    """The time of a step on the device in ms. Eager and replayed steps must have the same bits.

    The stored row also has the host's additional time, until the tokens are read, and the time of a
    step that is not captured.
    """
    adapters = [] if scenario is None else step.adapters(scenario)
    step.forget(adapters)
    slots = (0,) * rows if scenario is None else scenario.slot_of_row
    plan = step.plan([adapters[slot - 1] if slot else None for slot in slots])
    name = "base" if scenario is None else scenario.name
    first = _logits(step, plan)
    assert torch.isfinite(first).all(), name
    replay = step.capture(plan)
    assert torch.equal(first, _logits(step, plan)), f"{name}: replayed bits differ"
    ms = milliseconds(replay, cold=False)
    size = step.base_bytes + sum(adapter.operators.num_bytes for adapter in adapters)
    found = {"over_base": ms / base} if base else {}
    wall = _wall(lambda: step.advance(plan), setting)
    eager = _wall(lambda: step.advance_eagerly(plan), setting)
    setting.report.add(
        f"step {name}",
        f"{rows} rows, {setting.num_layers} layers",
        ms,
        size,
        **found,
        host_ms=wall - ms,
        eager_ms=eager,
    )
    return ms


def _wall(run: Callable[[], object], setting: Setting) -> float:
    """The median time in milliseconds of a function that waits for the device."""
    times = []
    for _ in range(ROOM // 4 if setting.device.type == "cuda" else 1):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[len(times) // 2]


def _logits(step: DecodeStep, plan: Step) -> torch.Tensor:
    logits = step.run(plan).logits
    assert logits is not None
    # Copy the result, because a replay overwrites it.
    return logits.clone()
