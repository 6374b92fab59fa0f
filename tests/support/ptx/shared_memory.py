"""The shared memory of a CTA, with the last accesses to each byte by warp and barrier."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ptx.fault import Fault
from ptx.numbers import UNSIGNED, Value, i4, u1

# Stamps are epoch * _WARPS + warp; the last warp number means several warps.
_WARPS = 64
_SEVERAL = _WARPS - 1
# Maximum number of bytes that one thread accesses at once; all sizes are powers of two.
_WIDEST = 16


@dataclass(slots=True)
class Copy:
    """A running ``cp.async``.

    Attributes:
        rows: The destination.
        at: ``[threads]``, the number of each row.
        data: ``[threads, bytes]``, the copied bytes.
        warps: ``[threads]``, the requesting warps.
    """

    rows: _Rows
    at: np.ndarray
    data: np.ndarray
    warps: np.ndarray


class _Rows:
    """The state of the memory in rows of some bytes: ``[rows, size]`` each.

    Accesses are aligned, so each consists of rows, which are cheaper to find than bytes.
    """

    def __init__(self, memory: SharedMemory, size: int) -> None:
        self.data = memory.data.reshape(-1, size)
        self.written = memory.written.reshape(-1, size)
        self.read = memory.read_by.reshape(-1, size)
        self.pending = memory.pending.reshape(-1, size)
        self.fenced = memory.fenced.reshape(-1, size)
        self.busy = memory.busy.reshape(-1, size)


class SharedMemory:
    """Loads, stores and copies with checks.

    An *epoch* lasts from one barrier of the CTA to the next. Within an epoch, no warp may read or
    write bytes that another warp wrote, or write bytes that another read. A copy's bytes must not
    be accessed until the requesting warp has waited for it. A tensor core sees ordinary stores only
    after a proxy fence, and its operands must not be written until its group has been waited for.

    Attributes:
        data: The bytes.
        written: The stamp (see ``_WARPS``) of the last write to a byte, -1 before the first.
        read_by: The stamp of the last read, as far as it was looked up.
        pending: The number of running copies to a byte.
        fenced: Whether tensor cores see the stores.
        busy: The number of running products that read a byte.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        room = -(-size // _WIDEST) * _WIDEST
        self.data = np.zeros(room, dtype=u1)
        self.written = np.full(room, -1, dtype=i4)
        self.read_by = np.full(room, -1, dtype=i4)
        self.pending = np.zeros(room, dtype=np.int16)
        self.fenced = np.ones(room, dtype=bool)
        self.busy = np.zeros(room, dtype=np.int16)
        self._rows = {1 << i: _Rows(self, 1 << i) for i in range(5)}
        # The stamp of warp 0 in this epoch.
        self._now = 0
        # Reads of the epoch that no write has checked yet: rows, their numbers, readers.
        self._reads: list[tuple[_Rows, np.ndarray, np.ndarray]] = []
        self._open: list[Copy] = []
        self._groups: list[list[Copy]] = []
        self._operands: list[np.ndarray] = []
        self._products: list[list[np.ndarray]] = []

    def barrier(self) -> None:
        """A barrier of all warps."""
        self._now += _WARPS
        # After the barrier, all warps may write bytes that were read before.
        self._reads.clear()

    def fence(self) -> None:
        """Make ordinary stores visible to tensor cores."""
        self.fenced[:] = True

    def _at(self, address: np.ndarray, size: int, what: str) -> np.ndarray:
        """The numbers of the rows of ``size`` bytes at some addresses."""
        if (address & (size - 1)).any():
            raise Fault(f"misaligned shared {what} of {size} bytes")
        if address.min() < 0 or address.max() + size > self._size:
            raise Fault(
                f"shared {what} of {size} bytes at {address.max()}, out of bounds: "
                f"the program has {self._size}"
            )
        return address // size

    def load(self, address: np.ndarray, size: int, count: int, warps: np.ndarray) -> list[Value]:
        """``count`` elements of ``size`` bytes per thread, ``[threads]`` unsigned each."""
        data = self.read(address, size * count, warps).view(UNSIGNED[8 * size])
        return [data[:, i] for i in range(count)]

    def read(self, address: np.ndarray, size: int, warps: np.ndarray) -> np.ndarray:
        """Read ``[threads, size]`` bytes."""
        at, rows = self._at(address, size, "load"), self._rows[size]
        written = self._written_where_readable(rows, at)
        if (
            written.max() >= self._now
            and ((written >= self._now) & (written != (self._now + warps)[:, None])).any()
        ):
            raise Fault("shared race: a warp reads what another wrote, with no barrier between")
        self._reads.append((rows, at, warps))
        return rows.data[at]

    def _written_where_readable(self, rows: _Rows, at: np.ndarray) -> np.ndarray:
        """The stamps of the last writes, after a check that they may be read."""
        if (self._open or self._groups) and rows.pending[at].any():
            raise Fault("a copy is still writing what is read from shared memory")
        written = rows.written[at]
        if written.min() < 0:
            raise Fault("uninitialised: shared memory is read that was never written")
        return written

    def _note_reads(self) -> None:
        """Apply the stamps of this epoch's reads."""
        for rows, at, warps in self._reads:
            mine = (self._now + warps)[:, None]
            old = rows.read[at]
            rows.read[at] = mine
            several = (rows.read[at] != mine) | ((old >= self._now) & (old != mine))
            if several.any():
                number, byte = np.nonzero(several)
                rows.read[at[number], byte] = self._now + _SEVERAL
        self._reads.clear()

    def _check_writable(self, rows: _Rows, at: np.ndarray, mine: np.ndarray) -> np.ndarray:
        """Check that no other warp has read the bytes in this epoch, and no product reads them.

        Returns:
            For each byte, whether another warp wrote it in this epoch.
        """
        if (self._operands or self._products) and rows.busy[at].any():
            raise Fault("a tensor core may still read what is written")
        self._note_reads()
        read = rows.read[at]
        if read.max() >= self._now and ((read >= self._now) & (read != mine)).any():
            raise Fault("shared race: a warp writes what another read, with no barrier between")
        written = rows.written[at]
        return (written >= self._now) & (written != mine)

    def store(
        self, address: np.ndarray, values: list[np.ndarray], size: int, warps: np.ndarray
    ) -> None:
        """Write elements of ``size`` bytes, one array per element."""
        data = np.empty((address.size, len(values)), dtype=UNSIGNED[8 * size])
        for i, value in enumerate(values):
            data[:, i] = value
        self.write(address, data.view(u1), warps)

    def write(self, address: np.ndarray, data: np.ndarray, warps: np.ndarray) -> None:
        """Write ``[threads, size]`` bytes."""
        size = data.shape[1]
        at, rows = self._at(address, size, "store"), self._rows[size]
        if (self._open or self._groups) and rows.pending[at].any():
            raise Fault("a copy is still writing what is stored to in shared memory")
        mine = (self._now + warps)[:, None]
        others = self._check_writable(rows, at, mine)
        if others.any() and (rows.data[at] != data)[others].any():
            raise Fault("shared race: two warps write the same place, with no barrier between")
        rows.data[at] = data
        if (rows.data[at] != data).any():
            raise Fault("shared race: two threads write the same place at once")
        rows.written[at] = mine
        rows.fenced[at] = False

    def copy(self, address: np.ndarray, data: np.ndarray, warps: np.ndarray) -> None:
        """Start a ``cp.async``."""
        size = data.shape[1]
        at, rows = self._at(address, size, "copy"), self._rows[size]
        if self._check_writable(rows, at, (self._now + warps)[:, None]).any():
            raise Fault("shared race: a copy over what another warp wrote, with no barrier between")
        rows.pending[at] += 1
        self._open.append(Copy(rows, at, data, warps))

    def commit_copies(self) -> None:
        """Close a group of copies."""
        self._groups.append(self._open)
        self._open = []

    def wait_copies(self, left: int) -> None:
        """Finish all groups but the last ``left``."""
        while len(self._groups) > left:
            for done in self._groups.pop(0):
                rows, at = done.rows, done.at
                rows.data[at] = done.data
                rows.written[at] = (self._now + done.warps)[:, None]
                rows.fenced[at] = False
                rows.pending[at] -= 1

    def operand(self, address: np.ndarray) -> np.ndarray:
        """16-bit elements for an asynchronous product, busy until the wait for its group."""
        at, rows = self._at(address, 2, "operand"), self._rows[2]
        if (self._written_where_readable(rows, at) >= self._now).any():
            raise Fault("shared race: a tensor core reads what was written since the last barrier")
        if not rows.fenced[at].all():
            raise Fault("a tensor core reads what was written with no fence.proxy.async since")
        rows.busy[at] += 1
        self._operands.append(at)
        return rows.data[at].view(np.uint16)[:, 0]

    def commit_products(self) -> None:
        """Close a group of asynchronous products."""
        self._products.append(self._operands)
        self._operands = []

    def wait_products(self, left: int) -> None:
        """Finish all groups of products but the last ``left``."""
        while len(self._products) > left:
            for at in self._products.pop(0):
                self._rows[2].busy[at] -= 1

    def finish(self) -> None:
        """Check that no copy is running when the program ends.

        Raises:
            Fault: A copy was never waited for.
        """
        if self._open or any(self._groups):
            raise Fault("a copy is still under way when the program ends")
