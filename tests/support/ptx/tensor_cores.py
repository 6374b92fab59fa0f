"""Matrix moves and products: ``ldmatrix``, ``stmatrix``, ``mma.sync``, ``wgmma``.

Layouts are those of the PTX manual, sections "Matrix Fragments". Products are summed in fp64 and
rounded to fp32 once: the order and the precision in which a tensor core adds are not published.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ptx.fault import Fault
from ptx.numbers import Value, f4, f8, from_half, i8, u2, u4
from ptx.shared_memory import SharedMemory

_LANE = np.arange(32)
# In a fragment of 8 rows of 32-bit pairs, lane t holds pair t % 4 of row t // 4.
_ROW, _PAIR = _LANE // 4, _LANE % 4


def load_matrices(
    shared: SharedMemory, address: np.ndarray, count: int, transposed: bool
) -> list[Value]:
    """``ldmatrix``: ``count`` matrices of 8 rows of 16 bytes per warp; lanes 8i … give rows."""
    warps = address.size // 32
    rows = address.reshape(warps, 32)[:, : 8 * count].reshape(-1)
    data = shared.read(rows, 16, np.repeat(np.arange(warps), 8 * count))
    matrices = data.view(u2).reshape(warps, count, 8, 8)
    if transposed:
        matrices = matrices.swapaxes(2, 3)
    words = np.ascontiguousarray(matrices).view(u4).reshape(warps, count, 32)
    return [np.ascontiguousarray(words[:, i]).reshape(-1) for i in range(count)]


def store_matrices(
    shared: SharedMemory, address: np.ndarray, registers: Sequence[np.ndarray], transposed: bool
) -> None:
    """``stmatrix``, the reverse of ``ldmatrix``."""
    warps, count = address.size // 32, len(registers)
    rows = address.reshape(warps, 32)[:, : 8 * count].reshape(-1)
    words = np.stack([r.reshape(warps, 32) for r in registers], axis=1)
    matrices = np.ascontiguousarray(words).view(u2).reshape(warps, count, 8, 8)
    if transposed:
        matrices = matrices.swapaxes(2, 3)
    data = np.ascontiguousarray(matrices).view(np.uint8).reshape(-1, 16)
    shared.write(rows, data, np.repeat(np.arange(warps), 8 * count))


def _fragment(registers: Sequence[np.ndarray], kind: str) -> np.ndarray:
    """Half elements of packed registers, ``[warps, registers, 32, 2]`` fp64."""
    words = np.stack([r.reshape(-1, 32) for r in registers], axis=1)
    halves = np.ascontiguousarray(words).view(u2)
    return from_half(halves, kind).astype(f8).reshape(*words.shape, 2)


def _rows_a(registers: Sequence[np.ndarray], kind: str) -> np.ndarray:
    """The first operand of a 16 × 16 step, ``[warps, 16, 16]``."""
    values = _fragment(registers, kind)
    a = np.empty((values.shape[0], 16, 16))
    for i in range(4):
        for half in range(2):
            a[:, _ROW + 8 * (i & 1), 2 * _PAIR + 8 * (i >> 1) + half] = values[:, i, :, half]
    return a


def multiply(
    a: Sequence[np.ndarray], b: Sequence[np.ndarray], c: Sequence[np.ndarray], kind: str
) -> list[Value]:
    """``mma.sync.m16n8k16``: four registers of the sum ``c + a b`` per thread."""
    left, values = _rows_a(a, kind), _fragment(b, kind)
    right = np.empty((left.shape[0], 16, 8))
    for i in range(2):
        for half in range(2):
            right[:, 2 * _PAIR + 8 * i + half, _ROW] = values[:, i, :, half]
    total = np.empty((left.shape[0], 16, 8))
    for i, register in enumerate(c):
        column = 2 * _PAIR + (i & 1)
        total[:, _ROW + 8 * (i >> 1), column] = register.view(f4).reshape(-1, 32)
    result = (total + left @ right).astype(f4)
    return [
        np.ascontiguousarray(result[:, _ROW + 8 * (i >> 1), 2 * _PAIR + (i & 1)])
        .view(u4)
        .reshape(-1)
        for i in range(4)
    ]


def _described(shared: SharedMemory, descriptor: Value, rows: int, transposed: bool) -> np.ndarray:
    """Addresses behind a matrix descriptor of 16 columns, read: ``[rows, 16]`` bits.

    A descriptor holds start, leading and stride offsets in units of 16 bytes and the swizzle: rows
    of 128, 64 or 32 bytes whose 16-byte pieces are exchanged by the number of the row.
    """
    bits = int(np.ravel(descriptor)[0])
    if (np.asarray(descriptor) != np.uint64(bits)).any():
        raise Fault("threads of a warp group give different matrix descriptors")
    start, leading, stride = ((bits >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    width = {0: 16, 1: 128, 2: 64, 3: 32}[bits >> 62 & 3]
    row, column = np.indices((rows, 16))
    if transposed:
        # Rows of memory run along the matrix' rows.
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

    Made at once; that ``a`` and ``b`` stay as they are until the wait is checked, that the results
    are not read before it is not.

    Args:
        shared: Where descriptors point.
        a: Four registers per thread, or a descriptor.
        b: A descriptor.
        d: Registers of the sum so far.
        options: Element type, N, whether a and b are transposed, and whether ``d`` is added.
    """
    kind, columns, transposed_a, transposed_b, add = options
    if isinstance(a, list):
        if a[0].size != 128:
            raise Fault("wgmma takes one warp group here")
        left = _rows_a(a, kind).reshape(64, 16)
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
