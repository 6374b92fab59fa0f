"""How a method that adapts linear modules writes its checkpoint, and the one check of it. No torch.

A method declares its keys and tensors as a ``LinearFormat``. The check reads a config and tensors,
or only the entries of a safetensors header: it looks at names, shapes and dtypes, and at no value.
So a start can check an adapter before it loads the model, and a load checks nothing else.

The tensors say what exists, the config says how it is scaled. Where the two disagree, nobody knows
which function was trained, so the checkpoint is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from turret.server.adapters.base import BaseModel, BaseModule, BaseSizes, WeightRows
from turret.server.adapters.checkpoint.adapter_checkpoint import AdapterCheckpoint
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.no_adapter import (
    LEFT_OUT,
    NO_TENSORS,
    OTHER_TRAINING,
    SAVE_AGAIN,
    WHOLE_WEIGHT,
    lacks_switch,
    lacks_switched,
)
from turret.server.adapters.component import Component, FindComponent, find_no_component
from turret.server.adapters.peft_format.config.rules import MethodKeys
from turret.server.adapters.peft_format.config.targets import Targets, resolve_targets
from turret.server.adapters.peft_format.refusals import cause_of_mismatch, check_rank, check_task
from turret.server.adapters.peft_format.shapes import (
    Declared,
    Dim,
    Misfit,
    R,
    Stop,
    Tensor,
    tensor,
)
from turret.server.adapters.source import TENSORS_FILE
from turret.server.basics.lazy_torch import torch

_BIAS = "bias"
# PEFT keeps a targeted module's own bias under base_layer, another module's in its place.
_BIAS_SUFFIXES = (".base_layer.bias", ".bias")
# LyCORIS flattens the module's path into one word behind a prefix, and stores alpha as a tensor.
_LYCORIS_PREFIXES = ("lycoris_", "lora_unet_", "lora_te_")
_LYCORIS_SUFFIXES = (".alpha", ".dora_scale", ".scalar", ".on_input")
_UNKNOWN = "is not a tensor this method knows; every tensor must be used"
_SELECTION = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")

T = TypeVar("T")
Base = BaseModel | BaseSizes
Tensors = Mapping[str, Any]
Prepare = Callable[[AdapterCheckpoint, Base, Findings], AdapterCheckpoint]
# Full names of tensors that modules share → their shapes.
Shared = Mapping[str, Declared]


def _nothing() -> None:
    pass


class Reading:
    """An adapter while it is read: what its modules have in common.

    Attributes:
        config: ``adapter_config.json``.
        path: The adapter, as messages name it.
        base: The base that it is for.
        task: Which task of the files is meant.
        is_partial: Whether tensors were taken out before, as those of the embedding.
        modules: The adapted modules by path, in the base's order.
        shared: Tensors that belong to no module.
        targets: Configured rank and alpha of every adapted module.
        biases: Whole biases that replace the base's, by module path.
        ranks: The rank that is served, by module path; empty for a method without ranks.
        findings: What is wrong.
        warnings: What an operator should know, in order.
        depends_on_base: Whether weights or biases of the base were asked for.
        beside: Called before the base's weights are read.
        find_component: Finds an adapter that the config names as a component.
        components: Those that were found.
    """

    def __init__(self, checkpoint: AdapterCheckpoint, base: Base, findings: Findings) -> None:
        self.config = checkpoint.config
        self.path = checkpoint.path
        self.base = base
        self.task = 0
        self.is_partial = checkpoint.is_partial
        self.modules: dict[str, Module] = {}
        self.shared: dict[str, Any] = {}
        self.targets = Targets(frozenset(), {}, {})
        self.biases: dict[str, torch.Tensor] = {}
        self.ranks: dict[str, int] = {}
        self.findings = findings
        self.warnings: dict[str, None] = {}
        self.depends_on_base = False
        self.beside: Callable[[], object] = _nothing
        self.find_component: FindComponent = find_no_component
        self.components: Sequence[Component] = ()
        self._made: dict[object, Any] = {}
        self._wide: dict[str, torch.Tensor] = {}

    @property
    def inputs(self) -> int:
        """Of the widest module."""
        return max(module.inputs for module in self.modules.values())

    @property
    def outputs(self) -> int:
        """Of the module that has most."""
        return max(module.outputs for module in self.modules.values())

    @property
    def rank(self) -> int:
        """The config's."""
        return self.config["r"]

    def fault(self, name: str, why: str) -> None:
        """Reports a fault of a key or of a tensor, by its full name."""
        self.findings.add(name, why)

    @property
    def dtype(self) -> torch.dtype:
        """The serving dtype."""
        assert isinstance(self.base, BaseModel)
        return self.base.dtype

    def wide(self, name: str) -> torch.Tensor:
        """A shared tensor in fp32 or wider."""
        if name not in self._wide:
            found = self.shared[name]
            self._wide[name] = found.to(torch.promote_types(found.dtype, torch.float32))
        return self._wide[name]

    def once(self, make: Callable[[Reading], T]) -> T:
        """What a function makes of the adapter, made at the first call."""
        if make not in self._made:
            self._made[make] = make(self)
        return self._made[make]

    def warn(self, text: str) -> None:
        """What an operator should know of the adapter."""
        self.warnings.setdefault(text)


class Module:
    """One adapted module: its sizes, its tensors, and what the config says of it.

    Attributes:
        name: Its path.
        inputs: Columns of its weight.
        outputs: Rows of its weight.
        has_bias: Whether the base has a bias there; None if that is not known yet.
        rank: As configured, or as its tensors have it.
        tensors: By role; entries of a header have a shape and a dtype alone.
        reading: The whole adapter.
    """

    def __init__(self, name: str, rank: int, tensors: Tensors, reading: Reading) -> None:
        size = reading.base.modules[name]
        self.name, self.rank, self.tensors, self.reading = name, rank, tensors, reading
        self.inputs, self.outputs, self.has_bias = (
            size.in_features,
            size.out_features,
            size.has_bias,
        )
        # The tensor that has this rank, where that is not the config's.
        self.ranked_by = ""

    @property
    def config(self) -> Mapping[str, Any]:
        return self.reading.config

    def __contains__(self, role: str) -> bool:
        return role in self.tensors

    def extent(self, role: str, axis: int) -> int:
        """What a tensor has in a dimension; 0 where there is none."""
        shape = self.tensors[role].shape if role in self.tensors else ()
        return shape[axis] if -len(shape) <= axis < len(shape) else 0

    def fault(self, field: str, why: str) -> None:
        """Reports a fault of a tensor, by its role."""
        self.reading.findings.add(f"{self.name}.{field}", why)

    def misfit(self, why: str, field: str = "") -> None:
        """Reports that the module, or one of its tensors, does not fit the base."""
        self.reading.findings.mismatch(f"{self.name}.{field}" if field else self.name, why)

    # What follows needs tensors, and the base as served.

    @property
    def scaling(self) -> float:
        """``alpha / rank``, or ``alpha / sqrt(rank)``, as configured."""
        return self.reading.targets.scaling(self.name)

    @property
    def shared(self) -> Tensors:
        """Tensors that all modules share, by full name."""
        return self.reading.shared

    def wide(self, *roles: str) -> tuple[torch.Tensor, ...]:
        """Tensors in fp32, or wider where the first of them is."""
        dtype = torch.promote_types(self.tensors[roles[0]].dtype, torch.float32)
        return tuple(self.tensors[role].to(dtype) for role in roles)

    def exact(self, role: str) -> torch.Tensor:
        """A tensor in fp64."""
        return self.tensors[role].double()

    def once(self, make: Callable[[Reading], T]) -> T:
        """What ``make`` makes of the whole adapter, made for the first module that asks."""
        return self.reading.once(make)

    def warn(self, text: str) -> None:
        """What an operator should know of the adapter."""
        self.reading.warnings.setdefault(text)

    def rows(self) -> WeightRows:
        """The base's weight as served, to be read block by block and where it is kept."""
        return self._served().rows()

    def weight(self) -> torch.Tensor:
        """The base's weight as served, whole: take one at a time, and do not write to it."""
        return self._served().dequantize()

    def bias(self) -> torch.Tensor | None:
        """The base's bias, ``[out]`` fp32 on the CPU."""
        bias = self._served().bias if self.has_bias else None
        return None if bias is None else bias.float().cpu()

    def _served(self) -> BaseModule:
        base = self.reading.base
        assert isinstance(base, BaseModel)
        if not self.reading.depends_on_base:
            self.reading.depends_on_base = True
            self.reading.beside()
        return base.modules[self.name]


def _configured(module: Module) -> int:
    return module.rank


@dataclass(frozen=True, kw_only=True)
class LinearFormat(MethodKeys):
    """How a method writes its checkpoint.

    Attributes:
        tensors: Role → shape. The role is the end of the tensor's name, behind the module's path.
        rank: Config key of the rank, or None (no rank).
        rank_name: What messages call the rank.
        rank_of: The rank that is served, which is not the configured one where the tensors decide.
        most_rank: Highest rank of a module with so many inputs and outputs, or None (any).
        alpha: Config key of alpha, or None (not scaled by it).
        root: Config key that is true where alpha is divided by the root of the rank, or None.
        has_patterns: Whether ``rank_pattern`` and ``alpha_pattern`` are regular expressions for
            ranks and alphas, as in LoRA.
        shared: Tensors that belong to no module, by full name, or a function that gives them.
        shared_prefix: How the names of those that the function gives begin.
        required: Config keys that must be there beside those of rank, alpha and targets.
        needs_tensors: Whether an adapted module has tensors of its own. Where it has none, all its
            values follow from shared ones.
        factors: The two tensors that map inputs to ranks and ranks to outputs: of an adapter for
            another base, both are reported as one.
        check: Looks at a module whose tensors all have their shapes.
        check_all: Looks at all modules together, once each of them is sound.
        tasks: Config key of how many tasks the files hold, or None.
        prepare: Makes a checkpoint one of the kind that is declared, before it is read.
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
        """Endings of names, with what each stands for."""
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
            checkpoint: With tensors, or with entries of a header.
            base: As served, or what is known of it.
            max_rank: Largest rank; None is any.

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
                findings.add(name, "is required")
        reading = Reading(checkpoint, base, findings)
        found = self._sort(checkpoint.tensors, reading)
        adapted = {name: roles for name, roles in found.items() if roles.keys() - {_BIAS}}
        needs = self.needs_tensors(config) if callable(self.needs_tensors) else self.needs_tensors
        if needs and not (adapted or findings.mismatched or checkpoint.is_partial):
            findings.add(TENSORS_FILE, NO_TENSORS)
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
                for module in reading.modules.values():
                    self.check_module(module)
            self._check_biases(reading, found)
        if findings.mismatched:
            findings.cause = cause_of_mismatch(config, checkpoint.tensors, base)
        findings.raise_if_any()
        assert targets is not None  # its keys had no fault
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

    def check_module(self, module: Module) -> bool:
        """Whether every tensor is there and has its shape; else faults, or mismatches."""
        findings = module.reading.findings
        fits = True
        try:
            # All sizes first: where they do not go together, no tensor is at fault.
            wanted = {role: _wanted(spec, module) for role, spec in self.all_tensors.items()}
            for role, spec in self.all_tensors.items():
                fits &= self._check_tensor(module, role, spec, wanted[role])
            if fits and self.check is not None:
                self.check(module)
        except Misfit as why:
            module.misfit(str(why))
            return False
        except Stop:
            return False
        side = (module.inputs, module.outputs)
        if fits and self.most_rank is not None and module.rank > self.most_rank(*side):
            most = self.most_rank(*side)
            findings.mismatch(
                module.name, f"takes a rank of {most} at most, the config says {module.rank}"
            )
        return fits

    def _check_tensor(
        self, module: Module, role: str, spec: Tensor, wanted: list[tuple[int, ...]] | None
    ) -> bool:
        found = module.tensors.get(role)
        if wanted is None:
            if found is not None:
                why = LEFT_OUT if spec.switch is None else lacks_switch(spec.switch)
                module.fault(role, why)
            return found is None
        if found is None:
            if spec.is_optional:
                return True
            why = f"is missing; the module's other tensors are there: {SAVE_AGAIN}"
            module.fault(role, why if spec.switch is None else lacks_switched(spec.switch))
            return False
        if spec.must_be_integers and found.is_floating_point():
            module.fault(role, "must hold integers")
            return False
        shape = tuple(found.shape)
        return not wanted or shape in wanted or self._wrong_shape(module, role, spec, shape)

    def _wrong_shape(self, module: Module, role: str, spec: Tensor, found: tuple[int, ...]) -> bool:
        """Reports a tensor whose shape is another one; the module's rank may be its rank then."""
        shapes, wanted = spec.wanted(module), _wanted(spec, module)
        assert shapes is not None
        assert wanted is not None
        if found in wanted:
            return True
        first, sizes = shapes[0], wanted[0]
        if len(found) == len(first) and len(shapes) == 1:
            wrong = [i for i, size in enumerate(found) if size != sizes[i]]
            if all(first[i] is R for i in wrong):
                self._report_rank(module, role, found[wrong[0]])
                return False
            of_base = all(_is_served(first[i]) for i in wrong)
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
        """Reports one tensor of a rank that the config does not say, not each of them."""
        if not module.ranked_by:
            why = f"has rank {rank}, the config says {module.rank}; {OTHER_TRAINING}"
            module.fault(role, why)
            module.rank, module.ranked_by = rank, role
        else:
            module.fault(role, f"has rank {rank}, {module.ranked_by} has {module.rank}")

    def _report_factors(self, module: Module) -> None:
        assert self.factors is not None
        down, up = self.factors
        theirs = f"{module.extent(down, -1)} -> {module.extent(up, 0)}"
        ours = f"{module.inputs} -> {module.outputs}"
        module.misfit(f"the adapter maps {theirs}, the base model {ours}")

    def _sort(self, tensors: Tensors, reading: Reading) -> dict[str, dict[str, Any]]:
        """Gives every tensor a module and a role, or a fault, or a mismatch."""
        base, findings = reading.base, reading.findings
        names = () if callable(self.shared) else self.shared
        modules: dict[str, dict[str, Any]] = {}
        for full_name, found in tensors.items():
            is_prefixed = bool(self.shared_prefix) and full_name.startswith(self.shared_prefix)
            if is_prefixed or full_name in names:
                reading.shared[full_name] = found
                continue
            name, role = self._split(full_name)
            if role is None or full_name.startswith(_LYCORIS_PREFIXES):
                findings.add(full_name, _advice(full_name))
            elif name in base.other_modules:
                findings.add(full_name, f"{name!r} cannot be adapted by this version")
            elif name not in base.modules:
                findings.mismatch(full_name, f"the base model has no module {name!r}")
            elif role in modules.setdefault(name, {}):
                findings.add(full_name, f"is a second {role} of {name!r}")
            else:
                modules[name][role] = found
        return modules

    def _split(self, name: str) -> tuple[str, str | None]:
        parts = name.rsplit(".", self._depth)
        # The longest ending first: that of "lora_B.bias" is not the module's own bias.
        for cut in range(1, len(parts)):
            ending = "." + ".".join(parts[cut:])
            if ending in self.roles:
                return ".".join(parts[:cut]), self.roles[ending]
        return name, None

    @cached_property
    def _depth(self) -> int:
        """Most parts of a role."""
        return max(role.count(".") for role in self.roles)

    def _resolve(self, config: Mapping[str, Any], base: Base, findings: Findings) -> Targets | None:
        """The modules that the config selects, or None if a key it takes is at fault."""
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
            findings.add("target_modules", f"{name!r} cannot be adapted by this version")
        # A module that does not fit the base was reported as that; it is not missing as well.
        misfits = bool(findings.mismatched)
        for name in base.modules:
            if name in adapted and name not in targets.targeted:
                role = next(role for role in self.tensors if role in adapted[name])
                findings.add(f"{name}.{role}", LEFT_OUT)
            elif name in targets.targeted and name not in adapted and not misfits:
                first = next(iter(self.tensors))
                findings.add(f"{name}.{first}", "is missing; the config targets the module")

    def _check_biases(self, reading: Reading, found: Mapping[str, Tensors]) -> None:
        """The ``bias`` key against the biases it promises or rules out."""
        if not self.bias:
            return
        said, findings = reading.config.get("bias", "none"), reading.findings
        for name, module in reading.base.modules.items():
            bias, field = found.get(name, {}).get(_BIAS), f"{name}.bias"
            is_promised = said == "all" or (said in self.bias and name in reading.targets.targeted)
            if bias is None:
                if is_promised and module.has_bias and not findings.mismatched:
                    findings.add(field, f"is missing; bias is {said!r:.20}")
            elif not is_promised:
                findings.add(field, f"is there, but bias is {said!r:.20}")
            elif module.has_bias is False:
                findings.mismatch(field, "the base model has no bias there")
            elif findings.check_shape(field, bias, (module.out_features,)):
                reading.biases[name] = bias

    def _check_shared(self, reading: Reading) -> None:
        findings = reading.findings
        if not reading.modules:
            if reading.shared or self.shared:
                findings.add("target_modules", "selects no module of the base model")
            return
        wanted = self.shared(reading) if callable(self.shared) else self.shared
        for name in reading.shared.keys() - wanted.keys():
            findings.add(name, "belongs to no module")
        for name, shape in wanted.items():
            spec, found = tensor(shape), reading.shared.get(name)
            shapes = spec.wanted(reading)
            if shapes is None:
                if found is not None:
                    findings.add(name, f"is there, but {spec.switch or 'the config'} rules it out")
            elif found is None:
                findings.add(name, "is missing; modules share it")
            elif spec.must_be_integers and found.is_floating_point():
                findings.add(name, "must hold integers")
            elif shapes:
                (dims,) = shapes
                sizes = tuple(_size(dim, reading) for dim in dims)
                of_base = len(found.shape) == len(sizes) and all(
                    one == other or _is_served(dim)
                    for one, other, dim in zip(found.shape, sizes, dims, strict=True)
                )
                findings.check_shape(name, found, sizes, of_base=of_base)


def _wanted(spec: Tensor, module: Module) -> list[tuple[int, ...]] | None:
    """The shapes that a tensor may have, in numbers; None where it must not be there."""
    shapes = spec.wanted(module)
    if shapes is None:
        return None
    return [tuple(_size(dim, module) for dim in shape) for shape in shapes]


def _size(dim: Dim | int, of: Module | Reading) -> int:
    return dim if isinstance(dim, int) else dim.of(of)


def _is_served(dim: Dim | int) -> bool:
    return isinstance(dim, Dim) and dim.is_served


def _advice(name: str) -> str:
    if name.startswith(_LYCORIS_PREFIXES) or name.endswith(_LYCORIS_SUFFIXES):
        return (
            "is named as LyCORIS names its tensors; save the adapter in PEFT's layout"
            " (docs/adapters.md says how)"
        )
    if name.endswith((".hada_t1", ".hada_t2", ".lokr_t2")):
        return "belongs to a convolution; the models served have none"
    if name.endswith(".weight") and ".lora_" not in name:
        return WHOLE_WEIGHT
    return _UNKNOWN


def unknown_tensors(names: Iterable[str], findings: Findings) -> None:
    """Reports tensors that a method has no use for."""
    for name in names:
        findings.add(name, _UNKNOWN)
