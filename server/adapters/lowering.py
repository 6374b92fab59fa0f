"""Defines the form of a method, and turns its checkpoints into checked operators.

A method consists of a declaration, and of a function from tensors to operators, which computes in
fp32 or wider. The operators are rounded to the serving dtype when a module is assembled, moved to
one block of memory, checked, and summarised. A method may also declare how its training starts.

Importing this module does not load torch.
"""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from types import MappingProxyType
from typing import Any, NamedTuple

from turret.kernels.fusion_gate import GATE_MULTIPLE
from turret.lazy_torch import torch
from turret.server.adapters.adapter import AdapterFacts, Head
from turret.server.adapters.base import BaseModel, BaseModule, WeightRows
from turret.server.adapters.checkpoint import (
    PROMPT_EMBEDDINGS,
    AdapterCheckpoint,
    Findings,
)
from turret.server.adapters.checkpoint.reader import all_finite
from turret.server.adapters.component import COMPONENTS_KEY, Component, component_refs, unfit
from turret.server.adapters.operators import Operator
from turret.server.adapters.operators.adapter_operators import (
    AdapterOperators,
    ModuleOperators,
    beyond_low_rank,
)
from turret.server.adapters.operators.gate import Gate, GivenScore, PrototypeScore, QueryScore
from turret.server.adapters.operators.low_rank import LowRank
from turret.server.adapters.operators.soft_prompt import SoftPrompt
from turret.server.adapters.operators.sparse import Sparse
from turret.server.adapters.operators.vectors import Bias
from turret.server.adapters.operators.vocabulary import EMBEDDING, HEAD
from turret.server.adapters.peft_format.linear_format import LinearFormat
from turret.server.adapters.peft_format.reading import FileFormat, Module, Reading
from turret.server.adapters.peft_format.refusals import base_difference
from turret.server.errors import AdapterComponentError
from turret.server.words import Text, say


class NewModule:
    """A module for which training starts with a new adapter.

    Args:
        base: The module of the base.
        rank: The rank.
        generator: Draws random tensors; None makes all tensors on the meta device, without memory.

    Attributes:
        name: Its path.
        inputs: The number of inputs.
        outputs: The number of outputs.
        rank: The rank.
    """

    def __init__(self, base: BaseModule, rank: int, generator: torch.Generator | None) -> None:
        self.name = base.name
        self.inputs, self.outputs, self.rank = base.in_features, base.out_features, rank
        self._base = base
        self._generator = generator
        self._device = "meta" if generator is None else "cpu"

    def zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=self._device)

    def ones(self, *shape: int) -> torch.Tensor:
        return torch.ones(shape, device=self._device)

    def kaiming(self, rows: int, columns: int) -> torch.Tensor:
        """Kaiming's uniform initialisation with a = √5, as in PEFT and torch."""
        drawn = torch.rand(rows, columns, generator=self._generator, device=self._device)
        return (drawn * 2 - 1) / math.sqrt(columns)

    def normal(self, rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=self._generator, device=self._device)

    def norms(self) -> torch.Tensor:
        """The norms of the rows of the base's weight."""
        if self._generator is None:
            return self.zeros(self.outputs)
        return torch.linalg.vector_norm(self._base.dequantize(), dim=1)


def _nothing(rank: int, targets: Sequence[str]) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True, slots=True)
class Start:
    """The start of training for a method.

    Attributes:
        tensors: Makes the tensors of a module, by role.
        config: Makes the keys of PEFT's config, besides those of rank, alpha and targets, from the
            rank and the targets.
    """

    tensors: Callable[[NewModule], Mapping[str, torch.Tensor]]
    config: Callable[[int, Sequence[str]], Mapping[str, Any]] = _nothing


# Maximum number of elements of the weight that are converted at once: 67 MB in fp32.
_ELEMENTS_PER_BLOCK = 1 << 24


def weight_times(weight: WeightRows, right: torch.Tensor) -> torch.Tensor:
    """``W @ right``, block by block on the weight's device.

    Args:
        weight: ``[out_features, in_features]``; not modified.
        right: ``[in_features, count]``, fp32 or wider.

    Returns:
        ``[out_features, count]`` in ``right``'s dtype, on the CPU.
    """
    right = right.to(weight.device)
    return torch.cat([weight[rows].to(right.dtype) @ right for rows in _blocks(weight)]).cpu()


def times_weight(left: torch.Tensor, weight: WeightRows) -> torch.Tensor:
    """``left @ W``, block by block on the weight's device.

    Args:
        left: ``[count, out_features]``, fp32 or wider.
        weight: ``[out_features, in_features]``; not modified.

    Returns:
        ``[count, in_features]`` in ``left``'s dtype, on the CPU.
    """
    left = left.to(weight.device)
    total = left.new_zeros(left.shape[0], weight.shape[1])
    for rows in _blocks(weight):
        total += left[:, rows] @ weight[rows].to(left.dtype)
    return total.cpu()


def _blocks(weight: WeightRows) -> list[slice]:
    size = max(1, _ELEMENTS_PER_BLOCK // weight.shape[1])
    return [slice(start, start + size) for start in range(0, weight.shape[0], size)]


# Elements of ``b`` that are scaled at once: 1 MB in fp32. The allocator returns larger temporaries
# to the system after every adapter, and touching fresh memory then took a quarter of the time.
_BATCH_ELEMENTS = 1 << 18


class Scaled(NamedTuple):
    """``scaling · b (a x)`` of LoRA, with the file's factors ``[rank, in]`` and ``[out, rank]``.

    The factors of all modules are rounded together, which is faster. The scaling is recorded.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


# An operator of a module, as a method makes it.
Piece = Operator | Scaled


def low_rank(a: torch.Tensor, b: torch.Tensor) -> LowRank:
    """``Δ(x) = b (a x)``, from ``[rank, in]`` and ``[out, rank]``."""
    return LowRank(a, b.T)


def sparse(
    rows: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, shape: tuple[int, int]
) -> Sparse:
    """Entries of a weight ``[out, in]``, in any order.

    Entries at the same position are added up.
    """
    flat = rows.to(torch.int64) * shape[1] + columns.to(torch.int64)
    places, order = flat.unique(return_inverse=True)
    wide = torch.promote_types(values.dtype, torch.float32)
    summed = torch.zeros(len(places), dtype=wide).index_add_(0, order, values.to(wide))
    starts = torch.searchsorted(places // shape[1], torch.arange(shape[0] + 1))
    columns = (places % shape[1]).to(torch.int32).to(torch.uint16)
    return Sparse(summed, columns, starts.to(torch.int32))


def _rounded(factors: Mapping[str, Scaled], dtype: torch.dtype) -> dict[str, LowRank]:
    """Scales ``b`` of all modules in fp32 and rounds once, for many modules of one shape at a time.

    Args:
        factors: The factors by module, in the file's dtype.
        dtype: Serving dtype.

    Returns:
        The factors by module; they may be any views until ``finish`` copies them into a block.
    """
    alike: dict[tuple[object, ...], list[str]] = {}
    for name, (a, b, scaling) in factors.items():
        alike.setdefault((a.shape, a.dtype, b.shape, b.dtype, scaling), []).append(name)
    folded: dict[str, LowRank] = {}
    for group in alike.values():
        size = max(1, _BATCH_ELEMENTS // max(1, factors[group[0]].b.numel()))
        for start in range(0, len(group), size):
            names = group[start : start + size]
            batch = [factors[name] for name in names]
            a_of: Sequence[torch.Tensor] = [one.a for one in batch]
            if a_of[0].dtype != dtype:
                a_of = torch.stack(list(a_of)).to(dtype).unbind()
            b = torch.stack([one.b for one in batch])
            # Torch multiplies 16-bit tensors by a number in fp32 and rounds the result once.
            b = b if b.dtype == dtype else b.to(torch.promote_types(dtype, torch.float32))
            b = b.mul_(batch[0].scaling).to(dtype).transpose(1, 2).contiguous()
            folded |= zip(names, map(LowRank, a_of, b.unbind()), strict=True)
    return {name: folded[name] for name in factors}


class Assembly:
    """Collects the operators of modules, in the serving dtype.

    Each operator is rounded as soon as it is added. Only the factors of LoRA (``Scaled``) are
    rounded together at the end.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        # None stands for a low-rank update that is rounded later, with those of other modules.
        self._made: dict[str, list[Operator | None]] = {}
        self._factors: dict[str, Scaled] = {}

    @property
    def scalings(self) -> dict[str, float]:
        """The scaling that was folded into ``b`` of a LoRA, by module."""
        return {name: factors.scaling for name, factors in self._factors.items()}

    def add(self, name: str, pieces: Piece | Iterable[Piece]) -> None:
        """Adds the operators of a module; without any, the module is unchanged."""
        made: list[Operator | None] = []
        for piece in [pieces] if isinstance(pieces, Operator | Scaled) else pieces:
            if isinstance(piece, Scaled):
                self._factors[name] = piece
            made.append(None if isinstance(piece, Scaled) else piece.rounded(self._dtype))
        if made:
            self._made[name] = made

    def modules(self, order: Iterable[str] | None = None) -> dict[str, ModuleOperators]:
        """All modules, in the given order or else in the order in which they were added."""
        for name, update in _rounded(self._factors, self._dtype).items():
            made = self._made[name]
            made[made.index(None)] = update
        names = self._made if order is None else [name for name in order if name in self._made]
        return {name: ModuleOperators(*self._made[name]) for name in names}


@dataclass(frozen=True, slots=True)
class Lowered:
    """An adapter as operators.

    Attributes:
        operators: CPU tensors that own their memory.
        ranks: Distinct ranks, ascending.
        base_model: The base that the checkpoint names, or "".
        warnings: Warnings for the server's operator. None of them means that the result is inexact.
        scalings: The scaling that a method folded into a module's ``b``, by module path; 1 for
            modules that are missing here.
        components: Digests of the adapters from which it is built.
        depends_on_base: Whether the operators were computed from the base's weights or biases. If
            so, the adapter is lowered again when a merge changes the base.
        head: The labels and problem type of its classification head, or None.
        vocab_size: Number of rows of its vocabulary, if it differs from the base's; otherwise 0.
    """

    operators: AdapterOperators
    ranks: tuple[int, ...]
    base_model: str
    warnings: tuple[Text, ...] = ()
    scalings: Mapping[str, float] = field(default_factory=dict)
    components: tuple[str, ...] = ()
    depends_on_base: bool = True
    head: Head | None = None
    vocab_size: int = 0

    @property
    def num_bytes(self) -> int:
        return self.operators.num_bytes

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Distinct last components of the adapted paths, ascending."""
        operators, tokens = self.operators, self.operators.tokens
        if operators.attention:
            return ("self_attn",)
        found = {*operators.modules, *(operators.experts or ())}
        if tokens is not None and (tokens.changes_embedding or tokens.added is not None):
            found.add(EMBEDDING)
        if operators.head is not None or (
            tokens is not None and (tokens.head is not None or tokens.added is not None)
        ):
            found.add(HEAD)
        return tuple(sorted({name.rpartition(".")[2] for name in found}))

    def facts(self, checkpoint: AdapterCheckpoint, method: str) -> AdapterFacts:
        """The facts to keep, without weights, about the adapter and its checkpoint."""
        prompt, router = self.operators.soft_prompt, self.operators.router
        positions = 0 if prompt is None else prompt.num_positions
        is_prefix = prompt is not None and prompt.prefix is not None
        first_pass = "" if router is None else "adapter" if router.first_pass else "base"
        return AdapterFacts(
            digest=checkpoint.digest,
            method=method,
            ranks=self.ranks,
            target_modules=self.target_modules,
            base_model=self.base_model,
            warnings=self.warnings,
            num_soft_tokens=0 if is_prefix else positions,
            num_prefix_positions=positions if is_prefix else 0,
            bytes_disk=checkpoint.bytes_disk,
            bytes_host=self.num_bytes,
            components=self.components,
            invocation=self.operators.invocation or (),
            labels=() if self.head is None else self.head.labels,
            problem_type="" if self.head is None else self.head.problem_type,
            vocab_size=self.vocab_size,
            first_pass=first_pass,
            chat_template=checkpoint.chat_template,
        )


# The operators of all linear modules of an adapter are in one block of memory.
#
# Hundreds of tensors of all sizes that come and go with thousands of adapters would fragment the
# heap. A block is a separate memory mapping, which is returned to the system as a whole when the
# adapter leaves. Tensors of the same shape are side by side in the order of the layers, so that a
# store whose matrices contain all layers can copy them with one call.


# Every group of tensors begins at a cache line.
_ALIGNMENT = 64


def in_one_block(
    modules: Mapping[str, ModuleOperators],
) -> tuple[dict[str, ModuleOperators], bool]:
    """Copies the tensors of all modules into a block.

    Args:
        modules: Operators by module path, on the CPU; tensors may be any views.

    Returns:
        The same operators, and whether every value is finite.
    """
    before = {name: module.tensors() for name, module in modules.items()}
    if any(tensor.requires_grad for tensors in before.values() for tensor in tensors):
        # Training differentiates these operators and drops them at once, so they need no block.
        return dict(modules), True
    # Sort by layer number, because files list tensors by name: layer 10 before layer 2.
    tensors = [tensor for name in sorted(modules, key=_place) for tensor in before[name]]
    copies, is_finite = _copies(list({id(tensor): tensor for tensor in tensors}.values()))
    after: dict[str, ModuleOperators] = {}
    for name, module in modules.items():
        after[name] = module.with_tensors(copies[id(tensor)] for tensor in before[name])
    return after, is_finite


def _place(name: str) -> list[int | str]:
    """A key that sorts modules by kind, then by layer."""
    parts = re.split(r"(\d+)", name)
    return [*parts[::2], *map(int, parts[1::2])]


def _copies(tensors: Sequence[torch.Tensor]) -> tuple[dict[int, torch.Tensor], bool]:
    """Copies tensors into one block; those of one dtype and shape are copied in one call.

    Returns:
        The copies by ``id`` of the original, and whether every value is finite.
    """
    groups: dict[tuple[torch.dtype, torch.Size], list[torch.Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            groups.setdefault((tensor.dtype, tensor.shape), []).append(tensor)
    sizes = [len(group) * group[0].nbytes for group in groups.values()]
    block = _map_memory(sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes))
    copies = {id(tensor): torch.empty_like(tensor) for tensor in tensors if not tensor.numel()}
    start, is_finite = 0, True
    for (dtype, shape), group in groups.items():
        size = len(group) * group[0].nbytes
        place = block[start : start + size].view(dtype).view(len(group), *shape)
        torch.stack(group, out=place)
        is_finite = is_finite and all_finite(place)
        copies.update((id(t), copy) for t, copy in zip(group, place.unbind(), strict=True))
        start += -(-size // _ALIGNMENT) * _ALIGNMENT
    return copies, is_finite


def _map_memory(num_bytes: int) -> torch.Tensor:
    """A separate memory mapping, ``[num_bytes]`` uint8, which is freed with its last view."""
    if not num_bytes or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(num_bytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # With huge pages, touching 7 MB for the first time takes 1.1 ms instead of 3 ms.
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


_NOTHING: Mapping[str, ModuleOperators] = MappingProxyType({})


def finish(
    reading: Reading,
    modules: Mapping[str, ModuleOperators] = _NOTHING,
    *,
    prompt: SoftPrompt | None = None,
    scalings: Mapping[str, float] = MappingProxyType({}),
) -> Lowered:
    """Puts the operators into one block of memory, checks them for overflows, and summarises them.

    Args:
        reading: The adapter. Biases that replace the base's are added to the operators.
        modules: Operators of linear modules, by path; tensors may be any views.
        prompt: Soft tokens, or keys and values, to put before the prompt.
        scalings: See ``Lowered``.

    Raises:
        AdapterCheckpointError: Values are not finite in the serving dtype. The error lists all of
            them.
    """
    base, findings = reading.model, reading.findings
    blocked, is_finite = in_one_block(_with_biases(modules, reading.biases, base))
    if not is_finite:
        for name, module in blocked.items():
            if not all(map(all_finite, module.tensors())):
                findings.add(name, say("NOT_FINITE", dtype=base.dtype))
    if prompt is not None and not all(map(all_finite, prompt.tensors())):
        findings.add(PROMPT_EMBEDDINGS, say("NOT_FINITE", dtype=base.dtype))
    findings.raise_if_any()
    ranks = set(reading.ranks.values()).union(*(one.ranks for one in reading.components))
    difference = base_difference(reading.checkpoint, base)
    return Lowered(
        operators=AdapterOperators(MappingProxyType(blocked), prompt),
        ranks=tuple(sorted(ranks - {0})),
        base_model=reading.config.get("base_model_name_or_path") or "",
        warnings=(
            *reading.targets.warnings,
            *((difference,) if difference else ()),
            *((say("NO_CONV1D"),) if reading.config.get("fan_in_fan_out") is True else ()),
            *reading.warnings,
        ),
        scalings=scalings,
        components=tuple(component.ref.digest for component in reading.components),
        depends_on_base=reading.depends_on_base or bool(reading.biases),
    )


def _with_biases(
    operators: Mapping[str, ModuleOperators], biases: Mapping[str, torch.Tensor], base: BaseModel
) -> dict[str, ModuleOperators]:
    """Adds biases that replace the base's, as differences; the base has each of these biases."""
    result = dict(operators)
    for name, bias in biases.items():
        served = base.modules[name].bias
        assert served is not None  # the reader checked that there is one
        # The file holds the whole bias, but the operator is added to the base's bias.
        change = bias.to(torch.float32) - served.to(torch.float32).cpu()
        before = result.get(name, ModuleOperators())
        whole = change if before.bias is None else before.bias + change
        result[name] = before.with_operator(Bias(whole))
    return result


Pieces = Piece | Iterable[Piece]


@dataclass(frozen=True, kw_only=True)
class Method(FileFormat):
    """An adapter method whose tensors are not those of linear modules.

    A method's file in ``methods/`` binds a ``Method`` or ``LinearMethod`` to the name ``METHOD``.

    Attributes:
        check: Reports faults of names, shapes and dtypes. The base may be known only by its sizes.
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
        start: How training starts from scratch; None if turret cannot start it.
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


def find_components(reading: Reading) -> list[Component]:
    """Finds the adapter's components, in the config's order; each has only low-rank updates.

    Raises:
        AdapterComponentError: The error lists the components that are not registered.
        AdapterCheckpointError: The error lists the components that cannot be fused, with reasons.
    """
    components: list[Component] = []
    missing: list[tuple[str, str]] = []
    for ref in component_refs(reading.config):
        try:
            components.append(reading.find_component(ref))
        except AdapterComponentError as error:
            missing += error.violations
    if missing:
        found = "; ".join(text for _, text in missing)
        raise AdapterComponentError(
            say("COMPONENTS_MISSING", path=reading.path, found=say("FINDINGS", found=found)),
            violations=missing,
        )
    check_fusable(components, reading.path)
    reading.components = components
    return components


def check_fusable(components: Sequence[Component], path: str) -> None:
    """Rejects components that have anything but low-rank updates.

    Raises:
        AdapterCheckpointError: The error lists these components, with the reasons, under the
            fusion's ``path``.
    """
    findings = Findings(path)
    for component in components:
        if others := beyond_low_rank(component.operators):
            why = f"only low-rank updates can be fused, and it also has: {', '.join(others)}"
            findings.add(COMPONENTS_KEY, unfit(component, why))
    findings.raise_if_any()


def update_of(component: Component, name: str) -> LowRank | None:
    """A component's low-rank update of a module, or None."""
    ops = component.operators.modules.get(name)
    return ops.low_rank if ops is not None and ops.rank else None


def gate_of(
    updates: Sequence[LowRank | None],
    score_of: Callable[[torch.Tensor], QueryScore | PrototypeScore | GivenScore],
) -> Gate:
    """A gate over components.

    Args:
        updates: Each component's update of the module; None if it has none.
        score_of: Makes, from the factors ``b`` of all components, the score that determines the
            weights of the components for a token.
    """
    some = [update for update in updates if update is not None]
    a = filled_up(torch.cat([update.a for update in some]))
    b = filled_up(torch.cat([update.b for update in some]))
    ranks = [0 if update is None else update.rank for update in updates]
    return Gate(a, b, score_of(b), (0, *accumulate(ranks)))


def query_score(
    query: torch.Tensor, keys: torch.Tensor, b: torch.Tensor, dtype: torch.dtype
) -> QueryScore:
    """The score of a learned fusion, from ``[d_k, in]`` and ``[d_k, out]``."""
    wide = torch.promote_types(dtype, torch.float32)
    folded = b.to(wide) @ filled_up(keys.to(wide)).T
    return QueryScore(filled_up(query.to(dtype)), folded)


def filled_up(rows: torch.Tensor) -> torch.Tensor:
    """Appends rows of zeros, up to a multiple of ``GATE_MULTIPLE`` rows."""
    return torch.nn.functional.pad(rows, (0, 0, 0, -rows.shape[0] % GATE_MULTIPLE)).contiguous()
