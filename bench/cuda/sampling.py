"""Sampling: turret's kernel and a batched sampler in torch, by the options of requests."""

from __future__ import annotations

import torch
from cuda import estimate
from cuda.setting import Setting

from turret.kernels.gpu.sample_rows import sample_rows
from turret.kernels.gpu.tables import SamplingTable

# Temperature, top-p and top-k of each form.
FORMS = {
    "greedy": (0.0, 1.0, 0),
    "temperature": (1.0, 1.0, 0),
    "top-p 0.9": (1.0, 0.9, 0),
    "top-k 50, top-p 0.9": (0.7, 0.9, 50),
}


def time_sampling(setting: Setting) -> None:
    """Measure every form at every number of rows, after a check of the tokens."""
    for rows in setting.row_counts:
        logits = 3.0 * torch.randn(rows, setting.model.vocab, device=setting.device)
        tokens = torch.zeros(rows, dtype=torch.int64, device=setting.device)
        for name, form in FORMS.items():
            table = SamplingTable(rows, setting.device)
            uniforms = torch.rand(rows).tolist()
            temperature, top_p, top_k = form
            table.load([n for u in uniforms for n in (u, temperature, top_p, float("inf"), top_k)])
            sample_rows(logits, table.buffer, tokens)
            _check(logits.cpu(), tokens.tolist(), uniforms, form)
            timing = setting.stopwatch.time(
                lambda t=table, x=logits, out=tokens: sample_rows(x, t.buffer, out)
            )
            library = setting.stopwatch.time(lambda x=logits, f=form: _by_sorting(x, *f))
            filters = top_p < 1.0 or top_k > 0
            passes = estimate.FILTERED_PASSES if filters else estimate.UNFILTERED_PASSES
            of = rows, setting.model.vocab, passes if temperature else 1
            setting.report.add(
                "sample_rows", f"{name} {rows} rows", timing,
                lambda card, of=of: [estimate.sample_work(*of, card)],
                gb_s=logits.nbytes / timing.p50 / 1e6, torch_over_ours=library.p50 / timing.p50,
            )  # fmt: skip


def _check(
    logits: torch.Tensor,
    tokens: list[int],
    uniforms: list[float],
    form: tuple[float, float, int],
) -> None:
    """Check that every token is the one that its number selects, up to the rounding of sums."""
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


def _by_sorting(logits: torch.Tensor, temperature: float, top_p: float, top_k: int) -> torch.Tensor:
    """All rows at once, like samplers in torch."""
    if temperature == 0.0:
        return logits.argmax(-1)
    scaled = logits / temperature
    if top_p == 1.0 and not top_k:
        return scaled.softmax(-1).multinomial(1)
    values, order = scaled.sort(dim=-1, descending=True)
    if top_k:
        values[:, top_k:] = float("-inf")
    p = values.softmax(-1)
    p[p.cumsum(-1) - p >= top_p] = 0.0
    return order.gather(1, p.multinomial(1))
