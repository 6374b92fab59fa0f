"""Compiles Triton kernels for a GPU and executes their PTX in the emulator, on CPU tensors."""

from __future__ import annotations

import importlib
import itertools
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from ptx.addresses import reached
from ptx.cta import Cta, Launch
from ptx.fault import Fault
from ptx.global_memory import GlobalMemory
from ptx.program import parse
from ptx.translation import Translation
from triton import knobs
from triton.runtime.jit import JITFunction

from turret.kernels.gpu import common as tuning

# ``small`` uses the tiles of the interpreter's tests, so that small shapes take several steps;
# ``device`` uses a GPU's tiles. Both use few programs, so that each loops over its work list.
TILES = {
    "small": replace(tuning.tuning(torch.device("cpu")), inline_ptx=True),
    "device": tuning.Tuning(programs=3),
}

_PTX_ONLY = "ptx-only"


def bench_module(name: str) -> Any:
    """A module of bench/, which is a folder of scripts."""
    folder = str(Path(__file__).resolve().parents[3] / "bench")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)


class Launcher:
    """Replaces Triton's launcher.

    Attributes:
        edit: Changes the PTX before it is executed, to plant faults.
        backwards: Whether to run the programs of a grid from the last to the first.
        launches: The number of launches of each kernel.
    """

    def __init__(self, target: str, edit: Callable[[str], str] | None = None) -> None:
        """Emulate ``target``: ``sm_80`` or ``sm_90``."""
        self._compilations = bench_module("cuda.compilations")
        self._target = self._compilations.TARGETS[target]
        self.edit = edit
        self.backwards = False
        self.launches: dict[str, int] = {}
        self._compiled: dict[Any, tuple[Translation, int, int]] = {}

    def launch(self, function: Any, args: tuple[Any, ...], grid: Any, keywords: Any) -> None:
        """Compile for the arguments, and run every program of the grid in turn.

        Raises:
            Fault: The kernel broke a rule; the message names kernel, program and instruction.
        """
        name = function.__name__
        self._run(function, args, grid, keywords, GlobalMemory())
        self.launches[name] = self.launches.get(name, 0) + 1

    def _run(
        self, function: Any, args: tuple[Any, ...], grid: Any, keywords: Any, memory: GlobalMemory
    ) -> None:
        compilation = self._compilations.record(function, args, keywords)
        if compilation not in self._compiled:
            self._compiled[compilation] = self._translate(compilation)
        translation, threads, shared_bytes = self._compiled[compilation]
        name = function.__name__
        values = self._compilations.bound(function, args, keywords)
        bases: dict[int, int] = {}
        kinds = dict(compilation.signature)
        raw = [_bits(values[p], kinds[p], memory, bases) for p in kinds]
        for storage in reached():
            memory.map(storage.data_ptr(), _bytes(storage))
        # Triton's own arguments: pointers to scratch memory, for kernels that need it.
        raw += [0] * 4
        sizes: Any = grid(values) if callable(grid) else grid
        x, y, z = (*sizes, 1, 1)[:3]
        launch = Launch((x, y, z), raw, memory, threads, shared_bytes)
        with np.errstate(all="ignore"):
            places = list(enumerate(itertools.product(range(z), range(y), range(x))))
            for number, place in reversed(places) if self.backwards else places:
                cta = Cta(launch, number, (place[2], place[1], place[0]))
                try:
                    translation.run(cta)
                except Fault as fault:
                    raise Fault(f"{name}, program {place[::-1]}: {fault}") from fault

    def _translate(self, compilation: Any) -> tuple[Translation, int, int]:
        compiled = compilation.compile(self._target)
        ptx = compiled.asm["ptx"]
        program = parse(ptx if self.edit is None else self.edit(ptx))
        return Translation(program), program.num_threads, max(16, int(compiled.metadata.shared))


def _bits(value: Any, kind: str, memory: GlobalMemory, bases: dict[int, int]) -> int:
    """The raw bits of an argument."""
    if not isinstance(value, torch.Tensor):
        if kind == "fp32":
            return struct.unpack("<I", struct.pack("<f", value))[0]
        return int(value)
    storage = value.untyped_storage()
    key = storage.data_ptr()
    if key not in bases:
        bases[key] = memory.add(_bytes(storage))
    return bases[key] + int(value.storage_offset()) * value.itemsize


def _bytes(storage: torch.UntypedStorage) -> np.ndarray:
    view = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]
    return view.numpy()


@contextmanager
def _without_assembler() -> Iterator[None]:
    """Make Triton stop at PTX, and separate its cache from that of full compilations."""

    def hook(*arguments: Any) -> tuple[str, str] | None:
        if not arguments:
            # Newer versions of Triton call the hook without arguments, for the cache key.
            return _PTX_ONLY, _PTX_ONLY
        _, stages, *_ = arguments
        stages["cubin"] = lambda ptx, metadata: b""
        return None

    # Any, because Triton calls the hook with other argument names than its protocol declares.
    runtime: Any = knobs.runtime

    with knobs.cache.scope(), knobs.runtime.scope():
        folder = Path(knobs.cache.dir)
        knobs.cache.dir = str(folder if folder.name == _PTX_ONLY else folder / _PTX_ONLY)
        runtime.add_stages_inspection_hook = hook
        yield


@contextmanager
def emulated(
    target: str,
    *,
    tiles: str = "device",
    edit: Callable[[str], str] | None = None,
) -> Iterator[Launcher]:
    """Run the kernels that are launched within the block in the emulator, on CPU tensors.

    Args:
        target: ``sm_80`` or ``sm_90``.
        tiles: ``small`` or ``device``.
        edit: See ``Launcher``.
    """
    launcher = Launcher(target, edit)

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        launcher.launch(self, args, grid, keywords)

    with (
        patch.object(JITFunction, "run", run),
        patch.object(tuning, "_INTERPRETER", TILES[tiles]),
        _without_assembler(),
    ):
        tuning.tuning.cache_clear()
        try:
            yield launcher
        finally:
            tuning.tuning.cache_clear()
