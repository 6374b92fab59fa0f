"""Single kernels at a model's shapes: a check against float64, then the measured rates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from cuda import estimate
from cuda.setting import Setting
from cuda.step import KV_BLOCK, DecodeStep, random_nf4
from cuda.tune import use

from turret.kernels.gpu.activations import silu_mul
from turret.kernels.gpu.common import tuning
from turret.kernels.gpu.hadamard import hadamard_expand, hadamard_shrink
from turret.kernels.gpu.kronecker import kronecker
from turret.kernels.gpu.nf4 import nf4_dequantize, nf4_matmul
from turret.kernels.gpu.paged_attention import paged_attention
from turret.kernels.gpu.rms_norm import residual_rms_norm
from turret.kernels.gpu.tables import SPLIT, RowTable
from turret.kernels.nf4_matmul import Nf4Matrix
from turret.server.models.weights.nf4_gpu import PROMPT_ROWS, keep_sums_whole


def _rate(num_bytes: int, milliseconds: float) -> float:
    return num_bytes / milliseconds / 1e6


def copy_bandwidth(setting: Setting) -> None:
    """The memory bandwidth, measured by a large read, which bounds all kernels."""
    words = 1 << (28 if setting.device.type == "cuda" else 10)
    source = torch.ones(words, dtype=torch.float32, device=setting.device)
    timing = setting.stopwatch.time(source.sum)
    setting.report.add(
        "memory read", f"{words * 4 >> 20} MiB", timing, estimate.bytes_work(4 * words),
        gb_s=_rate(4 * words, timing.p50),
    )  # fmt: skip


def library(setting: Setting) -> None:
    """Check that a row of a library product has the same bits at every place in a piece."""
    whole = keep_sums_whole(setting.device)
    # Try the number of rows that prompts are cut into, and twice that, which reads weights half as
    # often.
    pieces = [
        (rows, inner, sum(outs))
        for rows in (PROMPT_ROWS, 2 * PROMPT_ROWS)
        for inner, outs in setting.model.groups.values()
    ]
    for rows, inner, out in [*pieces, (64, setting.model.hidden, setting.model.vocab)]:
        x, weight = setting.random(rows, inner), setting.random(out, inner)
        y, order = F.linear(x, weight), torch.randperm(rows, device=setting.device)
        same = torch.equal(F.linear(x[order], weight), y[order])
        timing = setting.stopwatch.time(lambda x=x, w=weight: F.linear(x, w))
        setting.report.add(
            "library product", f"{rows} x {inner} x {out}", timing,
            lambda _, of=(rows, inner, out): [estimate.product_work(*of)],
            rows_keep_their_bits=same, sums_are_whole=whole,
            tflops=2 * rows * inner * out / timing.p50 / 1e9,
        )  # fmt: skip
        assert same or setting.device.type != "cuda", "bits depend on a row's place"


def nf4(setting: Setting) -> None:
    """The base product: turret's kernel, a dense product, a written-out weight, bitsandbytes."""
    for name, (inner, outs) in setting.model.groups.items():
        weight = random_nf4(sum(outs), inner, setting.device)
        dense = weight.dequantize(setting.dtype)
        assert isinstance(weight.absmax, torch.Tensor)
        size = weight.packed.nbytes + weight.absmax.nbytes
        for rows in setting.row_counts:
            x = setting.random(rows, inner)
            error = setting.check(nf4_matmul(x, weight), x.double() @ dense.double().T)
            shape = f"{name} {rows} rows"
            timing = setting.stopwatch.time(lambda x=x, w=weight: nf4_matmul(x, w))
            library = setting.stopwatch.time(lambda x=x, w=dense: F.linear(x, w))
            written = setting.stopwatch.time(
                lambda x=x, w=weight: F.linear(x, nf4_dequantize(w, x.dtype))
            )
            of = sum(outs), inner, rows
            setting.report.add(
                "nf4_matmul", shape, timing, lambda card, of=of: estimate.nf4_work(*of, card),
                gb_s=_rate(size, timing.p50), error=error, dense_over_ours=library.p50 / timing.p50,
            )  # fmt: skip
            setting.report.add(
                "nf4 written out, library", shape, written,
                lambda _, of=of: estimate.written_out_work(*of),
                over_ours=written.p50 / timing.p50,
            )  # fmt: skip
            _bitsandbytes(setting, shape, (weight, weight.absmax), x, timing.p50)


def _bitsandbytes(
    setting: Setting,
    shape: str,
    given: tuple[Nf4Matrix, torch.Tensor],
    x: torch.Tensor,
    ours_ms: float,
) -> None:
    """The product of a weight and its maxima by bitsandbytes."""
    weight, absmax = given
    try:
        import bitsandbytes.functional as bnb_functional
        from bitsandbytes.autograd._functions import matmul_4bit
    except ImportError:
        if shape.startswith("qkv 1 "):
            print("bitsandbytes is not installed: its product is not timed")
        return
    if setting.device.type != "cuda":
        return
    state = bnb_functional.QuantState(
        absmax=absmax,
        shape=torch.Size((weight.out_features, weight.in_features)),
        dtype=setting.dtype,
        blocksize=64,
        code=bnb_functional.get_4bit_type("nf4", device=str(setting.device)),
        quant_type="nf4",
    )
    packed = weight.packed.view(-1, 1)
    timing = setting.stopwatch.time(lambda: matmul_4bit(x, packed.t(), quant_state=state))
    setting.report.add(
        "bitsandbytes 4-bit", shape, timing,
        estimate.bytes_work(weight.packed.nbytes + absmax.nbytes),
        over_ours=timing.p50 / ours_ms,
    )  # fmt: skip


def attention(setting: Setting) -> None:
    """Decode attention over every row's context, for few and many rows, also in other forms."""
    found = tuning(setting.device).attention_stages
    # Pipeline depth and positions of a split: the defaults, then with one of them changed.
    forms = list(dict.fromkeys([(found, SPLIT), (3, SPLIT), (found, 128), (found, 512)]))
    for context in setting.contexts:
        for rows in sorted({1, 8, setting.rows} & set(range(setting.rows + 1))):
            try:
                _attention(setting, rows, context, forms)
            except torch.cuda.OutOfMemoryError:
                print(f"attention {rows} x {context}: skipped, it does not fit")


def _attention(setting: Setting, rows: int, context: int, forms: Sequence[tuple[int, int]]) -> None:
    model = setting.model
    step = DecodeStep(model, 1, rows, context, setting.dtype, setting.device)
    q = setting.random(rows, model.heads, model.head_dim)
    k, v = step.cache.keys[0], step.cache.values[0]
    scale = model.head_dim**-0.5
    blocks = -(-(context + 1) // KV_BLOCK)
    seen = slice(1, 1 + blocks)
    keys, values = (c[seen].flatten(0, 1)[: context + 1].double() for c in (k, v))
    per_head = model.heads // model.kv_heads
    keys, values = (t.transpose(0, 1).repeat_interleave(per_head, 0) for t in (keys, values))
    scores = (keys @ q[0].double().unsqueeze(2)).squeeze(2) * scale
    exact = (scores.softmax(1).unsqueeze(1) @ values).squeeze(1)
    num_bytes = 2 * rows * context * model.kv_heads * model.head_dim * q.itemsize
    tuned = tuning(setting.device)
    for stages, split in forms:
        table = step.attention_table(split)
        use(setting, replace(tuned, attention_stages=stages))
        try:
            out = paged_attention(q, k, v, table, scale=scale)
            error = setting.check(out[0], exact)
            timing = setting.stopwatch.time(
                lambda t=table: paged_attention(q, k, v, t, scale=scale)
            )
        finally:
            use(setting, tuned)
        setting.report.add(
            "paged_attention", f"{rows} x {context}, {stages} stages, {split}", timing,
            lambda card: [estimate.attention_work(rows, context, setting.heads, card)],
            gb_s=_rate(num_bytes, timing.p50), error=error,
        )  # fmt: skip


def _by_slot(
    setting: Setting, name: str, shape: str, run: Callable[[torch.Tensor], object],
    exact: torch.Tensor, expected: estimate.Expected, num_bytes: int,
) -> None:  # fmt: skip
    """Check row 0 of an update in place and time it."""
    y = torch.zeros(setting.rows, exact.shape[0], dtype=setting.dtype, device=setting.device)
    run(y)
    error = setting.check(y[0], exact)
    timing = setting.stopwatch.time(lambda: run(y))
    setting.report.add(
        name, shape, timing, expected, gb_s=_rate(num_bytes, timing.p50), error=error
    )


def _row_table(setting: Setting, slots: int) -> RowTable:
    table = RowTable(setting.rows, setting.device)
    rows = list(range(setting.rows))
    table.load(rows, [row % slots for row in rows], [1.0] * len(rows))
    return table


def _addresses(found: list[list[torch.Tensor]], device: torch.device) -> torch.Tensor:
    """The addresses of each slot's factors, ``[slots, factors]``."""
    return torch.tensor([[tensor.data_ptr() for tensor in own] for own in found], device=device)


def hadamard(setting: Setting) -> None:
    """LoHa on the q projection, with one of 8 adapters per row."""
    inner, (out, *_) = setting.model.groups["qkv"]
    slots, rank = 8, setting.rank
    found = [
        [
            part
            for _ in range(2)
            for part in (setting.random(out, rank), setting.random(rank, inner) * inner**-0.5)
        ]
        for _ in range(slots)
    ]
    factors = _addresses(found, setting.device)
    x = setting.random(setting.rows, inner)
    table = _row_table(setting, slots)

    def run(y: torch.Tensor) -> None:
        hadamard_expand(y[:, :out], hadamard_shrink(x, factors, rank, table), factors, table)

    w1a, w1b, w2a, w2b = (part.double() for part in found[0])
    exact = ((w1a @ w1b) * (w2a @ w2b)) @ x[0].double()
    size = sum(t.nbytes for own in found for t in own)
    _by_slot(
        setting, "hadamard", f"q 8 adapters r={rank}", run, exact,
        lambda _: estimate.hadamard_work(inner, (out,), slots, rank, setting.rows), size,
    )  # fmt: skip


def kron(setting: Setting) -> None:
    """LoKr on the o projection, with one of 8 adapters per row."""
    inner, (out,) = setting.model.groups["o"]
    slots = 8
    factor = 64 if inner % 64 == 0 and inner >= 4096 else 8
    shapes = [(factor, factor), (out // factor, inner // factor)]
    found = [[setting.random(*shape) * shape[1] ** -0.5 for shape in shapes] for _ in range(slots)]
    factors = _addresses(found, setting.device)
    x = setting.random(setting.rows, inner)
    table = _row_table(setting, slots)
    exact = torch.kron(*(part.double() for part in found[0])) @ x[0].double()
    sizes = [(found[0][0].numel(), found[0][1].numel())]
    _by_slot(
        setting, "kronecker", f"o 8 adapters {factor}x{factor}",
        lambda y: kronecker(x, y, factors, shapes, table), exact,
        lambda _: estimate.kronecker_work(sizes, slots), sum(t.nbytes for t in found[0]) * slots,
    )  # fmt: skip


def between(setting: Setting) -> None:
    """The small fused kernels."""
    model = setting.model
    residual, update = (setting.random(setting.rows, model.hidden) for _ in range(2))
    weight = setting.random(model.hidden)
    total = residual + update
    exact = F.rms_norm(total.double(), (model.hidden,), weight.double(), 1e-5)
    error = setting.check(residual_rms_norm(residual, update, weight, 1e-5), exact)
    timing = setting.stopwatch.time(lambda: residual_rms_norm(residual, update, weight, 1e-5))
    setting.report.add(
        "residual_rms_norm", f"{setting.rows} rows", timing,
        estimate.bytes_work(4 * residual.nbytes), error=error,
    )  # fmt: skip
    gate_up = setting.random(setting.rows, 2 * model.inner)
    gate, up = gate_up.double().chunk(2, dim=1)
    error = setting.check(silu_mul(gate_up), gate * gate.sigmoid() * up)
    timing = setting.stopwatch.time(lambda: silu_mul(gate_up))
    setting.report.add(
        "silu_mul", f"{setting.rows} rows", timing,
        estimate.bytes_work(gate_up.nbytes * 3 // 2), error=error,
    )  # fmt: skip


KERNELS: dict[str, Callable[[Setting], None]] = {
    "memory": copy_bandwidth,
    "library": library,
    "nf4": nf4,
    "attention": attention,
    "hadamard": hadamard,
    "kronecker": kron,
    "between": between,
}
