"""LLaMA-Adapter (arXiv 2303.16199): the last layers attend to learned prompts, behind a gate.

    y = o_proj(attention(x) + g · softmax(q K_aᵀ / √d) V_a),    K_a, V_a = k_proj(P), v_proj(P)

``P`` is the layer's prompt, ``q`` the rotated queries; the prompt's keys stand nowhere and are not
rotated. ``K_a`` and ``V_a`` are the same for every token, so they are computed at load, with the
projections served; the scale goes into the keys and the gate into the values. Where ``o_proj`` has
a bias, PEFT adds it once more, whatever the gate.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from turret.server.adapters.base import BaseModel
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.finite import all_finite
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.lowered import Lowered, Method
from turret.server.adapters.lowering.weight_products import weight_times
from turret.server.adapters.operators.adapter_operators import ConstantKv, ModuleOperators
from turret.server.adapters.peft_format.config.rules import (
    COMMON_RULES,
    Rules,
    Used,
    check_config,
    is_one_of,
    is_rank,
)

_NAME = re.compile(r"model\.layers\.(0|[1-9]\d{0,5})\.self_attn\.adaption_(prompt|gate)")
# The models that PEFT can train it on, of those that are served.
_MODEL_TYPES = ("llama", "mistral")

ADAPTION_PROMPT_RULES: Rules = {
    **COMMON_RULES,
    "target_modules": Used(is_one_of("self_attn", None)),
    "adapter_len": Used(is_rank),
    "adapter_layers": Used(is_rank),
}

_Layers = Mapping[int, Mapping[str, torch.Tensor]]


def lower(checkpoint: AdapterCheckpoint, base: BaseModel, *_: object) -> Lowered:
    findings = Findings(checkpoint.path, base.name)
    layers = _read(checkpoint, base, findings)
    findings.raise_if_any()
    constants, biases = {}, {}
    for number, tensors in layers.items():
        attention = f"model.layers.{number}.self_attn"
        constants[number] = _constants(tensors, attention, base)
        bias = base.modules[f"{attention}.o_proj"].bias
        if bias is not None:
            biases[f"{attention}.o_proj"] = ModuleOperators(bias=bias)
        if not all(map(all_finite, constants[number].tensors())):
            findings.add(attention, f"is not finite once rounded to {base.dtype}")
    findings.raise_if_any()
    lowered = finish(checkpoint, base, biases)
    operators = replace(lowered.operators, attention=constants)
    return replace(lowered, operators=operators, target_modules=("self_attn",))


def _read(checkpoint: AdapterCheckpoint, base: BaseModel, findings: Findings) -> _Layers:
    """Prompt ``[1, adapter_len, hidden]`` and gate ``[1]`` of the last layers, by number."""
    config = checkpoint.config
    check_config(config, ADAPTION_PROMPT_RULES, findings)
    for key in ("adapter_len", "adapter_layers"):
        if key not in config:
            findings.add(key, "is required")
    if base.model_type not in _MODEL_TYPES:
        served = " and ".join(_MODEL_TYPES)
        findings.mismatch("peft_type", f"is for {served}, the base model is a {base.model_type}")
    found: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in checkpoint.tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            findings.add(name, "is not a tensor this method knows; every tensor must be used")
        else:
            found.setdefault(int(match[1]), {})[match[2]] = tensor
    if not findings.fields & {"adapter_len", "adapter_layers"}:
        _check(found, config, base, findings)
    return found


def _check(found: _Layers, config: Mapping[str, Any], base: BaseModel, findings: Findings) -> None:
    count = config["adapter_layers"]
    if count > base.num_layers:
        findings.mismatch("adapter_layers", f"is {count}, the base model has {base.num_layers}")
        return
    sizes = {"prompt": (1, config["adapter_len"], base.hidden_size), "gate": (1,)}
    wanted = range(base.num_layers - count, base.num_layers)
    for number in sorted({*wanted, *found}):
        attention, tensors = f"model.layers.{number}.self_attn", found.get(number, {})
        if number not in wanted:
            why = f"is there, but the layers are {wanted.start} to {wanted.stop - 1}"
            findings.mismatch(attention, why)
            continue
        for part, size in sizes.items():
            name, tensor = f"{attention}.adaption_{part}", tensors.get(part)
            if tensor is None:
                findings.add(name, "is missing; adapter_layers counts its layer")
            else:
                # A prompt of another width is sound, for another base.
                is_width = part == "prompt" and tensor.shape[:2] == size[:2] and tensor.ndim == 3
                findings.check_shape(name, tensor, size, of_base=is_width)


def _constants(tensors: Mapping[str, torch.Tensor], attention: str, base: BaseModel) -> ConstantKv:
    wide = torch.promote_types(base.dtype, torch.float32)
    prompt, gate = tensors["prompt"][0].to(wide), tensors["gate"].to(wide)
    made = []
    for leaf, factor in (("k_proj", base.head_dim**-0.5), ("v_proj", gate)):
        module = base.modules[f"{attention}.{leaf}"]
        with base.beside():
            projected = weight_times(module.rows(), prompt.T).T
        if module.bias is not None:
            projected = projected + module.bias.to(wide)
        shaped = (projected * factor).to(base.dtype)
        made.append(shaped.view(-1, base.num_kv_heads, base.head_dim).contiguous())
    return ConstantKv(*made)


METHOD = Method("adaption_prompt", {"ADAPTION_PROMPT"}, ADAPTION_PROMPT_RULES, lower)
