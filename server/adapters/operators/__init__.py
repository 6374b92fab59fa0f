"""The operators of adapters: each file defines one or a few, with formula, dense form and cost.

This file defines their base class. An operator that implements only ``add`` is served on every
path, in layers and in the head. ``KERNELS`` in ``server/adapters/device/__init__.py`` lists the
kernels that replace ``add`` on a path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, Self

from turret.lazy_torch import torch

# Maximum number of fp32 elements in a temporary: 4 MiB, which stay in the cache.
_PIECE_ELEMENTS = 1 << 20


class BaseRows:
    """The base's inputs and results for some rows, which operators may use.

    Args:
        x: The rows' input, ``[rows, in]``.
        product: Multiplies inputs by the base's weight, without the bias: ``[n, in]`` →
            ``[n, out]``. The bits of a row's result do not depend on the other rows.
        result: The base's product with ``x``, if it is known already.
        gain: The same adapter's gain in this module, ``[out]`` fp32; None for a gain of 1.
        scalings: The rows' scalings from a first pass, ``[rows, modules, components]`` fp32, for
            adapters with a ``TokenRouter``.
    """

    def __init__(
        self,
        x: torch.Tensor,
        product: Callable[[torch.Tensor], torch.Tensor],
        *,
        result: torch.Tensor | None = None,
        gain: torch.Tensor | None = None,
        scalings: torch.Tensor | None = None,
    ) -> None:
        self.gain = gain
        self.scalings = scalings
        self._x = x
        self._product = product
        self._result = result

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply other inputs, ``[n, in]``, by the base's weight."""
        return self._product(x)

    @property
    def result(self) -> torch.Tensor:
        """The base's product with the rows' own input, ``[rows, out]``."""
        if self._result is None:
            self._result = self._product(self._x)
        return self._result


class ServedWeight:
    """The base's weight for dense forms, dequantised at most once.

    Args:
        dequantize: Returns the weight, ``[out, in]`` fp32.
        gain: See ``BaseRows``.
    """

    def __init__(
        self, dequantize: Callable[[], torch.Tensor], gain: torch.Tensor | None = None
    ) -> None:
        self.gain = gain
        self._dequantize = dequantize

    @cached_property
    def weight(self) -> torch.Tensor:
        return self._dequantize()


class Tensors:
    """Superclass of frozen dataclasses with tensors in fields, tuples or other ``Tensors``."""

    __slots__ = ()

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Every tensor, in the order of the fields."""
        return tuple(_tensors(self))

    def with_tensors(self, tensors: Iterator[torch.Tensor]) -> Self:
        """The same object with other tensors, given in the order of ``tensors()``."""
        made = {name: _replaced(value, tensors) for name, value in _values(self)}
        return replace(self, **{name: value for name, value in made.items() if value is not None})  # type: ignore[type-var]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())


class Operator(Tensors):
    """A change ``Δ(x)`` to the output of one linear module: its tensors and properties.

    Attributes:
        name: The name in words, with ``_`` for a space.
        has_dense: Whether there is a ``ΔW`` (a gate, which is not linear in ``x``, has none).
    """

    __slots__ = ()

    name: ClassVar[str]
    has_dense: ClassVar[bool] = True

    def add(self, y: torch.Tensor, x: torch.Tensor, base: BaseRows, weight: float) -> None:
        """``y += weight · Δ(x)`` in place.

        The bits of a row's result depend only on that row, not on the other rows or their number.

        Args:
            y: ``[rows, out]``, fp32; may be some columns of a wider tensor.
            x: ``[rows, in]``, serving dtype; fp32 with gradients in training.
            base: The base's data about these rows.
            weight: The adapter's weight in the mix.
        """
        raise NotImplementedError

    def add_dense(self, total: torch.Tensor, served: ServedWeight, weight: float) -> None:
        """``total += weight · ΔW`` in place, ``[out, in]`` fp32 on the CPU; computed in fp32."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Computes and keeps values that ``add`` would otherwise compute at its first call."""

    @property
    def prepared_bytes(self) -> int:
        """The size of the results of ``prepare``, in bytes."""
        return 0

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds per token; by default, one for each number in the tensors."""
        return sum(part.numel() for part in self.tensors() if part.is_floating_point())

    def rounded(self, dtype: torch.dtype) -> Self:
        """The operator as it is served, in ``dtype``.

        Numbers in fp64 are rounded to fp32 first, as in training, so that an adapter is served with
        the bits with which it was trained.
        """
        wide = torch.promote_types(dtype, torch.float32)
        return self.with_tensors(
            (
                tensor.to(wide if tensor.dtype == torch.float64 else tensor.dtype).to(dtype)
                if tensor.is_floating_point()
                else tensor
            ).contiguous()
            for tensor in self.tensors()
        )


def _values(part: Any) -> list[tuple[str, Any]]:
    return [(name, getattr(part, name)) for name in part.__dataclass_fields__]


def _tensors(part: Any) -> Iterator[torch.Tensor]:
    for _, value in _values(part):
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, torch.Tensor):
                yield one
            elif isinstance(one, Tensors):
                yield from one.tensors()


def _replaced(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """A field's value with other tensors; None if the value contains no tensor."""
    if isinstance(value, torch.Tensor):
        return next(tensors)
    if isinstance(value, tuple) and any(isinstance(one, torch.Tensor) for one in value):
        return tuple(next(tensors) for _ in value)
    return value.with_tensors(tensors) if isinstance(value, Tensors) else None


def pieces(num_rows: int, elements: int) -> Iterator[slice]:
    """Slices of the rows whose temporaries, ``elements`` elements per row, stay in the cache."""
    step = max(1, _PIECE_ELEMENTS // max(elements, 1))
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))
