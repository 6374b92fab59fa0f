"""Many adapters in one batch: one fused projection against baselines, and whole decode steps."""

from __future__ import annotations

import itertools
from collections import Counter

import torch
from cuda import estimate
from cuda.adapters import MIXED_RANKS, exact_update, make_pack, make_table
from cuda.baselines import Padded, PaddedTwoLaunch, gathered_bmm, torch_loop
from cuda.setting import Setting
from cuda.step import DecodeStep, Scenario

from turret.kernels.gpu.adapters.segmented_expand import segmented_expand
from turret.kernels.gpu.adapters.segmented_shrink import segmented_shrink
from turret.server.engine.scheduling.scheduler import Step


def scenarios(setting: Setting) -> list[Scenario]:
    """Distinct adapters of one rank, mixed ranks, and the other methods on 8 adapters."""
    rows = range(setting.rows)

    def dealt(count: int) -> tuple[int, ...]:
        return tuple(1 + row % count for row in rows)

    made = [
        Scenario(f"lora {count} distinct", dealt(count), (setting.rank,) * count)
        for count in setting.adapters
    ]
    most = setting.adapters[-1]
    deal = itertools.cycle(MIXED_RANKS[:2] if setting.device.type == "cpu" else MIXED_RANKS)
    mixed = tuple(itertools.islice(deal, most))
    made.append(Scenario(f"lora {most} distinct, ranks mixed", dealt(most), mixed))
    few = min(8, most)
    for method in ("dora", "loha", "lokr"):
        made.append(Scenario(f"{method} {few} distinct", dealt(few), (setting.rank,) * few, method))
    half = tuple(1 + row % few if row % 2 else 0 for row in rows)
    made.append(Scenario(f"lora {few} distinct on half the rows", half, (setting.rank,) * few))
    return made


def time_projection(setting: Setting) -> None:
    """Shrink and expand over qkv: ours, the GEMV form, and three baselines."""
    inner, outs = setting.model.groups["qkv"]
    x = setting.random(setting.rows, inner)
    for scenario in scenarios(setting):
        if scenario.method != "lora":
            continue
        slots, device = scenario.slot_of_row, setting.device
        pack = make_pack(inner, outs, scenario.ranks, setting.dtype, device)
        exact = exact_update(pack, slots, x)
        used = {slot for slot in slots if slot}
        ranks = sum(scenario.ranks[slot - 1] for slot in used)
        num_bytes = ranks * (len(outs) * inner + sum(outs)) * x.itemsize
        padded = Padded(pack)
        launch = PaddedTwoLaunch(padded, slots, device)
        rows_of_slot = {
            slot: torch.tensor([i for i, s in enumerate(slots) if s == slot], device=device)
            for slot in sorted(used)
        }
        slot_tensor = torch.tensor(slots, device=device)

        def ours(y: torch.Tensor, table, pack=pack) -> None:
            v = segmented_shrink(x, pack.a, pack.slice_ranks, table)
            segmented_expand(y, v, pack.b, pack.slice_ranks, table)

        tables = {gemv: make_table(pack.bounds, slots, device, gemv=gemv) for gemv in (False, True)}
        forms = {
            "ours": lambda y, t=tables[False]: ours(y, t),
            "ours, gemv": lambda y, t=tables[True]: ours(y, t),
            "padded, atomics": lambda y, launch=launch: launch(x, y),
            "torch loop": lambda y, p=pack, r=rows_of_slot: torch_loop(p, r, x, y),
            "gathered bmm": lambda y, p=padded, s=slot_tensor: gathered_bmm(p, s, x, y),
        }
        works = []
        if setting.card is not None:
            works = estimate.low_rank_work(inner, outs, _rows_of_rank(scenario), setting.card)
        first = 0.0
        for name, form in forms.items():
            y = torch.zeros_like(exact, dtype=setting.dtype)
            form(y)
            difference = (y.double() - exact).norm() / exact.norm()
            if name.startswith("ours"):
                setting.check(y, exact)
            timing = setting.stopwatch.time(setting.stopwatch.capture(lambda f=form, y=y: f(y)))
            first = first or timing.p50
            setting.report.add(
                f"qkv {name}", scenario.name.removeprefix("lora "), timing,
                over_ours=timing.p50 / first, gb_s=num_bytes / timing.p50 / 1e6,
                error=float(difference),
                **(estimate.facts(works, setting.card, timing.p50) if name == "ours" else {}),
            )  # fmt: skip


def _rows_of_rank(scenario: Scenario) -> list[tuple[int, int]]:
    """Rank and number of rows of every adapter in use."""
    counts = Counter(slot for slot in scenario.slot_of_row if slot)
    return [(scenario.ranks[slot - 1], count) for slot, count in sorted(counts.items())]


def _expected(setting: Setting, rows_of_rank: list[tuple[int, int]], ms: float) -> dict[str, float]:
    """What a step should take, beside what it took."""
    if setting.card is None:
        return {}
    works = estimate.step_work(
        setting.model.groups,
        num_layers=setting.num_layers,
        rows=setting.rows,
        context=setting.context,
        heads=setting.heads,
        vocab=setting.model.vocab,
        rows_of_rank=rows_of_rank,
        card=setting.card,
    )
    return estimate.facts(works, setting.card, ms)


def one_step(setting: Setting) -> None:
    """A single layer's step with adapters, untimed: for ``compute-sanitizer``."""
    step = DecodeStep(setting.model, 1, setting.rows, 300, setting.dtype, setting.device)
    scenario = scenarios(setting)[min(1, len(setting.adapters) - 1)]
    adapters = step.adapters(scenario)
    plan = step.plan([adapters[slot - 1] if slot else None for slot in scenario.slot_of_row])
    assert torch.isfinite(_logits(step, plan)).all()


def time_step(setting: Setting) -> None:
    """The server's decode step: base alone, then every scenario against it; drawing tokens too."""
    step = DecodeStep(
        setting.model,
        setting.num_layers,
        setting.rows,
        setting.context,
        setting.dtype,
        setting.device,
    )
    shape = f"{setting.rows} rows, {setting.num_layers} layers"
    plain = step.plan([None] * setting.rows)
    assert torch.isfinite(_logits(step, plain)).all()
    base = setting.stopwatch.time(lambda: step.run(plain), cold=False)
    setting.report.add(
        "step base", shape, base,
        gb_s=step.base_bytes / base.p50 / 1e6, **_expected(setting, [], base.p50),
    )  # fmt: skip
    drawn = setting.stopwatch.time(lambda: step.draw(plain), cold=False)
    setting.report.add("step base, tokens drawn", shape, drawn, over_base=drawn.p50 / base.p50)
    for scenario in scenarios(setting):
        step.forget()
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            adapters = step.adapters(scenario)
            chosen = [adapters[slot - 1] if slot else None for slot in scenario.slot_of_row]
            adapted = step.plan(chosen)
            # The first run compiles, the second captures, the third replays.
            runs = [_logits(step, adapted) for _ in range(3)]
            timing = setting.stopwatch.time(lambda s=adapted: step.run(s), cold=False)
        except torch.cuda.OutOfMemoryError:
            print(f"step {scenario.name}: skipped, its adapters do not fit beside the base")
            continue
        assert torch.isfinite(runs[0]).all(), scenario.name
        assert torch.equal(runs[0], runs[1]), f"{scenario.name}: captured bits differ"
        assert torch.equal(runs[0], runs[2]), f"{scenario.name}: replayed bits differ"
        used = {a.key: a.operators.num_bytes for a in chosen if a is not None}
        setting.report.add(
            f"step {scenario.name}", shape, timing,
            over_base=timing.p50 / base.p50,
            bytes_over_base=(step.base_bytes + sum(used.values())) / step.base_bytes,
            **(_expected(setting, _rows_of_rank(scenario), timing.p50)
               if scenario.method in ("lora", "dora") else {}),
        )  # fmt: skip


def _logits(step: DecodeStep, plan: Step) -> torch.Tensor:
    logits = step.run(plan).logits
    assert logits is not None
    # A replay overwrites what it returned.
    return logits.clone()
