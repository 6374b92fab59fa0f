"""Matrix moves and products: ``ldmatrix``, ``stmatrix``, ``mma.sync``, ``wgmma``.

Layouts are those of the PTX manual, sections "Matrix Fragments". Products are summed in fp64 and
rounded to fp32 once, because the order and precision of tensor cores are not published.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from ptx.fault import Fault
from ptx.numbers import Value, f4, f8, from_half, i4, i8, u2, u4
from ptx.shared_memory import SharedMemory

_LANE = np.arange(32)
# In a fragment of 8 rows of 32-bit pairs, lane t holds pair t % 4 of row t // 4.
_ROW, _PAIR = _LANE // 4, _LANE % 4


def load_matrices(
    shared: SharedMemory, address: np.ndarray, count: int, transposed: bool
) -> list[Value]:
    """``ldmatrix``: ``count`` matrices of 8 rows of 16 bytes per warp.

    Lanes 8 i to 8 i + 7 provide the addresses of the rows of matrix i.
    """
    warps = address.size // 32
    data = shared.read(_row_addresses(address, count), 16, _row_warps(warps, count))
    matrices = data.view(u2).reshape(warps, count, 8, 8)
    matrices = matrices.transpose(1, 0, 3, 2) if transposed else matrices.swapaxes(0, 1)
    words = np.ascontiguousarray(matrices).view(u4).reshape(count, warps * 32)
    return list(words)


def store_matrices(
    shared: SharedMemory, address: np.ndarray, registers: Sequence[np.ndarray], transposed: bool
) -> None:
    """``stmatrix``, the reverse of ``ldmatrix``."""
    warps, count = address.size // 32, len(registers)
    words = np.stack([r.reshape(warps, 32) for r in registers], axis=1)
    matrices = np.ascontiguousarray(words).view(u2).reshape(warps, count, 8, 8)
    if transposed:
        matrices = matrices.swapaxes(2, 3)
    data = np.ascontiguousarray(matrices).view(np.uint8).reshape(-1, 16)
    shared.write(_row_addresses(address, count), data, _row_warps(warps, count))


def _row_addresses(address: np.ndarray, count: int) -> np.ndarray:
    return address if count == 4 else address.reshape(-1, 32)[:, : 8 * count].reshape(-1)


@functools.cache
def _row_warps(warps: int, count: int) -> np.ndarray:
    """The warp of each row."""
    return np.repeat(np.arange(warps, dtype=i4), 8 * count)


def _fragment(registers: np.ndarray, kind: str) -> np.ndarray:
    """fp64 elements of ``[…, registers, threads]`` packed registers.

    ``[…, registers, warps, 8, 4, 2]``: row of the fragment, pair of elements, element.
    """
    values = from_half(registers.view(u2), kind).astype(f8)
    return values.reshape(*registers.shape[:-1], -1, 8, 4, 2)


def _rows_a(registers: np.ndarray, kind: str) -> np.ndarray:
    """The first operand of a 16 × 16 step, ``[…, 4, threads]`` → ``[…, warps, 16, 16]``."""
    values = _fragment(registers, kind)
    # Registers 0 and 1 are rows 0-7 and 8-15; 2 and 3 are the same rows of the columns from 8 on.
    values = values.reshape(*values.shape[:-5], 2, 2, *values.shape[-4:])
    places = np.moveaxis(values, (-4, -5, -3, -6, -2, -1), (-6, -5, -4, -3, -2, -1))
    return places.reshape(*places.shape[:-5], 16, 16)


def multiply(registers: Sequence[np.ndarray], kind: str) -> np.ndarray:
    """Several ``mma.sync.m16n8k16`` at once: the registers of the sums ``c + a b``.

    Args:
        registers: The registers of a, b and c, 32 bits each: ``[products, 4, threads]``, two for b.
        kind: The type of the elements of a and b.

    Returns:
        ``[products, 4, threads]``.
    """
    a, b, c = registers
    left, values = _rows_a(a, kind), _fragment(b, kind)
    # [products, 2, warps, column, pair, half] → [products, warps, 16, 8]
    right = values.transpose(0, 2, 1, 4, 5, 3).reshape(*left.shape[:2], 16, 8)
    count, warps = left.shape[:2]
    # The number of a register consists of the half of the rows and the element of the pair.
    sums = c.view(f4).reshape(count, 2, 2, warps, 8, 4).transpose(0, 3, 1, 4, 5, 2)
    result = (sums.reshape(count, warps, 16, 8) + left @ right).astype(f4)
    parts = result.reshape(count, warps, 2, 8, 4, 2).transpose(0, 2, 5, 1, 3, 4)
    return np.ascontiguousarray(parts).view(u4).reshape(count, 4, -1)


def _described(shared: SharedMemory, descriptor: Value, rows: int, transposed: bool) -> np.ndarray:
    """The elements behind a matrix descriptor of 16 columns: ``[rows, 16]`` bits.

    A descriptor has start, leading and stride offsets in units of 16 bytes, and the swizzle: in
    rows of 128, 64 or 32 bytes, 16-byte pieces are exchanged by the number of the row.
    """
    bits = int(np.ravel(descriptor)[0])
    if (np.asarray(descriptor) != np.uint64(bits)).any():
        raise Fault("threads of a warp group give different matrix descriptors")
    start, leading, stride = ((bits >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    width = {0: 16, 1: 128, 2: 64, 3: 32}[bits >> 62 & 3]
    row, column = np.indices((rows, 16))
    if transposed:
        # Rows of memory are rows of the matrix.
        row, column = column, row
        across, along = column // (width // 2), row // 8
        inner = row % 8 * width + column % (width // 2) * 2
        offset = across * leading + along * stride + inner
        if width == 16:
            offset = across * stride + along * leading + inner
    else:
        across = column // 8 if width == 16 else 0 * column
        inner = row % 8 * width + (column % 8 if width == 16 else column) * 2
        offset = row // 8 * stride + across * leading + inner
    address = (start + offset).astype(i8)
    if width > 16:
        address ^= (address >> 7 & width // 16 - 1) << 4
    return shared.operand(address.reshape(-1)).reshape(rows, 16)


def multiply_group(
    shared: SharedMemory,
    a: Sequence[np.ndarray] | Value,
    b: Value,
    d: Sequence[Value],
    options: tuple[str, int, bool, bool, Value],
) -> list[Value]:
    """``wgmma.mma_async.m64nNk16`` of one warp group: the registers of ``d + a b``.

    The product is computed at once. Changes of ``a`` and ``b`` before the wait are detected, but
    early reads of the results are not.

    Args:
        shared: The memory to which descriptors point.
        a: Four registers per thread, or a descriptor.
        b: A descriptor.
        d: The registers of the sum so far.
        options: The element type, N, whether a and b are transposed, and whether ``d`` is added.
    """
    kind, columns, transposed_a, transposed_b, add = options
    if isinstance(a, list):
        if a[0].size != 128:
            raise Fault("wgmma takes one warp group here")
        left = _rows_a(np.stack(a), kind).reshape(64, 16)
    else:
        left = from_half(_described(shared, a, 64, transposed_a), kind).astype(f8)
    right = from_half(_described(shared, b, columns, transposed_b), kind).astype(f8)
    product = (left @ right.T).reshape(4, 16, columns)
    results = []
    for i, register in enumerate(d):
        row, column = _ROW + 8 * (i % 4 >> 1), 8 * (i // 4) + 2 * _PAIR + (i & 1)
        part = product[:, row, column].reshape(-1)
        if np.all(add):
            part = part + register.view(f4)
        elif np.any(add):
            raise Fault("threads of a warp group disagree on adding")
        results.append(part.astype(f4).view(u4))
    return results
