"""Executes one CTA in lock step: the operations for its instructions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ptx import tensor_cores
from ptx.fault import Fault
from ptx.global_memory import GlobalMemory
from ptx.numbers import UNSIGNED, Value, i4, i8, u1, u4
from ptx.shared_memory import SharedMemory

# The content of a register in threads that never wrote it because of a guard: a NaN.
_NEVER_WRITTEN = 0xFFF00BADFFF00BAD


@dataclass(frozen=True, slots=True)
class Launch:
    """The data that the programs of a launch share.

    Attributes:
        grid: The numbers of programs along x, y and z.
        arguments: The raw bits of the kernel's arguments.
        memory: The memory to which their pointers refer.
        threads: The number of threads of a program.
        shared_bytes: The shared memory of a program.
    """

    grid: tuple[int, int, int]
    arguments: Sequence[int]
    memory: GlobalMemory
    threads: int
    shared_bytes: int


class Cta:
    """The state of one program of a launch.

    Attributes:
        ctaid: The position in the grid.
        nctaid: The size of the grid.
        tid: Thread numbers, ``[threads]`` uint32.
        laneid: Thread numbers in the warp.
        arguments: As in ``Launch``.
        shared: The shared memory.
    """

    def __init__(self, launch: Launch, number: int, ctaid: tuple[int, int, int]) -> None:
        self._number = number
        self.ctaid = tuple(u4(n) for n in ctaid)
        self.nctaid = tuple(u4(n) for n in launch.grid)
        self.arguments = launch.arguments
        self._memory = launch.memory
        self._threads = launch.threads
        self.tid = np.arange(launch.threads, dtype=u4)
        self.laneid = self.tid % u4(32)
        self._warps = np.arange(launch.threads, dtype=i4) // 32
        self.shared = SharedMemory(launch.shared_bytes)
        self._barriers = 0

    # Threads

    def barrier(self) -> None:
        """``bar.sync`` of all threads."""
        self._barriers += 1
        self._memory.barrier(self._number)
        self.shared.barrier()

    def finish(self) -> None:
        """Check that the program may end.

        Raises:
            Fault: A copy is still in progress, or was not waited for.
        """
        self.shared.finish()

    def spread(self, value: Value) -> np.ndarray:
        """One value per thread."""
        return value if np.ndim(value) else np.full(self._threads, value)

    @staticmethod
    def taken(predicate: Value) -> bool:
        """Whether a branch is taken.

        Raises:
            Fault: Threads of the CTA disagree.
        """
        if np.all(predicate):
            return True
        if np.any(predicate):
            raise Fault("threads of a program take different branches")
        return False

    def never_written(self, bits: int) -> Value:
        """The content of a register before the first write."""
        return UNSIGNED[bits](_NEVER_WRITTEN & ((1 << bits) - 1))

    def shuffle(self, value: Value, source: Value, mode: str) -> Value:
        """``shfl.sync``: each thread's value from another lane of its warp."""
        if np.ndim(value) == 0:
            return value
        lane = source.astype(i8, copy=False) & 31
        if mode == "bfly":
            lane = self.laneid.astype(i8, copy=False) ^ lane
        elif mode == "up":
            # A source below the first lane means the thread's own value.
            own = self.laneid.astype(i8, copy=False)
            lane = np.where(own >= lane, own - lane, own)
        elif mode != "idx":
            raise NotImplementedError(f"shfl.{mode}")
        return value[self._warps * 32 + lane]

    def reduce_warps(self, value: Value, mask: Value, name: str, signed: bool) -> Value:
        """``redux.sync`` of all lanes: sum, minimum or maximum of each warp, in its threads."""
        if np.any(np.asarray(mask) != 0xFFFFFFFF):
            raise NotImplementedError("redux of some lanes of a warp")
        lanes = np.broadcast_to(value, self.tid.shape).reshape(-1, 32)
        numbers = lanes.view(np.int32) if signed else lanes
        reduce = {"add": np.sum, "min": np.min, "max": np.max}[name]
        return np.repeat(reduce(numbers, axis=1).astype(numbers.dtype), 32).view(np.uint32)

    # Memory. Guards and addresses may be scalars.

    def load(
        self, space: str, address: Value, shape: tuple[int, int], guard: Value, old: list[Value]
    ) -> list[Value]:
        """``ld``: elements of ``shape = (size, count)``.

        Threads with a false guard keep ``old``.
        """
        size, count = shape
        active = self._active(guard)
        if active is not None and not active.any():
            return old
        if np.ndim(address) == 0 and (active is None or active.all()):
            at = np.asarray(address).reshape(1)
            found = self._read(space, at, size, count, self._warps[:1])
            if space == "shared":
                # Every warp reads the value.
                at = np.repeat(at, self._threads // 32)
                self._read(space, at, size, count, self._warps[::32])
            return [value[0] for value in found]
        at = self.spread(address)
        if active is None or active.all():
            return self._read(space, at, size, count, self._warps)
        found = self._read(space, at[active], size, count, self._warps[active])
        merged = []
        for value, before in zip(found, old, strict=True):
            whole = np.array(self.spread(before))
            whole[active] = value
            merged.append(whole)
        return merged

    def _active(self, guard: Value) -> np.ndarray | None:
        return None if guard is None else self.spread(guard)

    def _read(
        self, space: str, at: np.ndarray, size: int, count: int, warps: np.ndarray
    ) -> list[Value]:
        if space == "shared":
            return self.shared.load(at.astype(i8, copy=False), size, count, warps)
        return self._memory.load(at, size, count, self._number)

    def store(
        self, space: str, address: Value, values: Sequence[Value], size: int, guard: Value
    ) -> None:
        """``st``."""
        active = self._active(guard)
        chosen = slice(None) if active is None or active.all() else active
        at = self.spread(address)[chosen]
        if not at.size:
            return
        kind = UNSIGNED[8 * size]
        data = [self.spread(value)[chosen].astype(kind) for value in values]
        if space == "shared":
            self.shared.store(at.astype(i8, copy=False), data, size, self._warps[chosen])
        else:
            self._memory.store(at, data, size, self._number, self._barriers)

    def add_to_word(
        self, address: Value, value: Value, guard: Value, old: Value, semantics: str
    ) -> Value:
        """``atom.add`` of one thread; the others keep ``old``."""
        active = self._active(guard)
        if active is None or active.sum() > 1:
            raise NotImplementedError("an atomic addition of several threads")
        result = np.array(self.spread(old), dtype=u4)
        for thread in np.flatnonzero(active):
            where, what = self.spread(address)[thread], self.spread(value)[thread]
            result[thread] = self._memory.add_to_word(
                int(where), int(what), self._number, self._barriers, semantics
            )
        return result

    def copy(self, to: Value, source: Value, size: int, held: Value, guard: Value) -> None:
        """``cp.async``: ``held`` of ``size`` bytes are read, the others become zeros."""
        active = self._active(guard)
        chosen = slice(None) if active is None or active.all() else active
        at = self.spread(to)[chosen].astype(i8, copy=False)
        if not at.size:
            return
        data = np.zeros((at.size, size), dtype=u1)
        live = self.spread(held)[chosen]
        if ((live != 0) & (live != size)).any():
            raise NotImplementedError("cp.async of a part")
        live = live != 0
        if live.any():
            width = min(size, 8)
            words = self._memory.load(
                self.spread(source)[chosen][live], width, size // width, self._number
            )
            data[live] = np.stack(words, axis=1).view(u1)
        self.shared.copy(at, data, self._warps[chosen])

    # Tensor cores

    def load_matrices(self, address: Value, count: int, transposed: bool) -> list[Value]:
        """``ldmatrix``."""
        at = self.spread(address).astype(i8, copy=False)
        return tensor_cores.load_matrices(self.shared, at, count, transposed)

    def store_matrices(self, address: Value, values: Sequence[Value], transposed: bool) -> None:
        """``stmatrix``."""
        at, registers = (
            self.spread(address).astype(i8, copy=False),
            [self.spread(v) for v in values],
        )
        tensor_cores.store_matrices(self.shared, at, registers, transposed)

    def multiply(
        self, products: Sequence[tuple[list[Value], list[Value], list[Value]]], kind: str
    ) -> list[Value]:
        """``mma.sync`` for several independent registers ``(a, b, c)``; returns all sums."""
        registers = [np.empty((len(products), n, self._threads), dtype=u4) for n in (4, 2, 4)]
        for number, product in enumerate(products):
            for rows, values in zip(registers, product, strict=True):
                for row, value in zip(rows[number], values, strict=True):
                    row[:] = value
        return list(tensor_cores.multiply(registers, kind).reshape(-1, self._threads))

    def multiply_group(
        self,
        a: Sequence[Value] | Value,
        b: Value,
        d: Sequence[Value],
        options: tuple[str, int, bool, bool, Value],
    ) -> list[Value]:
        """``wgmma.mma_async``."""
        if isinstance(a, list):
            a = [np.ascontiguousarray(self.spread(r)) for r in a]
        before = [np.ascontiguousarray(self.spread(r)) for r in d]
        return tensor_cores.multiply_group(self.shared, a, b, before, options)
