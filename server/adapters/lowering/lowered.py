"""The result of lowering a checkpoint: checked operators in one block of memory, and a summary."""

from __future__ import annotations

import mmap
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from turret.lazy_torch import torch
from turret.server.adapters.adapter import AdapterFacts, Head
from turret.server.adapters.base import BaseModel
from turret.server.adapters.checkpoint.adapter_checkpoint import (
    PROMPT_EMBEDDINGS,
    AdapterCheckpoint,
)
from turret.server.adapters.checkpoint.reader import all_finite
from turret.server.adapters.operators.adapter_operators import AdapterOperators, ModuleOperators
from turret.server.adapters.operators.soft_prompt import SoftPrompt
from turret.server.adapters.operators.vectors import Bias
from turret.server.adapters.operators.vocabulary import EMBEDDING, HEAD
from turret.server.adapters.peft_format.reading import Reading
from turret.server.adapters.peft_format.refusals import base_difference
from turret.server.words import Text, say


@dataclass(frozen=True, slots=True)
class Lowered:
    """An adapter as operators.

    Attributes:
        operators: CPU tensors that own their memory.
        ranks: Distinct ranks, ascending.
        base_model: The base that the checkpoint names, or "".
        warnings: Warnings for the operator. None of them means that the result is inexact.
        scalings: The scaling that a method folded into ``b`` of a module; 1 where it is missing.
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


# All operators of an adapter are in one block of memory.
#
# Hundreds of tensors of all sizes that come and go with thousands of adapters would fragment the
# heap. A block is a separate memory mapping, which is returned to the system as a whole when the
# adapter leaves. Tensors of the same shape are side by side in the order of the layers, so that a
# store whose matrices contain all layers needs only one copy.


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
    # Files list tensors by name, which puts layer 10 before layer 2.
    tensors = [tensor for name in sorted(modules, key=_place) for tensor in before[name]]
    copies, is_finite = _copies(list({id(tensor): tensor for tensor in tensors}.values()))
    after: dict[str, ModuleOperators] = {}
    for name, module in modules.items():
        after[name] = module.with_tensors(copies[id(tensor)] for tensor in before[name])
    return after, is_finite


def _place(name: str) -> list[int | str]:
    """Orders modules: by kind, then by layer."""
    parts = re.split(r"(\d+)", name)
    return [*parts[::2], *map(int, parts[1::2])]


def _copies(tensors: Sequence[torch.Tensor]) -> tuple[dict[int, torch.Tensor], bool]:
    """Copies by ``id`` of the original; tensors of one dtype and shape are copied in one call."""
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
    """Separate memory, ``[num_bytes]`` uint8, freed with the last view of it."""
    if not num_bytes or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(num_bytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # With huge pages, touching 7 MB for the first time takes 1.1 ms instead of 3 ms.
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


# The last step of lowering: it moves the operators to one block, checks them and summarises them.


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
        # The file holds the whole bias. Operators are added to the base's, so use the difference.
        change = bias.to(torch.float32) - served.to(torch.float32).cpu()
        before = result.get(name, ModuleOperators())
        whole = change if before.bias is None else before.bias + change
        result[name] = before.with_operator(Bias(whole))
    return result
