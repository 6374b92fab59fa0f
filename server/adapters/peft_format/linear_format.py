"""The checkpoint format of methods that adapt linear modules, and its only check. Needs no torch.

A method declares its keys and tensors as a ``LinearFormat``. The check reads a config and tensors,
or only the entries of a safetensors header. It uses names, shapes and dtypes, but no values, so the
server can check an adapter at startup before it loads the model. A load checks nothing else.

The tensors determine the updates, and the config their scaling. If the two disagree, it is unknown
which function was trained, so the checkpoint is rejected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from turret.server.adapters.adapter import TENSORS_FILE
from turret.server.adapters.checkpoint.adapter_checkpoint import AdapterCheckpoint, Findings
from turret.server.adapters.peft_format.config_rules import MethodKeys
from turret.server.adapters.peft_format.reading import Base, Module, Reading, Tensors
from turret.server.adapters.peft_format.refusals import (
    causes_of_mismatch,
    check_rank,
    check_task,
    is_lycoris,
    report_width,
    why_unknown,
)
from turret.server.adapters.peft_format.targets import Targets, resolve_targets
from turret.server.words import Text, say

# Shapes of tensors, declared in terms of the module they belong to.
#
# ``IN``, ``OUT`` and ``R`` are a module's inputs, outputs and rank, and ``key("k")`` is a number
# of the config. They can be added, multiplied and divided: ``(key("k"), IN / key("k"), R)``. A
# division with a remainder means that the adapter does not fit the module.
#
# For a tensor that all modules share, ``IN`` and ``OUT`` are those of the widest module, and ``R``
# is the config's rank.


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
        text: Its notation in messages and pages.
        of: Computes it for a module.
        what: Name of the counted things, for messages.
        is_served: Whether the base determines it, so that a tensor of another size may be sound but
            is for another base. Any other extent follows from the config or from another tensor.
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
    """Whether the base determines an extent."""
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
        """The config key that switches it, if there is one."""
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


def optionally(shape: Declared) -> Tensor:
    """A tensor that may be missing."""
    return replace(tensor(shape), is_optional=True)


_BIAS = "bias"
# PEFT saves a targeted module's own bias under base_layer, any other under its usual name.
_BIAS_SUFFIXES = (".base_layer.bias", ".bias")
_SELECTION = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")

Prepare = Callable[[AdapterCheckpoint, Base, Findings], AdapterCheckpoint]
# Maps the full names of tensors that modules share to their shapes.
Shared = Mapping[str, Declared]


def _configured(module: Module) -> int:
    return module.rank


@dataclass(frozen=True, kw_only=True)
class LinearFormat(MethodKeys):
    """The checkpoint format of a method.

    Attributes:
        tensors: Role → shape. The role is the end of the tensor's name, behind the module's path.
        rank: Config key of the rank, or None (no rank).
        rank_name: The name of the rank in messages.
        rank_of: The rank that is served, if the tensors determine it and not the config.
        most_rank: The maximum rank of a module by its inputs and outputs, or None (any).
        alpha: Config key of alpha, or None (not scaled by it).
        root: Config key that is true if alpha is divided by the root of the rank, or None.
        has_patterns: Whether ``rank_pattern`` and ``alpha_pattern`` are regular expressions for
            ranks and alphas, as in LoRA.
        shared: Tensors that belong to no module, by full name, or a function that gives them.
        shared_prefix: Prefix of the names that such a function gives.
        required: Config keys that must be present in addition to those of rank, alpha and targets.
        needs_tensors: Whether an adapted module has its own tensors. If not, all its values follow
            from shared ones.
        factors: The two tensors that map inputs to ranks and ranks to outputs. If an adapter is for
            another base, both are reported as one.
        check: Checks a module whose tensors all have their shapes.
        check_all: Checks all modules together, after each of them was found sound.
        tasks: The config key of the number of tasks in the files, or None.
        prepare: Converts a checkpoint to the declared form before it is read.
    """

    tensors: Mapping[str, Declared]
    rank: str | None = "r"
    rank_name: str = "rank"
    rank_of: Callable[[Module], int] = _configured
    most_rank: Callable[[int, int], int] | None = None
    alpha: str | None = None
    root: str | None = None
    has_patterns: bool = False
    shared: Shared | Callable[[Reading], Shared] = field(default_factory=dict)
    shared_prefix: str = ""
    required: tuple[str, ...] = ()
    needs_tensors: bool | Callable[[Mapping[str, Any]], bool] = True
    factors: tuple[str, str] | None = None
    check: Callable[[Module], None] | None = None
    check_all: Callable[[Reading], None] | None = None
    tasks: str | None = None
    prepare: Prepare | None = None

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

    @cached_property
    def integers(self) -> frozenset[str]:
        """Parts of the names of tensors that may hold integers."""
        specs = [*self.all_tensors.items()]
        if not callable(self.shared):
            specs += [(name, tensor(shape)) for name, shape in self.shared.items()]
        return frozenset(role for role, spec in specs if spec.may_be_integers) | self.more_integers

    @property
    def _required(self) -> tuple[str, ...]:
        keys = (self.rank, self.alpha, "target_modules", *self.required)
        return tuple(key for key in keys if key is not None)

    def read(
        self, checkpoint: AdapterCheckpoint, base: Base, max_rank: int | None = None
    ) -> Reading:
        """Checks a checkpoint against itself, the base and the server's limit.

        Args:
            checkpoint: The checkpoint, with tensors or with entries of a header.
            base: The base as served, or the known facts about it.
            max_rank: The maximum rank; None for any.

        Raises:
            AdapterCheckpointError: Unsupported or inconsistent; lists all keys and tensors at
                fault.
            AdapterMismatchError: Sound, but for another base; lists every module that does not fit.
            BudgetExceededError: A rank over ``max_rank``.
        """
        findings = Findings(checkpoint.path, base.name)
        if self.prepare is not None:
            checkpoint = self.prepare(checkpoint, base, findings)
        config = checkpoint.config
        self.check_config(config, findings)
        for name in self._required:
            if name not in config:
                findings.add(name, say("REQUIRED"))
        reading = Reading(checkpoint, base, findings)
        found = self._sort(checkpoint.tensors, reading)
        adapted = {name: roles for name, roles in found.items() if roles.keys() - {_BIAS}}
        needs = self.needs_tensors(config) if callable(self.needs_tensors) else self.needs_tensors
        if needs and not (adapted or findings.mismatched or checkpoint.is_partial):
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
            findings.causes = causes_of_mismatch(config, checkpoint.tensors, base)
        findings.raise_if_any()
        assert targets is not None  # otherwise one of its keys had a fault
        if self.tasks is not None:
            reading.task = check_task(checkpoint, self.tasks, findings)
        self._check_shared(reading)
        if self.check_all is not None and not (findings.fields or findings.mismatched):
            self.check_all(reading)
        findings.raise_if_any()
        if self.rank is None and self.rank_of is _configured:
            return reading
        ranks = {name: self.rank_of(module) for name, module in reading.modules.items()}
        check_rank(checkpoint.path, max(ranks.values(), default=0), max_rank, name=self.rank_name)
        reading.ranks = ranks if self.rank_name == "rank" else {}
        return reading

    def _check_module(self, module: Module, switched_on: Mapping[str, Tensor]) -> None:
        """Reports tensors that are missing or have another shape as faults, or as mismatches."""
        others = module.tensors.keys() - switched_on.keys()
        for role in others:
            module.fault(role, say("UNEXPECTED_TENSOR", by=self.all_tensors[role].switch))
        fits = not others
        try:
            # Compute all sizes first: if they do not go together, no single tensor is at fault.
            wanted = {role: spec.sizes(module) for role, spec in switched_on.items()}
            for role, spec in switched_on.items():
                fits &= self._check_tensor(module, role, spec, wanted[role])
            if fits and self.check is not None:
                self.check(module)
        except Misfit as error:
            module.misfit(error.why)
            return
        except Stop:
            return
        most = None if self.most_rank is None else self.most_rank(module.inputs, module.outputs)
        if fits and most is not None and module.rank > most:
            module.misfit(say("NOT_IN_RANGE", least=1, most=most, value=module.rank), "rank")

    def _check_tensor(
        self, module: Module, role: str, spec: Tensor, wanted: list[tuple[int, ...]] | None
    ) -> bool:
        found = module.tensors.get(role)
        if wanted is None:
            if found is not None:
                module.fault(role, say("UNEXPECTED_TENSOR", by="the config"))
            return found is None
        if found is None:
            if spec.is_optional:
                return True
            module.fault(role, say("MISSING_TENSOR", by=spec.switch or "the config"))
            return False
        if spec.must_be_integers and found.is_floating_point():
            module.fault(role, say("WRONG_DTYPE", dtype=found.dtype, expected="integers"))
            return False
        shape = tuple(found.shape)
        return not wanted or shape in wanted or self._wrong_shape(module, role, spec, shape)

    def _wrong_shape(self, module: Module, role: str, spec: Tensor, found: tuple[int, ...]) -> bool:
        """Reports a wrong shape; if only the rank differs, that becomes the module's rank."""
        shapes, wanted = spec.wanted(module), spec.sizes(module)
        assert shapes, "it has a shape"
        assert wanted, "in numbers too"
        if found in wanted:
            return True
        first, sizes = shapes[0], wanted[0]
        if len(found) == len(first) and len(shapes) == 1:
            wrong = [i for i, size in enumerate(found) if size != sizes[i]]
            if all(first[i] is R for i in wrong):
                self._report_rank(module, role, found[wrong[0]])
                return False
            of_base = all(is_served(first[i]) for i in wrong)
            if of_base and self.factors is not None and role in self.factors:
                self._report_factors(module)
                return False
        else:
            of_base = len(shapes) > 1
        module.reading.findings.check_shape(
            f"{module.name}.{role}", module.tensors[role], *wanted, of_base=of_base
        )
        return False

    def _report_rank(self, module: Module, role: str, rank: int) -> None:
        """Reports a rank that is not the config's; later tensors are compared with this rank."""
        by = module.ranked_by or "the config"
        module.fault(role, say("WRONG_RANK", rank=rank, by=by, expected=module.rank))
        if not module.ranked_by:
            module.rank, module.ranked_by = rank, role

    def _report_factors(self, module: Module) -> None:
        assert self.factors is not None
        down, up = self.factors
        report_width(module, module.extent(down, -1), module.extent(up, 0))

    def _sort(self, tensors: Tensors, reading: Reading) -> dict[str, dict[str, Any]]:
        """Gives every tensor a module and a role, or else reports a fault or mismatch."""
        base, findings = reading.base, reading.findings
        names = () if callable(self.shared) else self.shared
        modules: dict[str, dict[str, Any]] = {}
        for full_name, found in tensors.items():
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
        """The most parts that a role's name has."""
        return max(role.count(".") for role in self.roles)

    def _resolve(self, config: Mapping[str, Any], base: Base, findings: Findings) -> Targets | None:
        """The modules that the config selects, or None if a key for this is at fault."""
        patterns = ("rank_pattern", "alpha_pattern") if self.has_patterns else ()
        keys = {*self._required, *_SELECTION, *patterns}
        if findings.fields & keys:
            return None
        selection = {name: config[name] for name in keys if name in config}
        selection["r"] = 1 if self.rank is None else config[self.rank]
        selection["lora_alpha"] = 1 if self.alpha is None else config[self.alpha]
        selection["use_rslora"] = self.root is not None and config.get(self.root)
        linear, other = list(base.modules), sorted(base.other_modules)
        targets = resolve_targets(selection, linear, other, findings, base.text_prefix)
        return None if findings.fields & keys else targets

    def _check_targets(
        self, targets: Targets, adapted: Mapping[str, Tensors], base: Base, findings: Findings
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

    def _check_biases(self, reading: Reading, found: Mapping[str, Tensors]) -> None:
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
            spec, found = tensor(shape), reading.shared.get(name)
            shapes = spec.wanted(reading)
            if shapes is None:
                if found is not None:
                    findings.add(name, say("UNEXPECTED_TENSOR", by=spec.switch or "the config"))
            elif found is None:
                findings.add(name, say("MISSING_TENSOR", by="the config"))
            elif spec.must_be_integers and found.is_floating_point():
                findings.add(name, say("WRONG_DTYPE", dtype=found.dtype, expected="integers"))
            elif shapes:
                (dims,) = shapes
                sizes = tuple(size_of(dim, reading) for dim in dims)
                of_base = len(found.shape) == len(sizes) and all(
                    one == other or is_served(dim)
                    for one, other, dim in zip(found.shape, sizes, dims, strict=True)
                )
                findings.check_shape(name, found, sizes, of_base=of_base)
