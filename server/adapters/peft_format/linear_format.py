"""The checkpoint format of methods that adapt linear modules, and its check. Needs no torch.

A method declares its keys and tensors as a ``LinearFormat``. The check reads a config and tensors,
or only the entries of a safetensors header. It uses names, shapes and dtypes, but no values, so the
server can check an adapter at startup before it loads the model. Loading an adapter runs the same
check.

The tensors determine the updates, and the config their scaling. If the two disagree, it is unknown
which function was trained, so the checkpoint is rejected.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from turret.server.adapters.adapter import TENSORS_FILE
from turret.server.adapters.checkpoint import Findings
from turret.server.adapters.peft_format.config_rules import (
    Check,
    Rules,
    Used,
    fault_of_bool,
    fault_of_modules_to_save,
    fault_of_number,
    fault_of_rank,
    optional,
)
from turret.server.adapters.peft_format.reading import Base, FileFormat, Module, Reading, TensorMap
from turret.server.adapters.peft_format.refusals import (
    causes_of_mismatch,
    check_rank,
    is_lycoris,
    why_unknown,
)
from turret.server.adapters.peft_format.targets import (
    Targets,
    fault_of_alpha_pattern,
    fault_of_layer_indexes,
    fault_of_module_selector,
    fault_of_optional_selector,
    fault_of_rank_pattern,
    resolve_targets,
)
from turret.server.words import Text, say

# In the declared shapes, ``IN``, ``OUT`` and ``R`` are the inputs, outputs and rank of the tensor's
# module, and ``key("k")`` is a number of the config. They can be added, multiplied and divided:
# ``(key("k"), IN / key("k"), R)``. A division with a remainder means that the adapter does not fit
# the module.
#
# For a tensor that all modules share, ``IN`` and ``OUT`` are those of the widest module, and ``R``
# is the config's rank.


class Misfit(Exception):
    """Raised when the sizes of base and adapter do not match."""

    def __init__(self, why: Text) -> None:
        super().__init__(why)
        self.why = why


class StopChecks(Exception):
    """Raised when a fault was reported and the module needs no further checks."""


@dataclass(frozen=True, eq=False)
class Dim:
    """An extent of a tensor.

    Attributes:
        of: Computes the extent for a module.
        what: Name of the counted things, for messages.
        is_served: Whether the base determines the extent. A tensor of another size may then be
            valid, but for another base. Any other extent follows from the config or from another
            tensor.
    """

    of: Callable[[Any], int]
    what: str = ""
    is_served: bool = False

    def __add__(self, other: Dim | int) -> Dim:
        return self._with(other, operator.add)

    def __mul__(self, other: Dim | int) -> Dim:
        return self._with(other, operator.mul)

    __rmul__ = __mul__

    def __truediv__(self, other: Dim | int) -> Dim:
        def divided(size: int, by: int) -> int:
            if by < 1 or size % by:
                raise Misfit(say("NOT_DIVISIBLE", size=size, what=self.what, by=by))
            return size // by

        return self._with(other, divided)

    def _with(self, other: Dim | int, of: Callable[[int, int], int]) -> Dim:
        if isinstance(other, int):
            return Dim(lambda m: of(self.of(m), other), is_served=self.is_served)
        is_served = self.is_served or other.is_served
        return Dim(lambda m: of(self.of(m), other.of(m)), is_served=is_served)


IN = Dim(lambda m: m.inputs, "inputs", is_served=True)
OUT = Dim(lambda m: m.outputs, "outputs", is_served=True)
R = Dim(lambda m: m.rank, "rank components")


def key(name: str, default: int | None = None) -> Dim:
    """A number in the config."""
    return Dim(lambda m: m.config[name] if default is None else m.config.get(name, default))


def extent(role: str, axis: int) -> Dim:
    """The size of another tensor of the module in a dimension; 0 without that tensor."""
    return Dim(lambda m: m.extent(role, axis))


# The condition for a tensor: a config key that is set, or a function of the module that is true.
If = str | Callable[[Any], Any]
Shape = tuple[Dim | int, ...]


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a method, as a declaration.

    Attributes:
        shapes: The shapes that it may have; empty for any shape.
        choose: Computes the shape instead; returns None if the module has no such tensor.
        condition: Determines whether a module has the tensor; None for always.
        is_optional: Whether it may be missing.
        may_be_integers: Whether it may hold integers.
        must_be_integers: Whether it must hold integers.
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
        """The config key that switches it on, if there is one."""
        return self.condition if isinstance(self.condition, str) else None

    def wanted(self, module: Any) -> tuple[Shape, ...] | None:
        """The shapes that it may have in a module; None if the module must not have it."""
        if not self._is_wanted(module):
            return None
        if self.choose is None:
            return self.shapes
        shape = self.choose(module)
        return None if shape is None else (shape,)

    def sizes(self, module: Any) -> list[tuple[int, ...]] | None:
        """The result of ``wanted`` as numbers."""
        shapes = self.wanted(module)
        if shapes is None:
            return None
        return [
            tuple(dim if isinstance(dim, int) else dim.of(module) for dim in shape)
            for shape in shapes
        ]

    def _is_wanted(self, module: Any) -> bool:
        if self.condition is None:
            return True
        if isinstance(self.condition, str):
            return bool(module.config.get(self.condition))
        return bool(self.condition(module))


# A shape, a function that returns it for a module, or a full declaration.
DeclaredShape = Shape | Tensor | Callable[[Any], Shape | None]


def tensor(declared: DeclaredShape) -> Tensor:
    """A declaration as a ``Tensor``."""
    if isinstance(declared, Tensor):
        return declared
    return Tensor((), choose=declared) if callable(declared) else Tensor((declared,))


def when(condition: If, shape: DeclaredShape) -> Tensor:
    """A tensor that exists only under a condition."""
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


def optionally(shape: DeclaredShape) -> Tensor:
    """A tensor that may be missing."""
    return replace(tensor(shape), is_optional=True)


_BIAS = "bias"
# PEFT saves the bias of a targeted module under base_layer, and any other bias under its usual
# name.
_BIAS_SUFFIXES = (".base_layer.bias", ".bias")
# Keys with which PEFT's configs select modules. Some methods do not have all of them.
SELECTION: Mapping[str, Check] = {
    "target_modules": fault_of_module_selector,
    "exclude_modules": fault_of_optional_selector,
    "layers_to_transform": fault_of_layer_indexes,
    "layers_pattern": fault_of_optional_selector,
    "modules_to_save": fault_of_modules_to_save,
    # For Conv1D bases such as GPT-2. On linear modules PEFT sets it to false and then loads the
    # same weights; the adapter gets a warning.
    "fan_in_fan_out": optional(fault_of_bool),
}
PATTERNS: Mapping[str, Check] = {
    "rank_pattern": fault_of_rank_pattern,
    "alpha_pattern": fault_of_alpha_pattern,
}
# Maps the full names of tensors that modules share to their shapes.
Shared = Mapping[str, DeclaredShape]


def _configured(module: Module) -> int:
    return module.rank


@dataclass(frozen=True, kw_only=True)
class LinearFormat(FileFormat):
    """The checkpoint format of a method.

    ``FileFormat.read`` calls ``inspect``, and ``conclude`` if that has found no faults.

    Attributes:
        tensors: Role → shape. The role is the end of the tensor's name, after the module's path.
        rank: Config key of the rank, or None (no rank).
        rank_name: The name of the rank in messages.
        rank_of: Computes the served rank, if the tensors determine it instead of the config.
        most_rank: The maximum rank of a module by its inputs and outputs, or None (any).
        alpha: Config key of alpha, or None (no alpha).
        root: Config key that is true if alpha is divided by the root of the rank, or None.
        has_patterns: Whether ``rank_pattern`` and ``alpha_pattern`` are regular expressions for
            ranks and alphas, as in LoRA.
        shared: Shapes of tensors that belong to no module, by full name, or a function that returns
            them.
        shared_prefix: Prefix of the names that such a function returns.
        needs_tensors: Whether an adapted module has its own tensors. If not, all its values follow
            from shared ones.
        factors: The roles of the two tensors that map inputs to ranks and ranks to outputs. If
            either does not fit the base, one mismatch is reported for both.
        check: Checks a module whose tensors all have the declared shapes.
        check_all: Checks all modules together, once each of them is valid.
    """

    tensors: Mapping[str, DeclaredShape]
    rank: str | None = "r"
    rank_name: str = "rank"
    rank_of: Callable[[Module], int] = _configured
    most_rank: Callable[[int, int], int] | None = None
    alpha: str | None = None
    root: str | None = None
    has_patterns: bool = False
    shared: Shared | Callable[[Reading], Shared] = field(default_factory=dict)
    shared_prefix: str = ""
    needs_tensors: bool | Callable[[Mapping[str, Any]], bool] = True
    factors: tuple[str, str] | None = None
    check: Callable[[Module], None] | None = None
    check_all: Callable[[Reading], None] | None = None

    @cached_property
    def all_tensors(self) -> Mapping[str, Tensor]:
        return {role: tensor(shape) for role, shape in self.tensors.items()}

    @cached_property
    def roles(self) -> Mapping[str, str]:
        """Maps endings of tensor names to roles."""
        own = {
            f".{name}": role
            for role, spec in self.all_tensors.items()
            for name in (role, *spec.also_named)
        }
        return own | (dict.fromkeys(_BIAS_SUFFIXES, _BIAS) if self.bias else {})

    @property
    def integers(self) -> frozenset[str]:
        """Parts of the names of tensors that may hold integers."""
        specs = [*self.all_tensors.items()]
        if not callable(self.shared):
            specs += [(name, tensor(shape)) for name, shape in self.shared.items()]
        return frozenset(role for role, spec in specs if spec.may_be_integers) | self.more_integers

    @property
    def common(self) -> Rules:
        """Rules for the keys that select modules, and for those of ranks and alphas."""
        keys: dict[str, Check] = {**SELECTION}
        for key, check in ((self.rank, fault_of_rank), (self.alpha, fault_of_number)):
            if key is not None:
                keys[key] = check
        if self.has_patterns:
            keys |= PATTERNS if self.alpha else {"rank_pattern": fault_of_rank_pattern}
        return {key: Used(check) for key, check in keys.items()}

    @property
    def needed(self) -> tuple[str, ...]:
        """The required keys: those of rank, alpha and targets, and the method's own."""
        keys = (self.rank, self.alpha, "target_modules", *self.required)
        return tuple(key for key in keys if key is not None)

    def conclude(self, reading: Reading, max_rank: int | None) -> None:
        """Checks shared tensors and ranks, and all modules together."""
        findings = reading.findings
        self._check_shared(reading)
        if self.check_all is not None and not (findings.fields or findings.mismatched):
            self.check_all(reading)
        findings.raise_if_any()
        if self.rank is None and self.rank_of is _configured:
            return
        ranks = {name: self.rank_of(module) for name, module in reading.modules.items()}
        check_rank(reading.path, max(ranks.values(), default=0), max_rank, name=self.rank_name)
        reading.ranks = ranks if self.rank_name == "rank" else {}

    def inspect(self, reading: Reading) -> None:
        """Finds the adapted modules, and checks their tensors."""
        config, base, findings = reading.config, reading.base, reading.findings
        found = self._sort(reading)
        adapted = {name: roles for name, roles in found.items() if roles.keys() - {_BIAS}}
        needs = self.needs_tensors(config) if callable(self.needs_tensors) else self.needs_tensors
        if needs and not (adapted or findings.mismatched or reading.checkpoint.is_partial):
            findings.add(TENSORS_FILE, say("NO_TENSORS"))
        targets = self._resolve(config, base, findings)
        if targets is not None:
            if not needs:
                some = (name for name in base.modules if name in targets.targeted)
                adapted = {name: {} for name in some} | adapted
            reading.targets = targets
            self._check_targets(targets, adapted, base, findings)
            for name in base.modules:
                if name in adapted and name in targets.targeted:
                    own = {role: t for role, t in adapted[name].items() if role != _BIAS}
                    reading.modules[name] = Module(name, targets.ranks[name], own, reading)
            if not findings.fields & self.used:
                switched_on = {
                    role: spec
                    for role, spec in self.all_tensors.items()
                    if spec.switch is None or config.get(spec.switch)
                }
                for module in reading.modules.values():
                    self._check_module(module, switched_on)
            self._check_biases(reading, found)
        if findings.mismatched:
            findings.causes = causes_of_mismatch(config, reading.checkpoint.tensors, base)

    def _check_module(self, module: Module, switched_on: Mapping[str, Tensor]) -> None:
        """Reports tensors that are missing or have another shape as faults, or as mismatches."""
        others = module.tensors.keys() - switched_on.keys()
        for role in others:
            module.fault(role, say("UNEXPECTED_TENSOR", by=self.all_tensors[role].switch))
        fits = not others
        try:
            # Compute all sizes first: if they do not match, no single tensor is at fault.
            wanted = {role: spec.sizes(module) for role, spec in switched_on.items()}
            for role, spec in switched_on.items():
                found = module.tensors.get(role)
                fits &= self._check_tensor(module, role, spec, found, wanted[role])
            if fits and self.check is not None:
                self.check(module)
        except Misfit as error:
            module.misfit(error.why)
            return
        except StopChecks:
            return
        most = None if self.most_rank is None else self.most_rank(module.inputs, module.outputs)
        if fits and most is not None and module.rank > most:
            module.misfit(say("NOT_IN_RANGE", least=1, most=most, value=module.rank), "rank")

    def _check_tensor(
        self,
        owner: Module | Reading,
        role: str,
        spec: Tensor,
        found: Any,
        wanted: list[tuple[int, ...]] | None,
    ) -> bool:
        """Whether a tensor of a module, or one that all modules share, is as declared."""
        by = spec.switch or "the config"
        if wanted is None:
            if found is not None:
                owner.fault(role, say("UNEXPECTED_TENSOR", by=by))
            return found is None
        if found is None:
            if not spec.is_optional:
                owner.fault(role, say("MISSING_TENSOR", by=by))
            return spec.is_optional
        if spec.must_be_integers and found.is_floating_point():
            owner.fault(role, say("WRONG_DTYPE", dtype=found.dtype, expected="integers"))
            return False
        is_right = not wanted or tuple(found.shape) in wanted
        return is_right or self._check_shape(owner, role, spec, found)

    def _check_shape(self, owner: Module | Reading, role: str, spec: Tensor, found: Any) -> bool:
        """Reports a wrong shape; returns whether the shape is right.

        If only the rank differs, the rank of the tensor becomes the module's.
        """
        # An earlier tensor may have changed the rank, and so the wanted shapes.
        shapes, wanted, shape = spec.wanted(owner), spec.sizes(owner), tuple(found.shape)
        assert shapes, "it has a shape"
        assert wanted, "in numbers too"
        if shape in wanted:
            return True
        of_base = len(shapes) > 1
        if not of_base and len(shape) == len(shapes[0]):
            sizes = zip(shapes[0], wanted[0], shape, strict=True)
            wrong = [(dim, size) for dim, expected, size in sizes if size != expected]
            of_base = all(isinstance(dim, Dim) and dim.is_served for dim, _ in wrong)
            if isinstance(owner, Module):
                if all(dim is R for dim, _ in wrong):
                    self._report_rank(owner, role, wrong[0][1])
                    return False
                if of_base and self.factors is not None and role in self.factors:
                    down, up = self.factors
                    owner.misfit_width(owner.extent(down, -1), owner.extent(up, 0))
                    return False
        name = f"{owner.name}.{role}" if isinstance(owner, Module) else role
        owner.findings.check_shape(name, found, *wanted, of_base=of_base)
        return False

    def _report_rank(self, module: Module, role: str, rank: int) -> None:
        """Reports a rank that is not the config's; later tensors are compared with this rank."""
        by = module.ranked_by or "the config"
        module.fault(role, say("WRONG_RANK", rank=rank, by=by, expected=module.rank))
        if not module.ranked_by:
            module.rank, module.ranked_by = rank, role

    def _sort(self, reading: Reading) -> dict[str, dict[str, Any]]:
        """Assigns a module and a role to every tensor, or reports a fault or mismatch."""
        base, findings = reading.base, reading.findings
        names = () if callable(self.shared) else self.shared
        modules: dict[str, dict[str, Any]] = {}
        for full_name, found in reading.checkpoint.tensors.items():
            is_prefixed = bool(self.shared_prefix) and full_name.startswith(self.shared_prefix)
            if is_prefixed or full_name in names:
                reading.shared[full_name] = found
                continue
            name, role = self._split(full_name)
            if role is None or is_lycoris(full_name):
                findings.add(full_name, why_unknown(full_name))
            elif name in base.other_modules:
                findings.add(full_name, say("NOT_ADAPTABLE", module=name, method=self.name))
            elif name not in base.modules:
                findings.mismatch(full_name, say("NO_SUCH_MODULE", module=name))
            elif role in modules.setdefault(name, {}):
                findings.add(full_name, say("DUPLICATE_TENSOR", other=f"{name}.{role}"))
            else:
                modules[name][role] = found
        return modules

    def _split(self, name: str) -> tuple[str, str | None]:
        parts = name.rsplit(".", self._depth)
        # Try the longest ending first: "lora_B.bias" must not count as the module's own bias.
        for cut in range(1, len(parts)):
            ending = "." + ".".join(parts[cut:])
            if ending in self.roles:
                return ".".join(parts[:cut]), self.roles[ending]
        return name, None

    @cached_property
    def _depth(self) -> int:
        """The maximum number of parts in a role's name."""
        return max(role.count(".") for role in self.roles)

    def _resolve(self, config: Mapping[str, Any], base: Base, findings: Findings) -> Targets | None:
        """The modules that the config selects, or None if a key for this is invalid."""
        patterns = PATTERNS if self.has_patterns else ()
        keys = {*self.needed, *SELECTION, *patterns}
        if findings.fields & keys:
            return None
        selection = {name: config[name] for name in keys if name in config}
        for name, own in (("r", self.rank), ("lora_alpha", self.alpha)):
            selection[name] = 1 if own is None else config[own]
        selection["use_rslora"] = self.root is not None and config.get(self.root)
        linear, other = list(base.modules), sorted(base.other_modules)
        targets = resolve_targets(selection, linear, other, findings, base.text_prefix)
        return None if findings.fields & keys else targets

    def _check_targets(
        self, targets: Targets, adapted: Mapping[str, TensorMap], base: Base, findings: Findings
    ) -> None:
        for name in sorted(targets.targeted & base.other_modules):
            findings.add("target_modules", say("NOT_ADAPTABLE", module=name, method=self.name))
        # A module that does not fit has been reported already, so do not report it as missing.
        misfits = bool(findings.mismatched)
        for name in base.modules:
            if name in adapted and name not in targets.targeted:
                role = next(role for role in self.tensors if role in adapted[name])
                findings.add(f"{name}.{role}", say("UNEXPECTED_TENSOR", by="target_modules"))
            elif name in targets.targeted and name not in adapted and not misfits:
                first = next(iter(self.tensors))
                findings.add(f"{name}.{first}", say("MISSING_TENSOR", by="target_modules"))

    def _check_biases(self, reading: Reading, found: Mapping[str, TensorMap]) -> None:
        """Checks the ``bias`` key against the biases in the file."""
        if not self.bias:
            return
        said, findings = reading.config.get("bias", "none"), reading.findings
        for name, module in reading.base.modules.items():
            bias, field = found.get(name, {}).get(_BIAS), f"{name}.bias"
            is_promised = said == "all" or (said in self.bias and name in reading.targets.targeted)
            if bias is None:
                if is_promised and module.has_bias and not findings.mismatched:
                    findings.add(field, say("MISSING_TENSOR", by="bias"))
            elif not is_promised:
                findings.add(field, say("UNEXPECTED_TENSOR", by="bias"))
            elif module.has_bias is False:
                findings.mismatch(field, say("NO_BASE_BIAS"))
            elif findings.check_shape(field, bias, (module.out_features,)):
                reading.biases[name] = bias

    def _check_shared(self, reading: Reading) -> None:
        findings = reading.findings
        if not reading.modules:
            if reading.shared or self.shared:
                findings.add("target_modules", say("SELECTS_NOTHING"))
            return
        wanted = self.shared(reading) if callable(self.shared) else self.shared
        for name in reading.shared.keys() - wanted.keys():
            findings.add(name, say("UNKNOWN_TENSOR"))
        for name, shape in wanted.items():
            spec = tensor(shape)
            self._check_tensor(reading, name, spec, reading.shared.get(name), spec.sizes(reading))
