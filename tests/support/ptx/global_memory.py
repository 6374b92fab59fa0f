"""Device memory: the storages of a launch's tensors at separate addresses."""

from __future__ import annotations

import bisect

import numpy as np
from ptx.fault import Fault
from ptx.numbers import UNSIGNED, Value, i8, u8

# The first address, and the minimum distance of storages.
_FIRST = 1 << 32
_ROOM = 1 << 12
# The reader of bytes that several programs have read.
_SEVERAL = -2
# Minimum number of reads of one kind that are looked up together.
_MANY = 256


class Storage:
    """The bytes of one allocation, with the programs that accessed them in the launch.

    Attributes:
        base: The address of the first byte.
        data: ``[bytes]`` uint8, the memory itself.
        writer: The program that wrote a pair of bytes, -1 for none; None before the first write.
        written: The number of barriers that the writer had passed.
        reader: Like ``writer`` for reads, with -2 for several programs.
        counters: The programs that added atomically to the word at an offset.
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
        # Reads that no write has checked yet: offsets by program and width.
        self._reads: dict[tuple[int, int], list[np.ndarray]] = {}

    def note_read(self, offset: np.ndarray, size: int, program: int) -> None:
        """Record that a program read ``size`` bytes at some offsets."""
        reads = self._reads.setdefault((program, size), [])
        reads.append(offset)
        if len(reads) >= _MANY:
            self._look_up_reads()

    def readers(self, pairs: np.ndarray) -> np.ndarray | None:
        """The readers of some pairs of bytes so far; None without reads."""
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
        """An array with a program number per two bytes."""
        return np.full(-(-self.data.size // 2), -1, dtype=np.int32)


class GlobalMemory:
    """Loads and stores with checks of bounds, alignment, and conflicts of a launch's programs.

    A program may read another one's write if the writer, after a barrier, did a releasing atomic
    addition, and the reader then did an acquiring one to the same word.

    For example, program 0 stores a value, passes its first barrier, and adds to a counter, whose
    entry in ``_released`` becomes ``{0: 1}``. Program 1 adds to the counter, so its ``_acquired``
    becomes ``{0: 1}``, and at its next barrier its ``_known``. Now it may load the value.
    """

    def __init__(self) -> None:
        self._storages: list[Storage] = []
        self._bases: list[int] = []
        self._next = _FIRST
        # The barriers up to which each program knows another one's writes: by program, by other.
        self._known: dict[int, dict[int, int]] = {}
        # Knowledge that one thread of a program acquired; the others get it at the next barrier.
        self._acquired: dict[int, dict[int, int]] = {}
        # Knowledge that was released to a word, by its address.
        self._released: dict[int, dict[int, int]] = {}

    def add(self, data: np.ndarray) -> int:
        """Map bytes, and return their address, a multiple of 4096."""
        base = self._next
        self._next += -(-(data.size + _ROOM) // _ROOM) * _ROOM
        self.map(base, data)
        return base

    def map(self, base: int, data: np.ndarray) -> None:
        """Map bytes at an address: one from ``add``, or their own, which is above those."""
        number = bisect.bisect(self._bases, base)
        self._storages.insert(number, Storage(base, data))
        self._bases.insert(number, base)

    def _at(self, address: np.ndarray, size: int, what: str) -> tuple[Storage, np.ndarray]:
        """The storage that all threads access, and their offsets in it."""
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
        """Write elements of ``size`` bytes, one array per element.

        ``barriers`` is the number of barriers that the program has passed.
        """
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
        """Add to 4 bytes atomically, and return their old value.

        Args:
            address: The address of the word.
            value: The value to add.
            program: The adding program.
            barriers: The number of barriers that it has passed.
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
        """Share the knowledge that one thread acquired with all threads of the program."""
        if acquired := self._acquired.pop(program, None):
            _join(self._known.setdefault(program, {}), acquired)

    def _is_foreign(
        self, storage: Storage, pairs: np.ndarray, program: int, counted: bool = True
    ) -> bool:
        """Whether another program wrote or counted there without this one's knowledge."""
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
