"""Whether tensors are of modules that the base has, and a LoRA's factors are all there and fit.

That is told from headers alone, without torch. Of the base its width, its layers and what is in
them are known: what its projections take from the residual stream or give to it, in every family
that is served. All other shapes are left to the methods.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.no_adapter import MISSING_FACTOR, lacks_tokenizer
from turret.server.adapters.checkpoint.safetensors_header import SafetensorsHeader
from turret.server.adapters.checkpoint.tensor_names import canonical_name
from turret.server.adapters.operators.module_names import EMBEDDING, HEAD
from turret.server.adapters.peft_format.refusals.base_mismatch import (
    too_many_layers,
    trained_for_another,
)
from turret.server.adapters.source import TOKENIZER_FILE

_A, _B = ".lora_A.weight", ".lora_B.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)")
# Modules by what they take and what they give.
_READS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj")
_WRITES = ("o_proj", "down_proj")
# Whole matrices that have a row for each token.
_ALL_TOKENS = (
    *(f"{EMBEDDING}{end}" for end in (".weight", ".base_layer.weight")),
    f"{HEAD}.weight",
)
# Keys of a LoRA whose factors have other shapes than their module, or other layers than the base.
_OTHER_SHAPES = (
    *("use_bdlora", "use_qalora", "arrow_config"),
    *("target_parameters", "layer_replication"),
)


@dataclass(frozen=True, slots=True)
class BaseSize:
    """What is known of a base before it is read.

    Attributes:
        name: As served.
        hidden_size: Features of its residual stream.
        num_layers: Its layers.
        modules: Paths of a layer's linear modules; empty where they are not known.
        vocab_size: Rows of its embedding; 0 where they are not known.
    """

    name: str
    hidden_size: int
    num_layers: int
    modules: frozenset[str] = frozenset()
    vocab_size: int = 0


def check_pairs(header: SafetensorsHeader, findings: Findings) -> None:
    """Note each factor of a LoRA that is missing though the other one is there."""
    names = {canonical_name(entry.name) for entry in header.entries}
    for entry in header.entries:
        module, role = _factor(canonical_name(entry.name))
        other = module + (_B if role == _A else _A)
        if role and other not in names:
            findings.add(other, MISSING_FACTOR)


def check_tokens(header: SafetensorsHeader, base: BaseSize, findings: Findings) -> None:
    """Note rows for tokens that the base lacks; of an adapter without a tokenizer of its own."""
    shapes = {canonical_name(entry.name): entry.shape for entry in header.entries}
    rows = max((shapes[name][0] for name in _ALL_TOKENS if shapes.get(name)), default=0)
    if 0 < base.vocab_size < rows:
        findings.add(TOKENIZER_FILE, lacks_tokenizer(rows, base.vocab_size))


def check_modules(
    path: str, config: Mapping[str, Any], header: SafetensorsHeader, base: BaseSize
) -> None:
    """Refuse an adapter of layers or projections that the base has not, or a LoRA of other widths.

    Args:
        path: As messages name the adapter.
        config: Of an adapter of a type that is served.
        header: Of its tensors.
        base: What it is to fit.

    Raises:
        AdapterMismatchError: It does not.
    """
    if any(config.get(key) for key in _OTHER_SHAPES):
        return
    findings = Findings(path, base.name)
    shapes = {canonical_name(entry.name): entry.shape for entry in header.entries}
    of_layers = {name: match for name in shapes if (match := _LAYER.match(name))}
    for name, match in of_layers.items():
        module, role = _factor(name)
        is_there = int(match[1]) < base.num_layers
        if not is_there or _is_other_projection(_factor(match[2]), base):
            module = module if role else name.removesuffix(".weight").rpartition(".")[0]
            findings.mismatch(name, f"the base model has no module {module!r}")
        elif why := _misfit(module, role, shapes[name], base.hidden_size):
            findings.mismatch(module, why)
    causes = too_many_layers(of_layers, base.num_layers), trained_for_another(config, base.name)
    findings.cause = "; ".join(text for text in causes if text)
    findings.raise_if_any()


def _is_other_projection(factor: tuple[str, str], base: BaseSize) -> bool:
    """Whether a LoRA's module, by its path in a layer, is one that no layer of the base has."""
    module, role = factor
    return bool(base.modules and role) and module.endswith("_proj") and module not in base.modules


def _factor(name: str) -> tuple[str, str]:
    """The module, and which of its factors; of another tensor its own name, and ""."""
    role = next((role for role in (_A, _B) if name.endswith(role)), "")
    return name.removesuffix(role), role


def _misfit(module: str, role: str, shape: tuple[int, ...], hidden_size: int) -> str:
    leaf = module.rpartition(".")[2]
    if len(shape) == 2 and role == _A and leaf in _READS and shape[1] != hidden_size:
        return f"takes {shape[1]} features, the base model's {hidden_size}"
    if len(shape) == 2 and role == _B and leaf in _WRITES and shape[0] != hidden_size:
        return f"gives {shape[0]} features, the base model's {hidden_size}"
    return ""
