"""Which launches may still run while another does, and what they write.

A launch begins when everything before it on its stream has ended. One made with ``launch_pdl``
begins as soon as every program of the launch before has allowed it (``griddepcontrol``) or ended,
and since a program may allow it before it has itself waited for what came before, any launch may
still run that came behind the last one to begin in the first way. ``griddepcontrol.wait`` waits for
the launch before to end. That launch has waited too, as all must, so all others have ended as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ptx.fault import Fault
from torch.utils._python_dispatch import TorchDispatchMode

# These allocate or look at what is there; a GPU does nothing for them.
_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_")
# What CUDA copies without a kernel where the layouts allow it. Of early launches behind such nodes
# of a graph its documentation says nothing.
_COPIES = ("clone", "contiguous", "copy_", "to", "_to_copy", "pad", "constant_pad_nd", "reshape")


@dataclass(frozen=True, slots=True)
class Written:
    """What a launch writes of one allocation.

    Attributes:
        by: The launch.
        begin: Where the memory begins, in the process that emulates.
        pairs: Which pairs of bytes; those past the array are not written.
    """

    by: str
    begin: int
    pairs: np.ndarray

    def overlaps(self, addresses: np.ndarray, size: int) -> bool:
        """Whether any of ``size`` bytes from some addresses on is written."""
        first = (addresses - self.begin) >> 1
        for pair in range(max(1, size // 2)):
            at = first + pair
            inside = (at >= 0) & (at < self.pairs.size)
            if inside.any() and self.pairs[at[inside]].any():
                return True
        return False


class LaunchOrder:
    """The launches on one stream, in their order."""

    def __init__(self) -> None:
        # Of launches that may not have ended when the next one begins.
        self._unfinished: list[Written] = []
        self._copy: str | None = None
        self._is_launching = False

    @contextmanager
    def launch(self, name: str, early: bool) -> Iterator[list[Written] | None]:
        """Around a launch; gives what those that may still run write, or None: all have ended.

        Raises:
            Fault: It is early, and behind a copy.
        """
        if not early:
            self._unfinished = []
        elif self._copy is not None:
            raise Fault(f"{name} is launched early behind a copy ({self._copy}), no kernel")
        self._copy = None
        self._is_launching = True
        try:
            yield self._unfinished if early else None
        finally:
            self._is_launching = False

    def ended(self, written: Sequence[Written]) -> None:
        """Keep in mind what a launch has written."""
        self._unfinished = [*self._unfinished, *written]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take torch's operations inside for what they are on a GPU: launches between others."""
        with _Operations(self):
            yield

    def operation(self, name: str, written: Sequence[torch.Tensor]) -> None:
        """One of torch, which waits for everything before it."""
        if not self._is_launching:
            self._unfinished = [_whole(name, tensor) for tensor in written]
            self._copy = name if name in _COPIES else None


class _Operations(TorchDispatchMode):
    """Tells an order of the operations that launch something."""

    def __init__(self, order: LaunchOrder) -> None:
        super().__init__()
        self._order = order

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name not in _ALLOCATIONS and not _poisons(name, args):
            known = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
            made = [t for t in _tensors(found) if t.untyped_storage().data_ptr() not in known]
            changed = [
                value
                for argument, value in zip(func._schema.arguments, args, strict=False)
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
            changed += [kwargs[a.name] for a in func._schema.arguments if _is_out(a, kwargs)]
            if written := [*made, *_tensors(changed)]:
                self._order.operation(name, written)
        return found


def _poisons(name: str, args: Any) -> bool:
    """Whether it is the fixture ``poisoned_scratch``, which no GPU has."""
    return name == "fill_" and isinstance(args[1], float) and math.isnan(args[1])


def _is_out(argument: Any, kwargs: dict[str, Any]) -> bool:
    written = argument.alias_info is not None and argument.alias_info.is_write
    return written and argument.name in kwargs


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))


def _whole(name: str, tensor: torch.Tensor) -> Written:
    """From a tensor's first element to its last."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    size = (last + 1) * tensor.itemsize if tensor.numel() else 0
    return Written(f"torch's {name}", tensor.data_ptr(), np.ones(-(-size // 2), dtype=bool))
