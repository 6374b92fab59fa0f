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
# So many reads of one kind are looked up together at least.
_MANY = 256


class Storage:
    """Bytes of one allocation, with who touched them in the launch.

    Attributes:
        base: Address of the first byte.
        data: ``[bytes]`` uint8, the memory itself.
        writer: Program that wrote a pair of bytes, -1 if none did; None before the first write.
        written: How many barriers the writer had passed by then.
        reader: As ``writer`` for reads, -2 for several programs.
        counters: Programs that added to the word at an offset atomically.
    """

    def __init__(self, base: int, data: np.ndarray) -> None:
        self.base = base
        self.end = base + data.size
        self.data = data
        self.views = {1: data}
        for size in (2, 4, 8):
            self.views[size] = data[: data.size // size * size].view(UNSIGNED[8 * size])
        self.writer: np.ndarray | None = None
        self.written = np.zeros(0, dtype=np.int32)
        self.reader: np.ndarray | None = None
        self.counters: dict[int, set[int]] = {}
        # Reads that no write has asked for yet: by whom, how wide, and the offsets of each.
        self._reads: dict[tuple[int, int], list[np.ndarray]] = {}

    def note_read(self, offset: np.ndarray, size: int, program: int) -> None:
        """Keep in mind that a program read ``size`` bytes at some offsets."""
        reads = self._reads.setdefault((program, size), [])
        reads.append(offset)
        if len(reads) >= _MANY:
            self._look_up_reads()

    def readers(self, pairs: np.ndarray) -> np.ndarray | None:
        """Who read some pairs of bytes so far; None if nobody read any."""
        self._look_up_reads()
        return None if self.reader is None else self.reader[pairs]

    def _look_up_reads(self) -> None:
        if not self._reads:
            return
        if self.reader is None:
            self.reader = self.pairs()
        for (program, size), offsets in self._reads.items():
            pairs = _pairs(np.concatenate(offsets), size)
            old = self.reader[pairs]
            self.reader[pairs] = np.where((old == -1) | (old == program), program, _SEVERAL)
        self._reads.clear()

    def pairs(self) -> np.ndarray:
        """Room for a program number per two bytes."""
        return np.full(-(-self.data.size // 2), -1, dtype=np.int32)


class GlobalMemory:
    """Loads and stores with checks: bounds, alignment, no two programs of a launch in conflict.

    A program may read what another wrote if an atomic addition that releases, after a barrier
    behind the write, came before one of its own to the same word that acquires.
    """

    def __init__(self) -> None:
        self._storages: list[Storage] = []
        self._bases: list[int] = []
        self._next = _FIRST
        # Barriers behind which each program knows of another's writes: by program, by other.
        self._known: dict[int, dict[int, int]] = {}
        # What one thread of a program acquired; the others know it behind the next barrier.
        self._acquired: dict[int, dict[int, int]] = {}
        # What the releases of a word made known, by its address.
        self._released: dict[int, dict[int, int]] = {}

    def add(self, data: np.ndarray) -> int:
        """Map bytes and return their address, a multiple of 4096."""
        base = self._next
        self._next += -(-(data.size + _ROOM) // _ROOM) * _ROOM
        self.map(base, data)
        return base

    def map(self, base: int, data: np.ndarray) -> None:
        """Map bytes at an address, above those that ``add`` gives or where they lie themselves."""
        number = bisect.bisect(self._bases, base)
        self._storages.insert(number, Storage(base, data))
        self._bases.insert(number, base)

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
        if (storage.writer is not None or storage.counters) and self._is_foreign(
            storage, _pairs(offset, size * count), program
        ):
            raise Fault("race: a program reads what another program of the launch wrote")
        storage.note_read(offset, size * count, program)
        at = offset // size
        return [storage.views[size][at + i] for i in range(count)]

    def store(
        self,
        address: np.ndarray,
        values: list[np.ndarray],
        size: int,
        program: int,
        barriers: int = 0,
    ) -> None:
        """Write elements of ``size`` bytes, one array per element, after so many barriers."""
        if size == 1:
            raise Fault("a store of one byte: races are followed in pairs of bytes")
        storage, offset = self._at(address, size * len(values), "store")
        pairs = _pairs(offset, size * len(values))
        if self._is_foreign(storage, pairs, program):
            raise Fault("race: two programs of the launch write the same place")
        if storage.writer is None:
            storage.writer, storage.written = storage.pairs(), storage.pairs()
        reader = storage.readers(pairs)
        if reader is not None and ((reader != -1) & (reader != program)).any():
            raise Fault("race: a program writes what another program of the launch read")
        storage.writer[pairs] = program
        storage.written[pairs] = barriers
        at = offset // size
        for i, value in enumerate(values):
            storage.views[size][at + i] = value

    def add_to_word(
        self, address: int, value: int, program: int, barriers: int, semantics: str
    ) -> int:
        """Add to 4 bytes atomically and return what they held.

        Args:
            address: Of the word.
            value: To add.
            program: Who adds.
            barriers: How many it has passed.
            semantics: ``relaxed`` or ``acq_rel``.
        """
        storage, offset = self._at(np.array([address], dtype=u8), 4, "atomic addition")
        at = int(offset[0])
        if self._is_foreign(storage, _pairs(offset, 4), program, counted=False):
            raise Fault("race: an atomic addition to what another program of the launch wrote")
        storage.counters.setdefault(at, set()).add(program)
        if semantics == "acq_rel":
            released = self._released.setdefault(address, {})
            _join(self._acquired.setdefault(program, {}), released)
            _join(released, self._known.get(program, {}))
            released[program] = barriers
        old = int(storage.views[4][at // 4])
        storage.views[4][at // 4] = (old + value) & 0xFFFFFFFF
        return old

    def barrier(self, program: int) -> None:
        """All threads of a program know what one of them acquired."""
        if acquired := self._acquired.pop(program, None):
            _join(self._known.setdefault(program, {}), acquired)

    def _is_foreign(
        self, storage: Storage, pairs: np.ndarray, program: int, counted: bool = True
    ) -> bool:
        """Whether another program wrote there (or counted) that this one need not know of."""
        known = self._known.get(program, {})
        if storage.writer is not None:
            writer = storage.writer[pairs]
            foreign = (writer >= 0) & (writer != program)
            if foreign.any():
                behind = np.array([known.get(int(w), 0) for w in writer[foreign]])
                if (storage.written[pairs][foreign] >= behind).any():
                    return True
        if counted and storage.counters:
            for at in set((np.unique(pairs) * 2 // 4 * 4).tolist()):
                if storage.counters.get(at, set()) - {program} - known.keys():
                    return True
        return False


def _join(known: dict[int, int], more: dict[int, int]) -> None:
    for program, barriers in more.items():
        known[program] = max(known.get(program, 0), barriers)


def _pairs(offset: np.ndarray, size: int) -> np.ndarray:
    half = offset >> 1
    return half if size <= 2 else half[:, None] + np.arange(size // 2)
