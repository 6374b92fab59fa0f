"""Shapes of tensors, declared in terms of the module they belong to. No torch.

``IN``, ``OUT`` and ``R`` are a module's inputs, outputs and rank, and ``key("k")`` is a number of
the config. They can be added, multiplied and divided: ``(key("k"), IN / key("k"), R)``. A division
with a remainder means that the adapter does not fit the module.

Of a tensor that all modules share, ``IN`` and ``OUT`` are those of the widest module, and ``R`` is
the config's rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from turret.server.words import Text, say


class Misfit(Exception):
    """Raised when the sizes of base and adapter do not go together."""

    def __init__(self, why: Text) -> None:
        super().__init__(why)
        self.why = why


class Stop(Exception):
    """Raised when the fault was reported and the module needs no further checks."""


class Dim:
    """An extent of a tensor.

    Attributes:
        text: How it is written, for people.
        of: Computes it for a module.
        what: Name of the counted things, for messages.
        is_served: Whether the base decides it: a tensor of another size may be sound, but is for
            another base. Any other extent follows from the config or from another tensor.
    """

    def __init__(
        self, text: str, of: Callable[[Any], int], what: str = "", *, is_served: bool = False
    ) -> None:
        self.text, self.of, self.what, self.is_served = text, of, what, is_served

    def __add__(self, other: Dim | int) -> Dim:
        return self._with(other, "+", lambda m, a, b: a.of(m) + b.of(m))

    def __mul__(self, other: Dim | int) -> Dim:
        return self._with(other, "·", lambda m, a, b: a.of(m) * b.of(m))

    def __rmul__(self, other: int) -> Dim:
        return _dim(other)._with(self, "·", lambda m, a, b: a.of(m) * b.of(m))

    def __truediv__(self, other: Dim | int) -> Dim:
        return self._with(other, "/", _divided)

    def _with(self, other: Dim | int, sign: str, of: Callable[[Any, Dim, Dim], int]) -> Dim:
        both = self, _dim(other)
        return Dim(
            sign.join(one.text for one in both),
            lambda module: of(module, *both),
            is_served=any(one.is_served for one in both),
        )


def _dim(value: Dim | int) -> Dim:
    return value if isinstance(value, Dim) else Dim(str(value), lambda _: value)


def _divided(module: Any, one: Dim, other: Dim) -> int:
    size, by = one.of(module), other.of(module)
    if by < 1 or size % by:
        raise Misfit(say("NOT_DIVISIBLE", size=size, what=one.what, by=by))
    return size // by


IN = Dim("in", lambda m: m.inputs, "inputs", is_served=True)
OUT = Dim("out", lambda m: m.outputs, "outputs", is_served=True)
R = Dim("r", lambda m: m.rank, "ranks")


def key(name: str, default: int | None = None) -> Dim:
    """A number in the config."""
    return Dim(name, lambda m: m.config[name] if default is None else m.config.get(name, default))


def extent(role: str, axis: int) -> Dim:
    """The size of another tensor of the module in a dimension; 0 without that tensor."""
    return Dim(f"{role}[{axis}]", lambda m: m.extent(role, axis))


def size_of(dim: Dim | int, module: Any) -> int:
    """An extent as a number."""
    return dim if isinstance(dim, int) else dim.of(module)


def is_served(dim: Dim | int) -> bool:
    """Whether the base decides an extent."""
    return isinstance(dim, Dim) and dim.is_served


# When a tensor is expected: if a config key is set, or if a function of the module is true.
If = str | Callable[[Any], Any]
Shape = tuple[Dim | int, ...]


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a method, as a declaration.

    Attributes:
        shapes: The shapes that it may have; empty for any shape.
        choose: Computes the shape instead, or None if the module has no such tensor.
        condition: When it is there: always if None.
        is_optional: Whether it may be missing.
        may_be_integers: Whether it may hold integers.
        must_be_integers: Whether it has to.
        also_named: Other endings of its name.
    """

    shapes: tuple[Shape, ...]
    choose: Callable[[Any], Shape | None] | None = None
    condition: If | None = None
    is_optional: bool = False
    may_be_integers: bool = False
    must_be_integers: bool = False
    also_named: tuple[str, ...] = ()

    @property
    def switch(self) -> str | None:
        """The config key that it goes with, if there is one."""
        return self.condition if isinstance(self.condition, str) else None

    def wanted(self, module: Any) -> tuple[Shape, ...] | None:
        """The shapes that it may have in a module; None where it must not be there."""
        if not self._is_wanted(module):
            return None
        if self.choose is None:
            return self.shapes
        shape = self.choose(module)
        return None if shape is None else (shape,)

    def sizes(self, module: Any) -> list[tuple[int, ...]] | None:
        """The wanted shapes as numbers."""
        shapes = self.wanted(module)
        if shapes is None:
            return None
        return [tuple(size_of(dim, module) for dim in shape) for shape in shapes]

    def _is_wanted(self, module: Any) -> bool:
        if self.condition is None:
            return True
        if isinstance(self.condition, str):
            return bool(module.config.get(self.condition))
        return bool(self.condition(module))


# A shape, a function that returns it for a module, or a full declaration.
Declared = Shape | Tensor | Callable[[Any], Shape | None]


def tensor(declared: Declared) -> Tensor:
    """A declaration as a ``Tensor``."""
    if isinstance(declared, Tensor):
        return declared
    return Tensor((), choose=declared) if callable(declared) else Tensor((declared,))


def when(condition: If, shape: Declared) -> Tensor:
    """A tensor that is there only under a condition."""
    return replace(tensor(shape), condition=condition)


def either(*shapes: Shape) -> Tensor:
    """A tensor with one of several shapes."""
    return Tensor(shapes)


def indices(*shape: Dim | int, or_floats: bool = False) -> Tensor:
    """A tensor of integers, which some versions of PEFT may save as floating-point numbers."""
    return Tensor((shape,), may_be_integers=True, must_be_integers=not or_floats)


# A tensor of any shape, which the method checks itself.
ANY = Tensor(())
# A tensor that training needs and inference does not.
UNREAD = Tensor((), is_optional=True)


def optionally(shape: Declared) -> Tensor:
    """A tensor that may be missing."""
    return replace(tensor(shape), is_optional=True)
