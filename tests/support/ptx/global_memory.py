"""Device memory: the storages of a launch's tensors at addresses of their own."""

from __future__ import annotations

import bisect

import numpy as np
from ptx.fault import Fault
from ptx.numbers import UNSIGNED, Value, i8, u8

# Addresses begin here; storages are this far apart at least.
_FIRST = 1 << 32
_ROOM = 1 << 12
# Readers of a place by several programs.
_SEVERAL = -2


class Storage:
    """Bytes of one allocation, with who touched them in the launch.

    Attributes:
        base: Address of the first byte.
        data: ``[bytes]`` uint8, the memory itself.
        writer: Program that wrote a pair of bytes, -1 if none did; None before the first write.
        reader: The same for reads, -2 for several programs.
    """

    def __init__(self, base: int, data: np.ndarray) -> None:
        self.base = base
        self.end = base + data.size
        self.data = data
        self.views = {1: data}
        for size in (2, 4, 8):
            self.views[size] = data[: data.size // size * size].view(UNSIGNED[8 * size])
        self.writer: np.ndarray | None = None
        self.reader: np.ndarray | None = None

    def pairs(self) -> np.ndarray:
        """Room for a program number per two bytes."""
        return np.full(-(-self.data.size // 2), -1, dtype=np.int32)


class GlobalMemory:
    """Loads and stores with checks: bounds, alignment, no two programs of a launch in conflict."""

    def __init__(self) -> None:
        self._storages: list[Storage] = []
        self._bases: list[int] = []
        self._next = _FIRST

    def add(self, data: np.ndarray) -> int:
        """Map bytes and return their address, a multiple of 4096."""
        base = self._next
        self._next += -(-(data.size + _ROOM) // _ROOM) * _ROOM
        self._storages.append(Storage(base, data))
        self._bases.append(base)
        return base

    def _at(self, address: np.ndarray, size: int, what: str) -> tuple[Storage, np.ndarray]:
        """The storage that all threads address, and their offsets in it."""
        if (address & u8(size - 1)).any():
            raise Fault(f"misaligned {what} of {size} bytes")
        low, high = int(address.min()), int(address.max())
        number = bisect.bisect_right(self._bases, low) - 1
        if number < 0:
            raise Fault(f"{what} at {low:#x}: no tensor is there")
        storage = self._storages[number]
        if high + size > storage.end:
            raise Fault(
                f"{what} of {size} bytes at {high - storage.base}, out of bounds: "
                f"the tensor has {storage.end - storage.base}"
            )
        return storage, (address - u8(storage.base)).view(i8)

    def load(self, address: np.ndarray, size: int, count: int, program: int) -> list[Value]:
        """``count`` elements of ``size`` bytes per thread, ``[threads]`` unsigned each."""
        storage, offset = self._at(address, size * count, "load")
        pairs = _pairs(offset, size * count)
        if storage.writer is not None:
            writer = storage.writer[pairs]
            if ((writer >= 0) & (writer != program)).any():
                raise Fault("race: a program reads what another program of the launch wrote")
        if storage.reader is None:
            storage.reader = storage.pairs()
        old = storage.reader[pairs]
        storage.reader[pairs] = np.where((old == -1) | (old == program), program, _SEVERAL)
        at = offset // size
        return [storage.views[size][at + i] for i in range(count)]

    def store(self, address: np.ndarray, values: list[np.ndarray], size: int, program: int) -> None:
        """Write elements of ``size`` bytes, one array per element."""
        if size == 1:
            raise Fault("a store of one byte: races are followed in pairs of bytes")
        storage, offset = self._at(address, size * len(values), "store")
        pairs = _pairs(offset, size * len(values))
        if storage.writer is None:
            storage.writer = storage.pairs()
        writer = storage.writer[pairs]
        if ((writer >= 0) & (writer != program)).any():
            raise Fault("race: two programs of the launch write the same place")
        if storage.reader is not None:
            reader = storage.reader[pairs]
            if ((reader != -1) & (reader != program)).any():
                raise Fault("race: a program writes what another program of the launch read")
        storage.writer[pairs] = program
        at = offset // size
        for i, value in enumerate(values):
            storage.views[size][at + i] = value


def _pairs(offset: np.ndarray, size: int) -> np.ndarray:
    half = offset >> 1
    return half if size <= 2 else half[:, None] + np.arange(size // 2)
