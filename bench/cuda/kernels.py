"""Single kernels at a model's shapes: a check against float64, the time, and its lower bound."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from cuda.adapters import exact_update, make_pack, make_table
from cuda.setting import Setting, captured, milliseconds
from cuda.step import KV_BLOCK, DecodeStep, random_nf4

from turret.kernels.gpu.activations import silu_mul
from turret.kernels.gpu.hadamard import hadamard_expand, hadamard_shrink
from turret.kernels.gpu.kronecker import kronecker
from turret.kernels.gpu.low_rank import segmented_expand, segmented_shrink
from turret.kernels.gpu.nf4 import nf4_dequantize, nf4_matmul
from turret.kernels.gpu.paged_attention import paged_attention
from turret.kernels.gpu.rms_norm import residual_rms_norm
from turret.kernels.gpu.sample_rows import sample_rows
from turret.kernels.gpu.tables import RowTable, SamplingTable
from turret.server.models.weights.nf4_gpu import PROMPT_ROWS, keep_sums_whole

# Number of adapters for the kernels that read one adapter per row.
_SLOTS = 8
# Temperature, top-p and top-k of requests.
_SAMPLING = {
    "greedy": (0.0, 1.0, 0),
    "temperature": (1.0, 1.0, 0),
    "top-k 50, top-p 0.9": (0.7, 0.9, 50),
}


def copy_bandwidth(setting: Setting) -> None:
    """The memory bandwidth, measured by a large read, which bounds all kernels."""
    words = 1 << (28 if setting.device.type == "cuda" else 10)
    source = torch.ones(words, dtype=torch.float32, device=setting.device)
    ms = milliseconds(source.sum)
    setting.report.add("memory read", f"{words * 4 >> 20} MiB", ms, source.nbytes)


def library(setting: Setting) -> None:
    """Check that a row of a library product has the same bits at every position in a piece."""
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
        ms = milliseconds(lambda x=x, w=weight: F.linear(x, w))
        setting.report.add(
            "library product", f"{rows} x {inner} x {out}", ms,
            x.nbytes + weight.nbytes + y.nbytes,
            rows_keep_their_bits=same, sums_are_whole=whole,
            tflops=2 * rows * inner * out / ms / 1e9,
        )  # fmt: skip
        assert same or setting.device.type != "cuda", "bits depend on a row's place"


def nf4(setting: Setting) -> None:
    """The base product: turret's kernel, a dense product, and the dequantisation of a weight."""
    for name, (inner, outs) in setting.model.groups.items():
        weight = random_nf4(sum(outs), inner, setting.device)
        dense = weight.dequantize(setting.dtype)
        assert isinstance(weight.absmax, torch.Tensor)
        size = weight.packed.nbytes + weight.absmax.nbytes
        for rows in setting.row_counts:
            x = setting.random(rows, inner)
            error = setting.check(nf4_matmul(x, weight), x.double() @ dense.double().T)
            ms = milliseconds(lambda x=x, w=weight: nf4_matmul(x, w))
            library = milliseconds(lambda x=x, w=dense: F.linear(x, w))
            written = milliseconds(lambda x=x, w=weight: F.linear(x, nf4_dequantize(w, x.dtype)))
            setting.report.add(
                "nf4_matmul", f"{name} {rows} rows", ms, size, error=error,
                dense_over_ours=library / ms, written_out_over_ours=written / ms,
            )  # fmt: skip


def attention(setting: Setting) -> None:
    """Decode attention over every row's context, for few and many rows."""
    for context in setting.contexts:
        for rows in sorted({1, 8, setting.rows} & set(range(setting.rows + 1))):
            try:
                _attention(setting, rows, context)
            except torch.cuda.OutOfMemoryError:
                setting.report.skip("paged_attention", f"{rows} x {context}")


def _attention(setting: Setting, rows: int, context: int) -> None:
    model = setting.model
    step = DecodeStep(model, 1, rows, context, setting.dtype, setting.device)
    q = setting.random(rows, model.heads, model.head_dim)
    k, v = step.cache.keys[0], step.cache.values[0]
    scale, table = model.head_dim**-0.5, step.attention_table()
    seen = slice(1, 1 - (-(context + 1) // KV_BLOCK))
    keys, values = (c[seen].flatten(0, 1)[: context + 1].double() for c in (k, v))
    per_head = model.heads // model.kv_heads
    keys, values = (t.transpose(0, 1).repeat_interleave(per_head, 0) for t in (keys, values))
    scores = (keys @ q[0].double().unsqueeze(2)).squeeze(2) * scale
    exact = (scores.softmax(1).unsqueeze(1) @ values).squeeze(1)
    error = setting.check(paged_attention(q, k, v, table, scale=scale)[0], exact)
    ms = milliseconds(lambda: paged_attention(q, k, v, table, scale=scale))
    num_bytes = 2 * rows * context * model.kv_heads * model.head_dim * q.itemsize
    setting.report.add("paged_attention", f"{rows} x {context}", ms, num_bytes, error=error)


def low_rank(setting: Setting) -> None:
    """Shrink and expand over qkv, by the number of distinct LoRAs."""
    inner, outs = setting.model.groups["qkv"]
    x = setting.random(setting.rows, inner)
    for count in setting.adapters:
        slots = [1 + row % count for row in range(setting.rows)]
        ranks = (setting.rank,) * count
        pack = make_pack(inner, outs, ranks, setting.dtype, setting.device)
        table = make_table(pack.bounds, slots, setting.device)

        def run(y: torch.Tensor, pack=pack, table=table) -> None:
            v = segmented_shrink(x, pack.a, pack.slice_ranks, table)
            segmented_expand(y, v, pack.b, pack.slice_ranks, table)

        exact = exact_update(pack, slots, x)
        y = torch.zeros_like(exact, dtype=setting.dtype)
        run(y)
        error = setting.check(y, exact)
        ms = milliseconds(captured(lambda y=y, run=run: run(y)))
        size = pack.a.nbytes + sum(b.nbytes for b in pack.b)
        setting.report.add("low rank", f"qkv {count} distinct", ms, size, error=error)


def _by_slot(
    setting: Setting, name: str, shape: str, run: Callable[[torch.Tensor, RowTable], object],
    exact: torch.Tensor, num_bytes: int,
) -> None:  # fmt: skip
    """Check row 0 of an in-place update, and time the update."""
    table = RowTable(setting.rows, setting.device)
    rows = list(range(setting.rows))
    table.load(rows, [row % _SLOTS for row in rows], [1.0] * len(rows))
    y = torch.zeros(setting.rows, exact.shape[0], dtype=setting.dtype, device=setting.device)
    run(y, table)
    error = setting.check(y[0], exact)
    setting.report.add(name, shape, milliseconds(lambda: run(y, table)), num_bytes, error=error)


def _addresses(found: list[list[torch.Tensor]]) -> torch.Tensor:
    """The addresses of each slot's factors, ``[slots, factors]``."""
    addresses = [[tensor.data_ptr() for tensor in own] for own in found]
    return torch.tensor(addresses, device=found[0][0].device)


def hadamard(setting: Setting) -> None:
    """LoHa on the q projection, with one of 8 adapters per row."""
    inner, (out, *_) = setting.model.groups["qkv"]
    rank = setting.rank
    found = [
        [
            part
            for _ in range(2)
            for part in (setting.random(out, rank), setting.random(rank, inner) * inner**-0.5)
        ]
        for _ in range(_SLOTS)
    ]
    factors = _addresses(found)
    x = setting.random(setting.rows, inner)

    def run(y: torch.Tensor, table: RowTable) -> None:
        hadamard_expand(y[:, :out], hadamard_shrink(x, factors, rank, table), factors, table)

    w1a, w1b, w2a, w2b = (part.double() for part in found[0])
    exact = ((w1a @ w1b) * (w2a @ w2b)) @ x[0].double()
    size = sum(t.nbytes for own in found for t in own)
    _by_slot(setting, "hadamard", f"q {_SLOTS} adapters r={rank}", run, exact, size)


def kron(setting: Setting) -> None:
    """LoKr on the o projection, with one of 8 adapters per row."""
    inner, (out,) = setting.model.groups["o"]
    factor = 64 if inner % 64 == 0 and inner >= 4096 else 8
    shapes = [(factor, factor), (out // factor, inner // factor)]
    found = [[setting.random(*shape) * shape[1] ** -0.5 for shape in shapes] for _ in range(_SLOTS)]
    factors = _addresses(found)
    x = setting.random(setting.rows, inner)
    exact = torch.kron(*(part.double() for part in found[0])) @ x[0].double()
    _by_slot(
        setting, "kronecker", f"o {_SLOTS} adapters {factor}x{factor}",
        lambda y, table: kronecker(x, y, factors, shapes, table), exact,
        sum(t.nbytes for own in found for t in own),
    )  # fmt: skip


def between(setting: Setting) -> None:
    """The small fused kernels."""
    model, shape = setting.model, f"{setting.rows} rows"
    residual, update = (setting.random(setting.rows, model.hidden) for _ in range(2))
    weight = setting.random(model.hidden)
    total = residual + update
    exact = F.rms_norm(total.double(), (model.hidden,), weight.double(), 1e-5)
    error = setting.check(residual_rms_norm(residual, update, weight, 1e-5), exact)
    ms = milliseconds(lambda: residual_rms_norm(residual, update, weight, 1e-5))
    setting.report.add("residual_rms_norm", shape, ms, 4 * residual.nbytes, error=error)
    gate_up = setting.random(setting.rows, 2 * model.inner)
    gate, up = gate_up.double().chunk(2, dim=1)
    error = setting.check(silu_mul(gate_up), gate * gate.sigmoid() * up)
    ms = milliseconds(lambda: silu_mul(gate_up))
    setting.report.add("silu_mul", shape, ms, gate_up.nbytes * 3 // 2, error=error)


def sampling(setting: Setting) -> None:
    """Sampling with the options in ``_SAMPLING``, for each number of rows."""
    for rows in setting.row_counts:
        logits = 3.0 * torch.randn(rows, setting.model.vocab, device=setting.device)
        tokens = torch.zeros(rows, dtype=torch.int64, device=setting.device)
        for name, form in _SAMPLING.items():
            table, uniforms = SamplingTable(rows, setting.device), torch.rand(rows).tolist()
            temperature, top_p, top_k = form
            table.load([n for u in uniforms for n in (u, temperature, top_p, float("inf"), top_k)])
            sample_rows(logits, table.buffer, tokens)
            _check_tokens(logits.cpu(), tokens.tolist(), uniforms, form)
            ms = milliseconds(lambda t=table, x=logits, out=tokens: sample_rows(x, t.buffer, out))
            setting.report.add("sample_rows", f"{name} {rows} rows", ms, logits.nbytes)


def _check_tokens(
    logits: torch.Tensor,
    tokens: list[int],
    uniforms: list[float],
    form: tuple[float, float, int],
) -> None:
    """Check that each row's uniform number selects its token, up to the rounding of sums."""
    temperature, top_p, top_k = form
    for row, token, uniform in zip(logits.double(), tokens, uniforms, strict=True):
        if temperature == 0.0:
            assert token == int(row.argmax()), "not the likeliest"
            continue
        p, order = (row / temperature).softmax(-1).sort(descending=True)
        if top_k:
            p[top_k:] = 0.0
        p /= p.sum()
        p[(p.cumsum(0) - p >= top_p + 1e-6)] = 0.0
        ends = torch.zeros_like(p).index_copy_(0, order, p / p.sum()).cumsum(0)
        low = 0.0 if token == 0 else float(ends[token - 1])
        assert low - 1e-3 <= uniform <= float(ends[token]) + 1e-3, f"{form}: token {token}"
        assert float(ends[token]) > low, f"{form}: token {token} was filtered out"


KERNELS: dict[str, Callable[[Setting], None]] = {
    "memory": copy_bandwidth,
    "library": library,
    "nf4": nf4,
    "attention": attention,
    "low-rank": low_rank,
    "hadamard": hadamard,
    "kronecker": kron,
    "between": between,
    "sampling": sampling,
}
