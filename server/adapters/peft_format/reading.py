"""An adapter while it is being read, and each of its linear modules.

A method's checks use names, shapes and dtypes, which the entries of a header have as well. The
method's function from tensors to operators gets everything from a ``Module``.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from turret.lazy_torch import torch
from turret.server.adapters.base import BaseModel, BaseModule, BaseSizes, WeightRows
from turret.server.adapters.checkpoint import AdapterCheckpoint, Findings
from turret.server.adapters.component import Component, FindComponent, find_no_component
from turret.server.adapters.peft_format.config_rules import MethodKeys
from turret.server.adapters.peft_format.refusals import check_task
from turret.server.adapters.peft_format.targets import Targets
from turret.server.basics.work import is_out_of_memory
from turret.server.words import Text, say

# The number of rows of W + sBA in memory at once: 1024 x 14336 in fp32 is 59 MB. An embedding has a
# column per token, so it gets fewer rows.
_ROWS_PER_BLOCK = 1024
_ELEMENTS_PER_BLOCK = 1 << 24


def dora_gain(
    magnitude: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, weight: WeightRows
) -> torch.Tensor:
    """DoRA's gain (arXiv 2402.09353): ``m / ‖W + s·B A‖`` per output row.

    Args:
        magnitude: ``m``, ``out_features`` values in any shape.
        a: ``[rank, in_features]``.
        b: ``[out_features, rank]``, unscaled.
        scaling: ``s``.
        weight: ``W`` as it is served, ``[out_features, in_features]``; not modified. The norms are
            computed on its device, a block of rows at a time.

    Returns:
        ``[out_features]``, fp32, on the CPU. Rows of norm 0 give inf or NaN, which the caller
        rejects.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    # The norms count as constants in gradients, as in the paper (section 4.3).
    a, b = (factor.detach().to(weight.device, wide) for factor in (a, b))
    size = max(1, min(_ROWS_PER_BLOCK, _ELEMENTS_PER_BLOCK // weight.shape[1]))
    norms = []
    for start in range(0, weight.shape[0], size):
        rows = slice(start, start + size)
        merged = torch.addmm(weight[rows].to(wide), b[rows], a, alpha=scaling)
        norms.append(torch.linalg.vector_norm(merged, dim=1, dtype=torch.float64))
    norm = torch.cat(norms).cpu()
    return (magnitude.reshape(-1).to(torch.float64) / norm).to(torch.float32)


T = TypeVar("T")
Base = BaseModel | BaseSizes
TensorMap = Mapping[str, Any]


class Reading:
    """An adapter while it is being read: the properties that its modules share.

    The parts of a reading have only weak references to it, because a cycle would keep the adapter's
    tensors until the next full garbage collection.

    Attributes:
        checkpoint: The adapter's files.
        config: ``adapter_config.json``.
        path: The adapter's name in messages.
        base: The adapter's base.
        task: The task, if the files have several.
        modules: The adapted modules by path, in the base's order.
        shared: Tensors that belong to no module.
        targets: The configured rank and alpha of every adapted module.
        biases: Biases that replace those of the base, by module path.
        ranks: The rank that is served, by module path; empty for a method without ranks.
        findings: The faults found.
        warnings: Warnings for the server's operator, in order.
        depends_on_base: Whether the base's weights or biases were used.
        find_component: Finds an adapter that the config names as a component.
        components: The components that were found.
    """

    def __init__(self, checkpoint: AdapterCheckpoint, base: Base, findings: Findings) -> None:
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.path = checkpoint.path
        self.base = base
        self.task = 0
        self.modules: dict[str, Module] = {}
        self.shared: dict[str, Any] = {}
        self.targets = Targets(frozenset(), {}, {})
        self.biases: dict[str, torch.Tensor] = {}
        self.ranks: dict[str, int] = {}
        self.findings = findings
        self.warnings: dict[Text, None] = {}
        self.depends_on_base = False
        self.find_component: FindComponent = find_no_component
        self.components: Sequence[Component] = ()
        self._made: dict[object, Any] = {}
        self._wide: dict[str, torch.Tensor] = {}

    @property
    def inputs(self) -> int:
        """The largest number of inputs of a module."""
        return max(module.inputs for module in self.modules.values())

    @property
    def outputs(self) -> int:
        """The largest number of outputs of a module."""
        return max(module.outputs for module in self.modules.values())

    @property
    def rank(self) -> int:
        """The config's rank."""
        return self.config["r"]

    def fault(self, name: str, why: Text) -> None:
        """Reports a fault of a key or of a tensor, by its full name."""
        self.findings.add(name, why)

    @property
    def model(self) -> BaseModel:
        """The base as served, which is not available when only a header is checked."""
        assert isinstance(self.base, BaseModel)
        return self.base

    @property
    def dtype(self) -> torch.dtype:
        """The serving dtype."""
        return self.model.dtype

    def wide(self, name: str) -> torch.Tensor:
        """A shared tensor in fp32 or wider."""
        if name not in self._wide:
            found = self.shared[name]
            self._wide[name] = found.to(torch.promote_types(found.dtype, torch.float32))
        return self._wide[name]

    def once(self, make: Callable[[Reading], T]) -> T:
        """The result of ``make`` for this adapter, computed at the first call."""
        if make not in self._made:
            self._made[make] = make(weakref.proxy(self))
        return self._made[make]

    def warn(self, text: Text) -> None:
        """Adds a warning for the server's operator."""
        self.warnings.setdefault(text)


class Module:
    """One adapted module: its sizes, its tensors and its config.

    Attributes:
        name: The module's path.
        inputs: Columns of its weight.
        outputs: Rows of its weight.
        has_bias: Whether the base's module has a bias; None if that is not known yet.
        rank: The configured rank, or the one that the tensors have.
        tensors: Tensors by role; entries of a header have only a shape and a dtype.
        reading: The whole adapter.
    """

    def __init__(self, name: str, rank: int, tensors: TensorMap, reading: Reading) -> None:
        size = reading.base.modules[name]
        self.name, self.rank, self.tensors = name, rank, tensors
        self.reading: Reading = weakref.proxy(reading)
        self.inputs, self.outputs = size.in_features, size.out_features
        self.has_bias = size.has_bias
        # Role of the tensor that ``rank`` was taken from, if it is not the config's rank.
        self.ranked_by = ""

    @property
    def config(self) -> Mapping[str, Any]:
        return self.reading.config

    @property
    def findings(self) -> Findings:
        return self.reading.findings

    def __contains__(self, role: str) -> bool:
        return role in self.tensors

    def extent(self, role: str, axis: int) -> int:
        """A tensor's size in a dimension; 0 if there is no such tensor or dimension."""
        shape = self.tensors[role].shape if role in self.tensors else ()
        return shape[axis] if -len(shape) <= axis < len(shape) else 0

    def fault(self, field: str, why: Text) -> None:
        """Reports a fault of a tensor, by its role."""
        self.findings.add(f"{self.name}.{field}", why)

    def misfit(self, why: Text, field: str = "") -> None:
        """Reports that the module, or one of its tensors, does not fit the base."""
        self.findings.mismatch(f"{self.name}.{field}" if field else self.name, why)

    def misfit_width(self, inputs: int, outputs: int) -> None:
        """Reports an update whose inputs and outputs are not those of the base's module."""
        sizes = {"base_inputs": self.inputs, "base_outputs": self.outputs}
        self.misfit(say("WRONG_WIDTH", inputs=inputs, outputs=outputs, **sizes))

    # The members below need tensors with values, and the base as served.

    @property
    def scaling(self) -> float:
        """``alpha / rank``, or ``alpha / sqrt(rank)``, as configured."""
        return self.reading.targets.scaling(self.name)

    @property
    def shared(self) -> TensorMap:
        """Tensors that all modules share, by full name."""
        return self.reading.shared

    def wide(self, *roles: str) -> tuple[torch.Tensor, ...]:
        """Tensors in fp32, or wider if the first one is."""
        dtype = torch.promote_types(self.tensors[roles[0]].dtype, torch.float32)
        return tuple(self.tensors[role].to(dtype) for role in roles)

    def exact(self, role: str) -> torch.Tensor:
        """A tensor in fp64."""
        return self.tensors[role].double()

    def once(self, make: Callable[[Reading], T]) -> T:
        """The result of ``make`` for the whole adapter, computed at the first call by a module."""
        return self.reading.once(make)

    def warn(self, text: Text) -> None:
        """Adds a warning for the server's operator."""
        self.reading.warnings.setdefault(text)

    def rows(self) -> WeightRows:
        """The base's weight as served, for reading block by block on its device."""
        return self._served().rows()

    def decomposed(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The singular value decomposition of the base's weight as served, fp32 like PEFT's.

        The results are on the base's device, or on the CPU if that device has too little memory.
        """
        rows = self.rows()
        weight = rows[0 : rows.shape[0]].float()
        try:
            return torch.linalg.svd(weight, full_matrices=False)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        return torch.linalg.svd(weight.cpu(), full_matrices=False)

    def weight(self) -> torch.Tensor:
        """The whole weight of the base as served. Use one at a time, and do not write to it."""
        return self._served().dequantize()

    def bias(self) -> torch.Tensor | None:
        """The base's bias, ``[out]`` fp32 on the CPU."""
        bias = self._served().bias if self.has_bias else None
        return None if bias is None else bias.float().cpu()

    def _served(self) -> BaseModule:
        self.reading.depends_on_base = True
        return self.reading.model.modules[self.name]


# Converts a checkpoint to the form that a method declares.
Prepare = Callable[[AdapterCheckpoint, Base, Findings], AdapterCheckpoint]


@dataclass(frozen=True, kw_only=True)
class FileFormat(MethodKeys, ABC):
    """The form of a method's checkpoints.

    Attributes:
        prepare: Converts a checkpoint to the declared form before it is read.
    """

    prepare: Prepare | None = None

    def read(
        self,
        checkpoint: AdapterCheckpoint,
        base: Base,
        max_rank: int | None = None,
        findings: Findings | None = None,
    ) -> Reading:
        """Checks a checkpoint against itself, the base and the server's limit.

        Args:
            checkpoint: The checkpoint, with tensors or with entries of a header.
            base: The base as served, or the known facts about it.
            max_rank: The maximum rank; None for any.
            findings: The faults that were found in other parts of the checkpoint.

        Raises:
            AdapterCheckpointError: The checkpoint is unsupported or inconsistent. The error lists
                all invalid keys and tensors.
            AdapterMismatchError: The checkpoint is valid, but for another base. The error lists
                every module that does not fit.
            BudgetExceededError: A rank is above ``max_rank``.
        """
        found = findings or Findings(checkpoint.path, base.name)
        if self.prepare is not None:
            checkpoint = self.prepare(checkpoint, base, found)
        reading = Reading(checkpoint, base, found)
        self.check_config(reading.config, found)
        self.inspect(reading)
        if self.tasks is not None:
            reading.task = check_task(checkpoint, self.tasks, found)
        found.raise_if_any()
        if self.tasks is not None and (count := reading.config[self.tasks]) > 1:
            reading.warn(say("IS_TASK", task=reading.task, count=count))
        self.conclude(reading, max_rank)
        return reading

    @abstractmethod
    def inspect(self, reading: Reading) -> None:
        """Reports names, shapes and dtypes of tensors that do not agree with config and base."""

    def conclude(self, reading: Reading, max_rank: int | None) -> None:
        """Checks properties, such as ranks, that are defined only if nothing else is wrong."""
