"""The form of a method: a declaration, and a function from tensors to operators. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from turret.server.adapters.base import BaseModel, BaseSizes
from turret.server.adapters.checkpoint.adapter_checkpoint import AdapterCheckpoint
from turret.server.adapters.component import FindComponent, find_no_component
from turret.server.adapters.lowering.lowered import Lowered, finish
from turret.server.adapters.lowering.pieces import Assembly, Piece
from turret.server.adapters.peft_format.config_rules import MethodKeys
from turret.server.adapters.peft_format.linear_format import LinearFormat
from turret.server.adapters.peft_format.reading import Module, Reading
from turret.server.adapters.peft_format.refusals import task_warning

Pieces = Piece | Iterable[Piece]


class Lower(Protocol):
    """Turns a checkpoint into operators for the base as served."""

    def __call__(
        self,
        checkpoint: AdapterCheckpoint,
        base: BaseModel,
        max_rank: int | None = None,
        find_component: FindComponent = find_no_component,
        /,
    ) -> Lowered:
        """Lowers it.

        Args:
            checkpoint: The checkpoint as read.
            base: The base as served.
            max_rank: The maximum rank served; None for any.
            find_component: Finds an adapter that the config names as a component; raises
                AdapterComponentError if it cannot. Most methods have none and ignore it.

        Raises:
            AdapterCheckpointError: A key or tensor is unsupported or inconsistent (names all).
            AdapterMismatchError: The tensors do not fit the base (names all).
            AdapterComponentError: Some components are not registered (names all).
            BudgetExceededError: A rank over ``max_rank``.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Method(MethodKeys):
    """An adapter method whose tensors are not those of linear modules.

    A file in ``methods/`` binds one, or a ``LinearMethod``, to the name ``METHOD``.

    Attributes:
        check: Rejects an adapter for its names, shapes and dtypes, on a base of which only the
            sizes may be known.
        lower: Makes the operators.
        tasks: The config key of the number of tasks in the files, or None.
    """

    check: Callable[[AdapterCheckpoint, BaseModel | BaseSizes], object]
    lower: Lower
    tasks: str | None = None

    @property
    def integers(self) -> Set[str]:
        return self.more_integers

    def read(
        self,
        checkpoint: AdapterCheckpoint,
        base: BaseModel | BaseSizes,
        max_rank: int | None = None,
    ) -> object:
        """See ``LinearFormat.read``."""
        return self.check(checkpoint, base)


@dataclass(frozen=True, kw_only=True)
class LinearMethod(LinearFormat):
    """An adapter method that changes linear modules.

    Attributes:
        operators: Turns a module's tensors into pieces; without pieces the module is unchanged.
        order: The modules in the order in which they are computed, if that is not the base's.
        after: Checks the whole adapter, after every module is done.
        complete: Adds to the result everything that does not belong to modules.
    """

    operators: Callable[[Module], Pieces]
    order: Callable[[Reading], Iterable[Module]] | None = None
    after: Callable[[Reading], None] | None = None
    complete: Callable[[Lowered, Reading], Lowered] | None = None

    def lower(
        self,
        checkpoint: AdapterCheckpoint,
        base: BaseModel,
        max_rank: int | None = None,
        find_component: FindComponent = find_no_component,
    ) -> Lowered:
        """See ``Lower``."""
        reading = self.read(checkpoint, base, max_rank)
        assembly = Assembly(base.dtype)
        reading.find_component = find_component
        with ExitStack() as stack:
            # Run this thread's work on the device beside the steps, if there is any.
            reading.beside = partial(stack.enter_context, base.beside())
            order = reading.modules.values() if self.order is None else self.order(reading)
            for module in order:
                assembly.add(module.name, self.operators(module))
        if self.after is not None:
            self.after(reading)
        reading.findings.raise_if_any()
        components, warnings = reading.components, [*reading.warnings]
        if self.tasks is not None:
            warnings += task_warning(reading.task, reading.config[self.tasks])
        lowered = finish(
            checkpoint,
            base,
            assembly.modules(reading.modules),
            found=reading,
            ranks={rank for one in components for rank in one.ranks} if components else None,
            scalings=assembly.scalings,
            components=tuple(component.ref.digest for component in components),
            warnings=warnings,
            depends_on_base=reading.depends_on_base,
        )
        return lowered if self.complete is None else self.complete(lowered, reading)
