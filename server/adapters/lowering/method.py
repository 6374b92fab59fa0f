"""The form of a method: a declaration, and a function from tensors to operators. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from turret.server.adapters.lowering.lowered import Lowered, finish
from turret.server.adapters.lowering.pieces import Assembly, Piece
from turret.server.adapters.lowering.start import Start
from turret.server.adapters.peft_format.linear_format import LinearFormat
from turret.server.adapters.peft_format.reading import FileFormat, Module, Reading

Pieces = Piece | Iterable[Piece]


@dataclass(frozen=True, kw_only=True)
class Method(FileFormat):
    """An adapter method whose tensors are not those of linear modules.

    A file in ``methods/`` binds one, or a ``LinearMethod``, to the name ``METHOD``.

    Attributes:
        check: Reports faults of names, shapes and dtypes. Only the sizes of the base may be known.
        lower: Makes the operators from a checkpoint without such faults; see
            ``LinearMethod.lower``.
    """

    check: Callable[[Reading], object]
    lower: Callable[[Reading], Lowered]

    def inspect(self, reading: Reading) -> None:
        """See ``FileFormat.inspect``."""
        self.check(reading)


@dataclass(frozen=True, kw_only=True)
class LinearMethod(LinearFormat):
    """An adapter method that changes linear modules.

    Attributes:
        operators: Turns a module's tensors into pieces. A module without pieces is unchanged.
        order: The modules in the order in which they are computed, if that is not the base's.
        after: Checks the whole adapter, after every module is done.
        complete: Adds to the result everything that does not belong to modules.
        start: How a server trains it from scratch; None if it cannot.
    """

    operators: Callable[[Module], Pieces]
    order: Callable[[Reading], Iterable[Module]] | None = None
    after: Callable[[Reading], None] | None = None
    complete: Callable[[Lowered, Reading], Lowered] | None = None
    start: Start | None = None

    def lower(self, reading: Reading) -> Lowered:
        """Makes the operators of an adapter that ``read`` has checked against the base as served.

        Raises:
            AdapterCheckpointError: The values of tensors are inconsistent. The error lists all of
                them.
            AdapterMismatchError: Tensors do not fit the base. The error lists all of them.
            AdapterComponentError: Some components are not registered. The error lists all of them.
        """
        assembly = Assembly(reading.dtype)
        # Run this thread's work on the device, if there is any, concurrently with the steps.
        with reading.model.beside():
            order = reading.modules.values() if self.order is None else self.order(reading)
            for module in order:
                assembly.add(module.name, self.operators(module))
        if self.after is not None:
            self.after(reading)
        reading.findings.raise_if_any()
        modules = assembly.modules(reading.modules)
        lowered = finish(reading, modules, scalings=assembly.scalings)
        return lowered if self.complete is None else self.complete(lowered, reading)
