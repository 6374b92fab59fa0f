"""Other approaches to many adapters in a batch, implemented here to be measured in the same run.

- ``torch_loop``: for each adapter, its rows through two products (as PEFT does per adapter name).
- ``gathered_bmm``: every row gathers its adapter's matrices, padded to the largest rank, and one
  batched product does all rows.
- ``PaddedTwoLaunch``: sorted rows, one shrink and one expand over all adapters at the largest rank,
  split-K with a zeroed buffer and atomic additions (the arrangement of common serving systems).
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from cuda.adapters import LowRankPack


def torch_loop(
    pack: LowRankPack, rows_of_slot: dict[int, torch.Tensor], x: torch.Tensor, y: torch.Tensor
) -> None:
    """Add the updates adapter by adapter, in place."""
    for slot, rows in rows_of_slot.items():
        low, high = pack.bounds[slot]
        part = x.index_select(0, rows)
        start = 0
        for s, b in enumerate(pack.b):
            delta = (part @ pack.a[low:high, s].T) @ b[low:high]
            y[:, start : start + b.shape[1]].index_add_(0, rows, delta)
            start += b.shape[1]


class Padded:
    """The adapters, padded to the largest rank: ``a [slots, slices, rank, in]``, ``b`` likewise."""

    def __init__(self, pack: LowRankPack) -> None:
        self.rank = max(high - low for low, high in pack.bounds)
        slots, (slices, inner) = len(pack.bounds), pack.a.shape[1:]
        self.outs = [b.shape[1] for b in pack.b]
        self.a = pack.a.new_zeros(slots, slices, self.rank, inner)
        self.b = [b.new_zeros(slots, self.rank, b.shape[1]) for b in pack.b]
        for slot, (low, high) in enumerate(pack.bounds):
            self.a[slot, :, : high - low] = pack.a[low:high].transpose(0, 1)
            for padded, b in zip(self.b, pack.b, strict=True):
                padded[slot, : high - low] = b[low:high]


def gathered_bmm(padded: Padded, slots: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
    """Add the updates by gathering every row's matrices, in place."""
    start = 0
    for s, b in enumerate(padded.b):
        v = torch.bmm(padded.a[:, s].index_select(0, slots), x.unsqueeze(2))
        delta = torch.bmm(v.transpose(1, 2), b.index_select(0, slots))
        y[:, start : start + b.shape[2]].add_(delta.squeeze(1))
        start += b.shape[2]


@triton.jit
def _padded_shrink(
    x_ptr, a_ptr, v_ptr, rows_ptr, indptr_ptr, num_rows, inner, rank, slices,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(rank, BLOCK_R)
    split = tl.program_id(0) % SPLITS
    tile = (tl.program_id(0) // SPLITS) % tiles
    chunk = tl.program_id(0) // (SPLITS * tiles)
    s = tl.program_id(1)
    slot = tl.program_id(2)
    begin = tl.load(indptr_ptr + slot)
    count = tl.load(indptr_ptr + slot + 1) - begin
    if chunk * BLOCK_M >= count:
        return
    m = chunk * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    rows = tl.load(rows_ptr + begin + m, mask=m < count, other=0)
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k0 in range(split * BLOCK_K, inner, SPLITS * BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + rows[:, None] * inner + k[None, :],
            mask=(m < count)[:, None] & (k < inner)[None, :], other=0.0,
        )  # fmt: skip
        a = tl.load(
            a_ptr + ((slot * slices + s) * rank + r)[None, :] * inner + k[:, None],
            mask=(r < rank)[None, :] & (k < inner)[:, None], other=0.0,
        )  # fmt: skip
        acc = tl.dot(x, a, acc)
    at = v_ptr + (s * num_rows + rows)[:, None] * rank + r[None, :]
    tl.atomic_add(at, acc, mask=(m < count)[:, None] & (r < rank)[None, :], sem="relaxed")


@triton.jit
def _padded_expand(
    v_ptr, b_ptr, y_ptr, rows_ptr, indptr_ptr, y_stride, out, rank,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(out, BLOCK_N)
    chunk = tl.program_id(0) // tiles
    slot = tl.program_id(1)
    begin = tl.load(indptr_ptr + slot)
    count = tl.load(indptr_ptr + slot + 1) - begin
    if chunk * BLOCK_M >= count:
        return
    m = chunk * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.load(rows_ptr + begin + m, mask=m < count, other=0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for r0 in range(0, rank, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        v = tl.load(
            v_ptr + rows[:, None] * rank + r[None, :],
            mask=(m < count)[:, None] & (r < rank)[None, :], other=0.0,
        )  # fmt: skip
        b = tl.load(
            b_ptr + (slot * rank + r)[:, None] * out + n[None, :],
            mask=(r < rank)[:, None] & (n < out)[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot(v.to(b.dtype), b, acc)
    at = y_ptr + rows[:, None] * y_stride + n[None, :]
    keep = (m < count)[:, None] & (n < out)[None, :]
    base = tl.load(at, mask=keep, other=0.0)
    tl.store(at, base + acc.to(base.dtype), mask=keep)


class PaddedTwoLaunch:
    """Sorted rows and per-adapter counts for the padded kernels; 32-row tiles, split-K 8."""

    def __init__(self, padded: Padded, slot_of_row: Sequence[int], device: torch.device) -> None:
        self.padded = padded
        order = sorted(range(len(slot_of_row)), key=lambda row: slot_of_row[row])
        counts = [0] * len(padded.a)
        for slot in slot_of_row:
            counts[slot] += slot > 0
        order = [row for row in order if slot_of_row[row] > 0]
        indptr = [0]
        for count in counts:
            indptr.append(indptr[-1] + count)
        self.rows = torch.tensor(order, dtype=torch.int32, device=device)
        self.indptr = torch.tensor(indptr, dtype=torch.int32, device=device)

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        padded, num_rows = self.padded, x.shape[0]
        slots, slices, rank, inner = padded.a.shape
        v = torch.zeros(slices, num_rows, rank, dtype=torch.float32, device=x.device)
        chunks = triton.cdiv(num_rows, 32)
        _padded_shrink[(8 * chunks * triton.cdiv(rank, 16), slices, slots)](
            x, padded.a, v, self.rows, self.indptr, num_rows, inner, rank, slices,
            SPLITS=8, BLOCK_M=32, BLOCK_R=16, BLOCK_K=256, num_warps=4, num_stages=2,
            enable_fp_fusion=True,
        )  # fmt: skip
        start = 0
        for s, (b, out) in enumerate(zip(padded.b, padded.outs, strict=True)):
            _padded_expand[(chunks * triton.cdiv(out, 128), slots)](
                v[s], b, y[:, start : start + out], self.rows, self.indptr, y.stride(0), out, rank,
                BLOCK_M=32, BLOCK_N=128, BLOCK_R=16, num_warps=4, num_stages=2,
                enable_fp_fusion=True,
            )  # fmt: skip
            start += out
