"""From a method's operators to a lowered adapter: one block of memory, checked, summed up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from turret.lazy_torch import torch
from turret.server.adapters.base import BaseModel
from turret.server.adapters.checkpoint.adapter_checkpoint import AdapterCheckpoint
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.finite import all_finite
from turret.server.adapters.checkpoint.tensor_names import PROMPT_EMBEDDINGS
from turret.server.adapters.lowering.arena import in_one_block
from turret.server.adapters.lowering.lowered import Lowered
from turret.server.adapters.operators.adapter_operators import AdapterOperators, ModuleOperators
from turret.server.adapters.operators.module_names import EMBEDDING, HEAD
from turret.server.adapters.operators.soft_prompt import SoftPrompt
from turret.server.adapters.operators.vectors import Bias
from turret.server.adapters.operators.vocabulary import VocabularyOperators
from turret.server.adapters.peft_format.reading import Reading
from turret.server.adapters.peft_format.refusals import base_name_warning
from turret.server.words import Text, say

_NOTHING: Mapping[str, ModuleOperators] = MappingProxyType({})


def finish(
    checkpoint: AdapterCheckpoint,
    base: BaseModel,
    modules: Mapping[str, ModuleOperators] = _NOTHING,
    *,
    found: Reading | None = None,
    prompt: SoftPrompt | None = None,
    tokens: VocabularyOperators | None = None,
    ranks: Iterable[int] | None = None,
    scalings: Mapping[str, float] = MappingProxyType({}),
    components: tuple[str, ...] = (),
    warnings: Iterable[Text] = (),
    depends_on_base: bool = True,
) -> Lowered:
    """Puts the operators into a block of memory, checks that nothing overflowed, and sums up.

    Args:
        checkpoint: The lowered checkpoint.
        base: The base it was lowered for.
        modules: What it does to linear modules, by path; tensors may be views of anything.
        found: What the check of linear modules made of it: its ranks and warnings
            count, and biases that replace the base's are added to the operators.
        prompt: Soft tokens, or keys and values, to put before the prompt.
        tokens: Changes to rows of embedding and head.
        ranks: Replaces the ranks in ``found``.
        scalings: See ``Lowered``.
        components: See ``Lowered``.
        warnings: Warnings in addition to those in ``found``.
        depends_on_base: Whether weights or biases of the base went into the operators. Biases that
            replace the base's always do. True costs a second reading whenever a merge changes the
            base; False is wrong where the base went in.

    Raises:
        AdapterCheckpointError: A value is not finite in the serving dtype (names everything).
    """
    biases = {} if found is None else found.biases
    blocked, is_finite = in_one_block(_with_biases(modules, biases, base))
    findings = Findings(checkpoint.path, base.name)
    if not is_finite:
        for name, module in blocked.items():
            if not all(map(all_finite, module.tensors())):
                findings.add(name, say("NOT_FINITE", dtype=base.dtype))
    if prompt is not None and not all(map(all_finite, prompt.tensors())):
        findings.add(PROMPT_EMBEDDINGS, say("NOT_FINITE", dtype=base.dtype))
    findings.raise_if_any()
    base_model = checkpoint.config.get("base_model_name_or_path") or ""
    name_warning = base_name_warning(base_model, base.name)
    if ranks is None:
        ranks = () if found is None else found.ranks.values()
    positions = 0 if prompt is None else prompt.num_positions
    is_prefix = prompt is not None and prompt.prefix is not None
    return Lowered(
        operators=AdapterOperators(MappingProxyType(blocked), prompt, tokens=tokens),
        ranks=tuple(sorted(set(ranks) - {0})),
        target_modules=tuple(sorted({*_leaves(blocked), *_leaves(_vocabulary_modules(tokens))})),
        base_model=base_model,
        warnings=(
            *(() if found is None else found.targets.warnings),
            *((name_warning,) if name_warning else ()),
            *((say("NO_CONV1D"),) if checkpoint.config.get("fan_in_fan_out") is True else ()),
            *warnings,
        ),
        num_soft_tokens=0 if is_prefix else positions,
        num_prefix_positions=positions if is_prefix else 0,
        scalings=scalings,
        components=components,
        depends_on_base=depends_on_base or bool(biases),
    )


def _with_biases(
    operators: Mapping[str, ModuleOperators], biases: Mapping[str, torch.Tensor], base: BaseModel
) -> dict[str, ModuleOperators]:
    """Adds whole biases that replace those of the base, which has one wherever they do."""
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


def _vocabulary_modules(tokens: VocabularyOperators | None) -> list[str]:
    if tokens is None:
        return []
    is_embedding = tokens.embedding is not None or tokens.low_rank is not None
    return [EMBEDDING] * is_embedding + [HEAD] * (tokens.head is not None)


def _leaves(names: Iterable[str]) -> set[str]:
    """The last components of modules' paths."""
    return {name.rpartition(".")[2] for name in names}
