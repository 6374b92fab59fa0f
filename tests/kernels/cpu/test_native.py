"""The compiled CPU kernels, compared with float64 and with each row alone.

Faults that were planted in the C code, and the number of tests that failed for each:

- adapters: a low-rank component without its weight: 22
- adapters: one row's activations for all rows: 31
- adapters: a unit on the border of two threads' shares computed by neither: 31
- adapters: the bias added before the gain: 6
- adapters: an input gain without - 1: 1
- adapters: an input gain without ``start``: 1
- adapters: the ranks beyond a multiple of four skipped: 13
- adapters: the columns beyond the whole blocks skipped: 13
- attention: a window one too long: 10
- attention: padding read as keys: 20
- attention: one query head for a whole group: 12
- attention: the newest key unseen: 20
- attention: no scale: 20
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_traffic import error_ratio

from turret.kernels import cpu as native
from turret.kernels.cpu import row_adapters
from turret.kernels.cpu.layers import NativeAttentionPlan, add_rms_norm, paged_attention
from turret.kernels.cpu.row_adapters import (
    CStruct,
    ModuleSizes,
    ModuleTable,
    ProjectionShape,
    RowAdapters,
    RowSegment,
)
from turret.kernels.paged_attention import SequenceSpan

pytestmark = pytest.mark.skipif(native.library() is None, reason="there is no C compiler")

BF16 = torch.bfloat16
MAX_ERROR = 4e-3  # one rounding to bf16 makes up to 2.3e-3 of the RMS
RANKS = (1, 3, 4, 8, 16, 64)
NUM_ROWS = 60


@pytest.fixture(params=[1, 3])
def threads(request: Any) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def _entries(part: dict[str, torch.Tensor]) -> list[CStruct]:
    """A module's operators, from their tensors by name."""
    vectors = (name for name in part if name not in "ab")
    low_rank = [row_adapters.low_rank(part["a"], part["b"])] if "a" in part else []
    return [*low_rank, *(CStruct(name, (part[name],)) for name in vectors)]


class Adapters:
    """Random adapters on one fused projection of two layers, with every kind of missing part."""

    def __init__(self, inner: int, outs: tuple[int, ...]) -> None:
        self.inner, self.outs = inner, outs
        self.shape = ProjectionShape(inner, outs, len(outs))  # the second layer
        self.parts: list[list[dict[str, Any]]] = []
        self.tables: list[ModuleTable] = []
        for number, rank in enumerate(RANKS):
            table = ModuleTable(2 * len(outs))
            slices: list[dict[str, Any]] = []
            for s, out in enumerate(outs):
                part: dict[str, Any] = {}
                if (number + s) % 4 != 3:
                    part["a"] = torch.randn(max(1, rank - s), inner).to(BF16)
                    part["b"] = torch.randn(max(1, rank - s), out).to(BF16)
                if number % 2:
                    part["gain"] = 1 + 0.3 * torch.randn(out)
                if (number + s) % 3 == 0:
                    part["bias"] = torch.randn(out)
                if number == 4:
                    part["input_gain"] = 1 + torch.randn(inner)
                table.put(len(outs) + s, *_entries(part))
                slices.append(part)
            table.close()
            self.parts.append(slices)
            self.tables.append(table)

    def exact(
        self, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None, mix: Any
    ) -> torch.Tensor:
        """One row in float64."""
        found, start = [], 0
        for s, out in enumerate(self.outs):
            value = y[start : start + out].double()
            gain = torch.ones(out, dtype=torch.float64)
            for number, weight in mix:
                part = self.parts[number][s]
                if "gain" in part:
                    gain += weight * (part["gain"].double() - 1)
            value = value * gain
            if bias is not None:
                value = value + bias[start : start + out].double()
            for number, weight in mix:
                part = self.parts[number][s]
                if "bias" in part:
                    value = value + weight * part["bias"].double()
                if "a" in part:
                    value = value + weight * (
                        (part["a"].double() @ x.double()) @ part["b"].double()
                    )
            found.append(value)
            start += out
        return torch.cat(found)

    def step(self, segments: Any) -> RowAdapters:
        return RowAdapters(
            [
                RowSegment(start, end, [(self.tables[number], weight) for number, weight in mix])
                for start, end, mix in segments
            ],
            max_slices=3,
            sizes=ModuleSizes([(self.inner, out) for out in self.outs], 2),
        )


def draw_segments(seed: int) -> list[tuple[int, int, list[tuple[int, float]]]]:
    """Runs of 1 to 40 rows with gaps of base rows.

    Mixes of 1 to 3 adapters, some with negative weights.
    """
    draw, segments, row = random.Random(seed), [], 0
    for length in (1, 1, 2, 40, 1, 5):
        row += draw.choice((0, 0, 1))
        numbers = draw.sample(range(len(RANKS)), draw.choice((1, 1, 2, 3)))
        mix = [(number, draw.choice((1.0, 1.0, -0.5, 2.25))) for number in numbers]
        segments.append((row, row + length, mix))
        row += length
    return segments


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("inner", "outs"), [(96, (130, 32, 32)), (75, (257,)), (64, (48, 48))])
def test_adapted_rows_equal_float64_and_the_rows_alone(
    inner: int, outs: tuple[int, ...], has_bias: bool, threads: None
) -> None:
    adapters = Adapters(inner, outs)
    x = torch.randn(NUM_ROWS, inner).to(BF16)
    y = torch.randn(NUM_ROWS, sum(outs)).to(BF16)
    bias = torch.randn(sum(outs)).to(BF16) if has_bias else None
    for seed in range(4):
        segments = draw_segments(seed)
        got = y.clone()
        adapters.step(segments).adapt(adapters.shape, x, got, bias)
        touched = set()
        for start, end, mix in segments:
            for row in range(start, end):
                touched.add(row)
                exact = adapters.exact(x[row], y[row], bias, mix)
                assert error_ratio(got[row], exact) < MAX_ERROR, (seed, row, mix)
                alone = y[row : row + 1].clone()
                adapters.step([(0, 1, mix)]).adapt(adapters.shape, x[row : row + 1], alone, bias)
                assert torch.equal(alone[0], got[row]), (seed, row, mix)
        others = [row for row in range(NUM_ROWS) if row not in touched]
        assert torch.equal(got[others], y[others])


def test_strided_rows_and_input_gains() -> None:
    adapters = Adapters(96, (64, 32))
    wide_x, wide_y = torch.randn(8, 128).to(BF16), torch.randn(8, 128).to(BF16)
    x, y = wide_x[:, 16:112], wide_y[:, 8:104]
    kept = wide_y.clone()
    adapters.step([(2, 6, [(3, 1.0)])]).adapt(adapters.shape, x, y, None)
    for row in range(2, 6):
        exact = adapters.exact(x[row], kept[row, 8:104], None, [(3, 1.0)])
        assert error_ratio(y[row], exact) < MAX_ERROR
    changed = (wide_y != kept).nonzero()
    assert int(changed[:, 0].min()) == 2
    assert int(changed[:, 0].max()) == 5
    assert int(changed[:, 1].min()) >= 8
    assert int(changed[:, 1].max()) < 104

    step = adapters.step([(1, 3, [(4, 0.5), (0, 1.0)]), (5, 6, [(0, 1.0)])])
    rows, members = torch.tensor([1, 2, 5]), torch.tensor([[0, 2], [0, 2], [2, 3]])
    change = step.input_change(3, x, rows, members, start=0.0)
    gain = adapters.parts[4][1]["input_gain"].double() - 1
    assert error_ratio(change[:2], x[1:3].double() * 0.5 * gain) < MAX_ERROR
    assert not change[2].any()
    scaled = step.input_change(3, x, rows, members, start=1.0)
    assert error_ratio(scaled[:2], x[1:3].double() * (1 + 0.5 * gain)) < MAX_ERROR
    assert torch.equal(scaled[2], x[5])


HEADS = [(9, 3, 64), (4, 4, 32), (8, 1, 96), (2, 2, 128), (14, 2, 256)]


@pytest.mark.parametrize(
    ("window", "softcap", "has_sinks"),
    [(None, None, False), (21, None, True), (None, 0.7, False), (None, None, True)],
)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
def test_attention_equals_float64_and_the_rows_alone(
    heads: int,
    kv_heads: int,
    dim: int,
    window: int | None,
    softcap: float | None,
    has_sinks: bool,
    threads: None,
) -> None:
    size, scale = 16, dim**-0.5
    lengths = [(1, 0, 0), (1, 95, 0), (40, 0, 0), (7, 33, 5), (1, 16, 16)]
    blocks = iter(random.Random(0).sample(range(1, 40), 39))
    keys, values = (torch.full((40, size, kv_heads, dim), torch.nan).to(BF16) for _ in range(2))
    spans, row = [], 0
    for num_new, num_context, num_padding in lengths:
        total = num_new + num_context
        own = list(itertools.islice(blocks, -(-total // size)))
        for cache in (keys, values):
            flat = torch.randn(len(own) * size, kv_heads, dim).to(BF16)
            flat[:num_padding] = torch.nan  # must not be read
            flat[total:] = torch.nan
            cache[own] = flat.view(len(own), size, kv_heads, dim)
        spans.append(SequenceSpan(row, num_new, num_context, own, num_padding))
        row += num_new
    q = torch.randn(row, heads, dim)
    # Sinks range from negligible to dominant.
    sinks = torch.linspace(-20, 6, heads) if has_sinks else None

    def attend(queries: torch.Tensor, spans: list[SequenceSpan]) -> torch.Tensor:
        plan = NativeAttentionPlan(spans, num_heads=heads, head_dim=dim, window=window)
        options = {"scale": scale, "softcap": softcap, "sinks": sinks}
        return paged_attention(queries, keys, values, plan, **options)

    got = attend(q, spans)
    for span in spans:
        own = list(span.blocks)
        k, v = (c[own].flatten(0, 1).double() for c in (keys, values))
        for i in range(span.num_new):
            end = span.num_context + i + 1
            low = max(span.num_padding, 0 if window is None else end - window)
            query = q[span.row_start + i].double().view(kv_heads, heads // kv_heads, dim)
            scores = torch.einsum("kgd,tkd->kgt", query, k[low:end]) * scale
            if softcap is not None:
                scores = softcap * (scores / softcap).tanh()
            if sinks is not None:
                scores = torch.cat((scores, sinks.double().view(*scores.shape[:2], 1)), -1)
            shares = scores.softmax(-1)[..., : end - low]
            exact = torch.einsum("kgt,tkd->kgd", shares, v[low:end]).reshape(heads, dim)
            row = span.row_start + i
            assert error_ratio(got[row], exact) < MAX_ERROR, (span, i)
            single = SequenceSpan(0, 1, end - 1, own, span.num_padding)
            assert torch.equal(attend(q[row : row + 1], [single])[0], got[row]), (span, i)


def test_every_kind_of_number_is_rounded_as_in_torch() -> None:
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(BF16).view(256, 256)
    for delta in (numbers.T.contiguous(), numbers.flip(0, 1), numbers):
        hidden = numbers.clone()
        add_rms_norm(hidden, delta, torch.ones(256), 1e-5)
        exact = (numbers.float() + delta.float()).to(BF16)
        is_nan = exact.isnan()
        assert torch.equal(hidden.isnan(), is_nan)
        assert (hidden.view(torch.int16)[is_nan] == 0x7FC0).all()
        bits = (each.view(torch.int16)[~is_nan] for each in (hidden, exact))
        assert torch.equal(*bits)


def test_the_variable_switches_the_library_off(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        for said, is_on in (("0", False), ("off", False), ("False", False), ("on", True)):
            monkeypatch.setenv("TURRET_NATIVE", said)
            native.library.cache_clear()
            assert native.has_native(BF16, torch.device("cpu")) is is_on
        monkeypatch.setenv("TURRET_NATIVE", "nope")
        native.library.cache_clear()
        with pytest.raises(ValueError, match=r"TURRET_NATIVE is 'nope', not one of 0, false, no"):
            native.library()
    finally:
        monkeypatch.undo()
        native.library.cache_clear()
    assert native.has_native(BF16, torch.device("cpu"))
    assert not native.has_native(torch.float32, torch.device("cpu"))
