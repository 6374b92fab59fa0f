"""Shared memory of a CTA, byte by byte: what was written, by which warp, since which barrier."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ptx.fault import Fault
from ptx.numbers import UNSIGNED, Value, i8, u1

# Stamps are epoch * _WARPS + warp; the last warp number stands for several.
_WARPS = 64
_SEVERAL = _WARPS - 1


@dataclass(slots=True)
class Copy:
    """A ``cp.async`` under way.

    Attributes:
        at: ``[threads, bytes]``, where it goes.
        data: The same shape, what it brings.
        warps: ``[threads]``, who asked.
    """

    at: np.ndarray
    data: np.ndarray
    warps: np.ndarray


class SharedMemory:
    """Loads, stores and copies with checks.

    An *epoch* lasts from one barrier of the CTA to the next. Within one, no warp may read or write
    what another warp wrote, or write what another read. A copy's bytes are neither read nor
    written until the warp that asked has waited for it; a tensor core reads ordinary stores only
    after a proxy fence, and what it reads is not written until its group has been waited for.
    """

    def __init__(self, size: int) -> None:
        self._data = np.zeros(size, dtype=u1)
        self._written = np.full(size, -1, dtype=i8)
        self._read = np.full(size, -1, dtype=i8)
        self._pending = np.zeros(size, dtype=np.int16)
        self._fenced = np.ones(size, dtype=bool)
        self._busy = np.zeros(size, dtype=np.int16)
        self._epoch = 0
        self._open: list[Copy] = []
        self._groups: list[list[Copy]] = []
        self._operands: list[np.ndarray] = []
        self._products: list[list[np.ndarray]] = []

    def barrier(self) -> None:
        """All warps meet."""
        self._epoch += 1

    def fence(self) -> None:
        """Make ordinary stores visible to tensor cores."""
        self._fenced[:] = True

    def _span(self, address: np.ndarray, size: int, what: str) -> np.ndarray:
        if (address & (min(size, 16) - 1)).any():
            raise Fault(f"misaligned shared {what} of {size} bytes")
        if address.min() < 0 or address.max() + size > self._data.size:
            raise Fault(
                f"shared {what} of {size} bytes at {address.max()}, out of bounds: "
                f"the program has {self._data.size}"
            )
        return address[:, None] + np.arange(size)

    def load(self, address: np.ndarray, size: int, count: int, warps: np.ndarray) -> list[Value]:
        """``count`` elements of ``size`` bytes per thread, ``[threads]`` unsigned each."""
        data = self.read(address, size * count, warps).view(UNSIGNED[8 * size])
        return [data[:, i] for i in range(count)]

    def read(self, address: np.ndarray, size: int, warps: np.ndarray) -> np.ndarray:
        """``[threads, size]`` bytes."""
        at = self._span(address, size, "load")
        self._check_readable(at)
        mine = (self._epoch * _WARPS + warps)[:, None]
        written = self._written[at]
        if ((written >= self._epoch * _WARPS) & (written != mine)).any():
            raise Fault("shared race: a warp reads what another wrote, with no barrier between")
        old = self._read[at]
        self._read[at] = mine
        several = (self._read[at] != mine) | ((old >= self._epoch * _WARPS) & (old != mine))
        if several.any():
            self._read[at[several]] = self._epoch * _WARPS + _SEVERAL
        return self._data[at]

    def _check_readable(self, at: np.ndarray) -> None:
        if self._pending[at].any():
            raise Fault("a copy is still writing what is read from shared memory")
        if (self._written[at] < 0).any():
            raise Fault("uninitialised: shared memory is read that was never written")

    def _check_writable(self, at: np.ndarray, mine: np.ndarray) -> np.ndarray:
        """Where another warp wrote in this epoch."""
        if self._busy[at].any():
            raise Fault("a tensor core may still read what is written")
        read = self._read[at]
        if ((read >= self._epoch * _WARPS) & (read != mine)).any():
            raise Fault("shared race: a warp writes what another read, with no barrier between")
        written = self._written[at]
        return (written >= self._epoch * _WARPS) & (written != mine)

    def store(
        self, address: np.ndarray, values: list[np.ndarray], size: int, warps: np.ndarray
    ) -> None:
        """Write elements of ``size`` bytes, one array per element."""
        data = np.stack(values, axis=1).astype(UNSIGNED[8 * size]).view(u1)
        self.write(address, data, warps)

    def write(self, address: np.ndarray, data: np.ndarray, warps: np.ndarray) -> None:
        """Write ``[threads, size]`` bytes."""
        at = self._span(address, data.shape[1], "store")
        if self._pending[at].any():
            raise Fault("a copy is still writing what is stored to in shared memory")
        mine = (self._epoch * _WARPS + warps)[:, None]
        others = self._check_writable(at, mine)
        if (self._data[at] != data)[others].any():
            raise Fault("shared race: two warps write the same place, with no barrier between")
        self._data[at] = data
        if (self._data[at] != data).any():
            raise Fault("shared race: two threads write the same place at once")
        self._written[at] = mine
        self._fenced[at] = False

    def copy(self, address: np.ndarray, data: np.ndarray, warps: np.ndarray) -> None:
        """Start a ``cp.async``."""
        at = self._span(address, data.shape[1], "copy")
        if self._check_writable(at, (self._epoch * _WARPS + warps)[:, None]).any():
            raise Fault("shared race: a copy over what another warp wrote, with no barrier between")
        self._pending[at] += 1
        self._open.append(Copy(at, data, warps))

    def commit_copies(self) -> None:
        """Close a group of copies."""
        self._groups.append(self._open)
        self._open = []

    def wait_copies(self, left: int) -> None:
        """Finish all groups but the last ``left``."""
        while len(self._groups) > left:
            for done in self._groups.pop(0):
                self._data[done.at] = done.data
                self._written[done.at] = (self._epoch * _WARPS + done.warps)[:, None]
                self._fenced[done.at] = False
                self._pending[done.at] -= 1

    def operand(self, address: np.ndarray) -> np.ndarray:
        """16-bit elements for an asynchronous product, busy until its group is waited for."""
        at = self._span(address, 2, "operand")
        self._check_readable(at)
        if (self._written[at] >= self._epoch * _WARPS).any():
            raise Fault("shared race: a tensor core reads what was written since the last barrier")
        if not self._fenced[at].all():
            raise Fault("a tensor core reads what was written with no fence.proxy.async since")
        self._busy[at] += 1
        self._operands.append(at)
        return self._data[at].view(np.uint16)[:, 0]

    def commit_products(self) -> None:
        """Close a group of asynchronous products."""
        self._products.append(self._operands)
        self._operands = []

    def wait_products(self, left: int) -> None:
        """Finish all groups of products but the last ``left``."""
        while len(self._products) > left:
            for at in self._products.pop(0):
                self._busy[at] -= 1

    def finish(self) -> None:
        """Check that nothing is left under way when the program ends.

        Raises:
            Fault: A copy was never waited for.
        """
        if self._open or any(self._groups):
            raise Fault("a copy is still under way when the program ends")
