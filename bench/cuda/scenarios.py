"""Many adapters in one batch: one fused projection and its baselines, and whole decode steps."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch
from cuda import estimate
from cuda.adapters import MIXED_RANKS, exact_update, make_pack, make_table
from cuda.baselines import Padded, PaddedTwoLaunch, gathered_bmm, torch_loop
from cuda.setting import Setting
from cuda.step import DecodeStep, Scenario, kronecker_size
from cuda.timing import Timing
from cuda.tune import use

from turret.kernels.gpu.common import tuning
from turret.kernels.gpu.low_rank import segmented_expand, segmented_shrink
from turret.server.engine.scheduling.sequence import Step


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
    """Shrink and expand over qkv: turret's kernels and three baselines."""
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

        table = make_table(pack.bounds, slots, device)
        forms = {
            "ours": lambda y, t=table: ours(y, t),
            "padded, atomics": lambda y, launch=launch: launch(x, y),
            "torch loop": lambda y, p=pack, r=rows_of_slot: torch_loop(p, r, x, y),
            "gathered bmm": lambda y, p=padded, s=slot_tensor: gathered_bmm(p, s, x, y),
        }
        expected = _expected_of(inner, outs, scenario)
        first = 0.0
        for name, form in forms.items():
            y = torch.zeros_like(exact, dtype=setting.dtype)
            form(y)
            difference = (y.double() - exact).norm() / exact.norm()
            if name == "ours":
                setting.check(y, exact)
            timing = setting.stopwatch.time(setting.stopwatch.capture(lambda f=form, y=y: f(y)))
            first = first or timing.p50
            setting.report.add(
                f"qkv {name}", scenario.name.removeprefix("lora "), timing, expected[name],
                over_ours=timing.p50 / first, gb_s=num_bytes / timing.p50 / 1e6,
                error=float(difference),
            )  # fmt: skip


def time_low_rank(setting: Setting) -> None:
    """Shrink and expand over qkv, with tiles and parts other than those of ``Tuning``."""
    inner, outs = setting.model.groups["qkv"]
    x, tuned = setting.random(setting.rows, inner), tuning(setting.device)
    y = setting.random(setting.rows, sum(outs))
    columns = sorted({tuned.expand_block_n // 2, tuned.expand_block_n})
    parts = sorted({tuned.shrink_split_k // 2, tuned.shrink_split_k})
    for count in sorted({min(8, setting.rows), setting.rows}):
        name = f"{count} distinct"
        slots = tuple(1 + row % count for row in range(setting.rows))
        pack = make_pack(inner, outs, (setting.rank,) * count, setting.dtype, setting.device)
        table = make_table(pack.bounds, slots, setting.device)
        used = _rows_of_rank(Scenario(name, slots, (setting.rank,) * count))

        def run(pack=pack, table=table) -> None:
            v = segmented_shrink(x, pack.a, pack.slice_ranks, table)
            segmented_expand(y, v, pack.b, pack.slice_ranks, table)

        for block_n, split_k in itertools.product(columns, parts):
            use(setting, replace(tuned, expand_block_n=block_n, shrink_split_k=split_k))
            try:
                timing = setting.stopwatch.time(setting.stopwatch.capture(run))
            finally:
                use(setting, tuned)
            setting.report.add(
                f"qkv {block_n} columns, parts of {split_k}", name, timing,
                lambda card, used=used: estimate.low_rank_work(inner, outs, used, card),
            )  # fmt: skip


def _rows_of_rank(scenario: Scenario) -> list[tuple[int, int]]:
    """The rank and the number of rows of every adapter in use."""
    counts = Counter(slot for slot in scenario.slot_of_row if slot)
    return [(scenario.ranks[slot - 1], count) for slot, count in sorted(counts.items())]


def _expected_of(
    inner: int, outs: tuple[int, ...], scenario: Scenario
) -> dict[str, estimate.Expected]:
    """The expected time of each form: turret's by bytes and instructions, others by bytes alone."""
    used = _rows_of_rank(scenario)
    rows, slices = sum(count for _, count in used), len(outs)
    # Bytes of one rank of an adapter.
    size = 2 * (slices * inner + sum(outs))
    padded = size * max(rank for rank, _ in used)
    return {
        "ours": lambda card: estimate.low_rank_work(inner, outs, used, card),
        # Zero a buffer, then a shrink, then an expand for each slice.
        "padded, atomics": estimate.bytes_work(len(used) * padded, 2 + slices),
        # Gather the rows once; then two products and an addition for each slice.
        "torch loop": estimate.bytes_work(
            sum(rank for rank, _ in used) * size, len(used) * (1 + 3 * slices)
        ),
        # Every matrix is read, written and read again.
        "gathered bmm": estimate.bytes_work(3 * rows * padded, 5 * slices),
    }


def expected_step(setting: Setting, rows: int, scenario: Scenario | None) -> estimate.Expected:
    """The expected time of a decode step; without a scenario, that of the base model alone."""

    def works(card: estimate.Card) -> list[estimate.Work]:
        is_low_rank = scenario is not None and scenario.method in ("lora", "dora")
        return estimate.step_work(
            setting.model.groups,
            num_layers=setting.num_layers,
            rows=rows,
            context=setting.context,
            heads=setting.heads,
            vocab=setting.model.vocab,
            rows_of_rank=_rows_of_rank(scenario) if scenario and is_low_rank else [],
            card=card,
            others=_others(scenario) if scenario and not is_low_rank else None,
        )

    return works


def _others(scenario: Scenario) -> Callable[[int, tuple[int, ...]], list[estimate.Work]]:
    """The work that LoHa or LoKr adapters add to a projection."""
    used = _rows_of_rank(scenario)
    (rank, _), rows = used[0], sum(count for _, count in used)
    if scenario.method == "loha":
        return lambda inner, outs: estimate.hadamard_work(inner, outs, len(used), rank, rows)

    def kronecker(inner: int, outs: tuple[int, ...]) -> list[estimate.Work]:
        factors = [(kronecker_size(out, inner), out) for out in outs]
        sizes = [(f * f, out // f * inner // f) for f, out in factors]
        return estimate.kronecker_work(sizes, len(used))

    return kronecker


def one_step(setting: Setting) -> None:
    """A step of a single layer with adapters, which is not measured, for ``compute-sanitizer``."""
    step = DecodeStep(setting.model, 1, setting.rows, 300, setting.dtype, setting.device)
    scenario = scenarios(setting)[min(1, len(setting.adapters) - 1)]
    adapters = step.adapters(scenario)
    step.forget(adapters)
    plan = step.plan([adapters[slot - 1] if slot else None for slot in scenario.slot_of_row])
    assert torch.isfinite(_logits(step, plan)).all()


def time_step(setting: Setting) -> None:
    """The server's decode step: the base alone, then every scenario, and sampling."""
    step = DecodeStep(
        setting.model,
        setting.num_layers,
        setting.rows,
        setting.context,
        setting.dtype,
        setting.device,
    )
    shape = f"{setting.rows} rows, {setting.num_layers} layers"
    _time_few_rows(setting, step)
    plain, expected = step.plan([None] * setting.rows), expected_step(setting, setting.rows, None)
    assert torch.isfinite(_logits(step, plain)).all()
    base = setting.stopwatch.time(lambda: step.run(plain), cold=False)
    setting.report.add("step base", shape, base, expected, gb_s=step.base_bytes / base.p50 / 1e6)
    drawn = setting.stopwatch.time(lambda: step.draw(plain), cold=False)
    setting.report.add(
        "step base, tokens drawn", shape, drawn, expected, over_base=drawn.p50 / base.p50
    )
    for scenario in scenarios(setting):
        try:
            _time_scenario(setting, step, scenario, base)
        except torch.cuda.OutOfMemoryError:
            print(f"step {scenario.name}: skipped, its adapters do not fit beside the base")


def _time_few_rows(setting: Setting, step: DecodeStep) -> None:
    """Fewer sequences: the base alone, and a different adapter per sequence."""
    for rows in sorted({1, 8} & set(range(setting.rows))):
        own = Scenario(f"lora {rows} distinct", tuple(range(1, rows + 1)), (setting.rank,) * rows)
        shape = f"{rows} rows, {setting.num_layers} layers"
        adapters = step.adapters(own)
        step.forget(adapters)
        plain, adapted = step.plan([None] * rows), step.plan([*adapters])
        times = []
        for plan in (plain, adapted):
            runs = [_logits(step, plan) for _ in range(3)]
            assert torch.isfinite(runs[0]).all()
            assert torch.equal(runs[0], runs[2]), "replayed bits differ"
            times.append(setting.stopwatch.time(lambda p=plan: step.run(p), cold=False))
        setting.report.add("step base", shape, times[0], expected_step(setting, rows, None))
        setting.report.add(
            f"step {own.name}", shape, times[1], expected_step(setting, rows, own),
            over_base=times[1].p50 / times[0].p50,
        )  # fmt: skip


def _time_scenario(setting: Setting, step: DecodeStep, scenario: Scenario, base: Timing) -> None:
    adapters = step.adapters(scenario)
    step.forget(adapters)
    chosen = [adapters[slot - 1] if slot else None for slot in scenario.slot_of_row]
    adapted = step.plan(chosen)
    # The first run compiles, the second captures, the third replays.
    runs = [_logits(step, adapted) for _ in range(3)]
    timing = setting.stopwatch.time(lambda: step.run(adapted), cold=False)
    assert torch.isfinite(runs[0]).all(), scenario.name
    assert torch.equal(runs[0], runs[1]), f"{scenario.name}: captured bits differ"
    assert torch.equal(runs[0], runs[2]), f"{scenario.name}: replayed bits differ"
    used = {a.key: a.operators.num_bytes for a in chosen if a is not None}
    setting.report.add(
        f"step {scenario.name}", f"{setting.rows} rows, {setting.num_layers} layers", timing,
        expected_step(setting, setting.rows, scenario),
        over_base=timing.p50 / base.p50,
        bytes_over_base=(step.base_bytes + sum(used.values())) / step.base_bytes,
    )  # fmt: skip


def _logits(step: DecodeStep, plan: Step) -> torch.Tensor:
    logits = step.run(plan).logits
    assert logits is not None
    # Copy the result, because a replay overwrites it.
    return logits.clone()
