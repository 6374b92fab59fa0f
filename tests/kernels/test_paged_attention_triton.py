"""Triton's ``paged_attention``, compared with float64 and the torch path.

Planted faults, and the number of tests that fail for each of them (tried by hand):

- a query sees one position ahead: 13
- window one too wide: 4
- padding seen: 12
- accumulator not rescaled between tiles: 12
- denominator not rescaled between splits: 12
- values past the end read (NaN): 16
- all tokens of a chunk at its first position: 13
- one query head per KV head: 9
- table: splits that the window still sees left out: 6
- a sink counted in every record of a spread item: 6
- a sink left out where records are merged: 6
- a sink not in the scores' base: 6
- another head's sink: 4
"""

from __future__ import annotations

import pytest
import torch
from kernel_traffic import DEVICE, DTYPES, HALF, error_ratio

from turret.kernels.gpu.paged_attention import paged_attention
from turret.kernels.gpu.tables import ATTENTION_RECORD, SPLIT, AttentionTable
from turret.kernels.paged_attention import SequenceSpan, paged_attention_reference, plan_attention

BLOCK = 16
NUM_BLOCKS = 160
# The probabilities are rounded to the cache's dtype before the product with the values.
BOUND = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
LARGE = {torch.float16: 3e-4, torch.bfloat16: 2.3e-3}
# KV heads, query heads per KV head, head dim, window.
SHAPES = [(2, 4, 32, None), (1, 7, 24, None), (2, 3, 64, 40), (1, 1, 16, 600), (1, 20, 16, None)]
WIDE = (1, 2, 160, 40)
# New tokens, tokens before them, and leading padding.
STEP = [(1, 0, 0), (1, 700, 0), (9, 30, 5), (17, 270, 0), (1, 63, 16), (33, 0, 0)]


class Step:
    """Caches that are full of NaN except for the used blocks, and queries."""

    def __init__(self, shape, dtype, step=STEP) -> None:
        self.kv_heads, self.per_head, self.head_dim, self.window = shape
        cache = (NUM_BLOCKS, BLOCK, self.kv_heads, self.head_dim)
        self.k, self.v = (torch.full(cache, float("nan")).to(DEVICE, dtype) for _ in range(2))
        free = (torch.randperm(NUM_BLOCKS - 1) + 1).tolist()
        self.spans, row = [], 0
        for new, context, padding in step:
            blocks = [free.pop() for _ in range(-(-(new + context) // BLOCK))]
            for i, block in enumerate(blocks):
                used = min(BLOCK, new + context - i * BLOCK)
                for store in (self.k, self.v):
                    store[block, :used] = torch.randn(used, self.kv_heads, self.head_dim)
            self.spans.append(SequenceSpan(row, new, context, blocks, padding))
            row += new
        self.num_rows = row
        self.q = torch.randn(row, self.kv_heads * self.per_head, self.head_dim).to(DEVICE, dtype)
        self.scale = self.head_dim**-0.5

    def table(self, spread=60, spans=None, split=SPLIT) -> AttentionTable:
        table = AttentionTable(
            max_records=120,
            blocks=NUM_BLOCKS,
            kv_heads=self.kv_heads,
            queries_per_head=self.per_head,
            window=self.window,
            device=DEVICE,
            spread_records=spread,
            split=split,
        )
        table.load(self.spans if spans is None else spans)
        return table

    def poison_padding(self) -> None:
        """Put NaN into the padding at the beginning of every sequence; it must not be read."""
        for span in self.spans:
            for position in range(span.num_padding):
                block = span.blocks[position // BLOCK]
                self.k[block, position % BLOCK] = self.v[block, position % BLOCK] = float("nan")

    def sinks(self) -> torch.Tensor:
        """One sink per query head, from negligible to dominant."""
        return torch.linspace(-20, 6, self.q.shape[1], device=DEVICE)

    def attend(
        self,
        table: AttentionTable,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        options = {"scale": self.scale, "softcap": softcap, "sinks": sinks}
        return paged_attention(self.q, self.k, self.v, table, **options)

    def by_torch(
        self, softcap: float | None = None, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        plan = plan_attention(
            self.spans,
            num_rows=self.num_rows,
            block_size=BLOCK,
            queries_per_head=self.per_head,
            window=self.window,
            device=DEVICE,
        )
        k, v = self.k.nan_to_num(), self.v.nan_to_num()
        options = {"scale": self.scale, "softcap": softcap, "sinks": sinks}
        return paged_attention_reference(self.q, k, v, plan, **options)

    def exact(
        self, softcap: float | None = None, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The result of plain loops in float64."""
        out = torch.zeros(self.q.shape, dtype=torch.float64, device=DEVICE)
        for span in self.spans:
            k, v = (s[span.blocks].flatten(0, 1).double() for s in (self.k, self.v))
            for i in range(span.num_new):
                position = span.num_context + i
                first = span.num_padding
                if self.window is not None:
                    first = max(first, position - self.window + 1)
                for head in range(self.q.shape[1]):
                    keys = k[first : position + 1, head // self.per_head]
                    values = v[first : position + 1, head // self.per_head]
                    scores = keys @ self.q[span.row_start + i, head].double() * self.scale
                    if softcap is not None:
                        scores = softcap * (scores / softcap).tanh()
                    if sinks is not None:
                        scores = torch.cat((scores, sinks[head : head + 1].double()))
                    shares = scores.softmax(0)[: len(values)]
                    out[span.row_start + i, head] = shares @ values
        return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_and_prefill(shape, dtype):
    step = Step(shape, dtype)
    exact = step.exact()
    step.poison_padding()
    assert error_ratio(step.attend(step.table()), exact) < BOUND[dtype]
    assert error_ratio(step.attend(step.table(spread=0)), exact) < BOUND[dtype]


@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_torch_path(shape):
    step = Step(shape, HALF)
    assert error_ratio(step.attend(step.table()), step.by_torch()) < BOUND[HALF]


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_that_process_fewer_keys_at_a_time(dtype):
    step = Step(WIDE, dtype)
    exact = step.exact()
    step.poison_padding()
    assert error_ratio(step.attend(step.table()), exact) < BOUND[dtype]


@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_caps(shape, dtype):
    """Both kernels apply the cap, which is low so that it has an effect."""
    step = Step(shape, dtype)
    exact = step.exact(0.7)
    step.poison_padding()
    assert error_ratio(step.attend(step.table(), 0.7), exact) < BOUND[dtype]
    assert error_ratio(step.by_torch(0.7), exact) < BOUND[dtype]


@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sinks(shape, dtype):
    """In both kernels, sinks count once, with the same bits in one program and in many."""
    step = Step(shape, dtype)
    sinks = step.sinks()
    exact = step.exact(sinks=sinks)
    step.poison_padding()
    whole = step.attend(step.table(spread=0), sinks=sinks)
    assert error_ratio(whole, exact) < BOUND[dtype]
    assert torch.equal(step.attend(step.table(), sinks=sinks), whole)
    assert error_ratio(step.by_torch(sinks=sinks), exact) < BOUND[dtype]


def test_large_scores_are_scaled_after_the_product():
    """Scaling and rounding the query first would add an error that grows with the scores."""
    step = Step(SHAPES[0], HALF, [(1, 300, 0), (9, 30, 0)])
    step.q *= 3
    for span in step.spans:
        step.k[span.blocks] *= 3
    assert error_ratio(step.attend(step.table()), step.exact()) < LARGE[HALF]


def test_splits_add_up_to_the_same_bits_in_one_program_or_many():
    step = Step(SHAPES[0], HALF)
    whole = step.attend(step.table(spread=0))
    # Enough records for only the longest sequence, and for all.
    for spread in (3, 60):
        table = step.table(spread)
        assert torch.equal(step.attend(table), whole), spread
        # The next launch finds the same counters as this one.
        assert not table.counters.any()
        assert torch.equal(step.attend(table), whole), spread


@pytest.mark.parametrize("split", [64, 128, 512])
def test_splits_of_other_lengths(split):
    """``bench/gpu.sh`` compares their speed."""
    step = Step(SHAPES[2], HALF)
    exact = step.exact()
    step.poison_padding()
    whole = step.attend(step.table(spread=0, split=split))
    assert error_ratio(whole, exact) < BOUND[HALF]
    assert torch.equal(step.attend(step.table(split=split)), whole)


def test_decoding_rows_are_split_over_programs_beside_a_prompt():
    """Many programs process a long context, regardless of the rest of the step."""
    step = Step((2, 4, 32, None), HALF, [(1, 700, 0), (33, 270, 0), (1, 300, 0)])
    table = step.table(spread=5)
    words = table.buffer.tolist()
    records = [words[words[1] + ATTENTION_RECORD * i :][:ATTENTION_RECORD] for i in range(words[0])]
    assert [r[0] for r in records if r[8] == 3] == [0, 0, 0]
    assert [r[0] for r in records if r[8] == 2] == [34, 34]
    # Each item of the prompt has two splits in one record.
    assert [(r[5], r[6]) for r in records if r[8] == 1] == [(0, 2)] * 9
    exact = step.exact()
    assert error_ratio(step.attend(table), exact) < BOUND[HALF]


def test_a_sequence_has_the_same_bits_alone():
    step = Step(SHAPES[0], HALF)
    together = step.attend(step.table())
    for span in step.spans:
        rows = slice(span.row_start, span.row_start + span.num_new)
        assert torch.equal(step.attend(step.table(spans=[span]))[rows], together[rows])


def test_chunks_have_the_bits_of_the_whole_prompt():
    step = Step(SHAPES[0], HALF, [(33, 0, 0)])
    whole = step.attend(step.table())
    (span,) = step.spans
    for cut in (4, 16, 31):
        parts = [
            SequenceSpan(0, cut, 0, span.blocks[: -(-cut // BLOCK)]),
            SequenceSpan(cut, 33 - cut, cut, span.blocks),
        ]
        for part in parts:
            rows = slice(part.row_start, part.row_start + part.num_new)
            assert torch.equal(step.attend(step.table(spans=[part]))[rows], whole[rows]), cut


def test_an_empty_step_and_a_strided_query():
    step = Step(SHAPES[0], HALF, [(3, 5, 0)])
    step.attend(step.table(spans=[]))
    out = step.attend(step.table())
    wide = torch.zeros(3, step.q.shape[1] * step.head_dim + 8, device=DEVICE, dtype=HALF)
    view = wide[:, 8:].view(3, step.q.shape[1], step.head_dim)
    view.copy_(step.q)
    strided = paged_attention(view, step.k, step.v, step.table(), scale=step.scale)
    assert torch.equal(strided, out)
