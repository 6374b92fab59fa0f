"""LLaMA-Adapter (arXiv 2303.16199): the last layers attend to learned prompts, behind a gate.

    y = o_proj(attention(x) + g · softmax(q K_aᵀ / √d) V_a),    K_a, V_a = k_proj(P), v_proj(P)

``P`` is the layer's prompt, and ``q`` are the rotated queries. The prompt's keys have no position
and are not rotated. ``K_a`` and ``V_a`` are the same for every token, so they are computed at load
with the served projections. The scale is folded into the keys, and the gate into the values. If
``o_proj`` has a bias, PEFT adds it a second time, whatever the value of the gate.
"""

from __future__ import annotations

import re

from turret.server.adapters.checkpoint.reader import all_finite
from turret.server.adapters.methods.kit import *
from turret.server.adapters.operators.constant_kv import ConstantKv

_NAME = re.compile(r"model\.layers\.(0|[1-9]\d{0,5})\.self_attn\.adaption_(prompt|gate)")
# The supported models that PEFT can train this method on.
_MODEL_TYPES = ("llama", "mistral")


def _layers(reading: Reading) -> Mapping[int, Mapping[str, Any]]:
    """Prompt ``[1, adapter_len, hidden]`` and gate ``[1]`` of the last layers, by layer number."""
    base, findings = reading.base, reading.findings
    if base.model_type not in _MODEL_TYPES:
        served = " and ".join(_MODEL_TYPES)
        why = say("WRONG_MODEL_TYPE", expected=served, model_type=base.model_type)
        findings.mismatch("peft_type", why)
    found: dict[int, dict[str, Any]] = {}
    for name, tensor in reading.checkpoint.tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            findings.add(name, say("UNKNOWN_TENSOR"))
        else:
            found.setdefault(int(match[1]), {})[match[2]] = tensor
    if not findings.fields & {"adapter_len", "adapter_layers"}:
        _check(found, reading)
    return found


def _check(found: Mapping[int, Mapping[str, Any]], reading: Reading) -> None:
    config, base, findings = reading.config, reading.base, reading.findings
    count = config["adapter_layers"]
    if count > base.num_layers:
        why = say("NOT_IN_RANGE", least=1, most=base.num_layers, value=count)
        findings.mismatch("adapter_layers", why)
        return
    sizes = {"prompt": (1, config["adapter_len"], base.hidden_size), "gate": (1,)}
    wanted = range(base.num_layers - count, base.num_layers)
    for number in sorted({*wanted, *found}):
        attention, tensors = f"model.layers.{number}.self_attn", found.get(number, {})
        if number not in wanted:
            findings.mismatch(attention, say("UNEXPECTED_TENSOR", by="adapter_layers"))
            continue
        for part, size in sizes.items():
            name, tensor = f"{attention}.adaption_{part}", tensors.get(part)
            if tensor is None:
                findings.add(name, say("MISSING_TENSOR", by="adapter_layers"))
            else:
                # If only the width is wrong, the prompt may be valid for another base.
                is_width = part == "prompt" and tuple(tensor.shape[:-1]) == size[:2]
                findings.check_shape(name, tensor, size, of_base=is_width)


def _lower(reading: Reading) -> Lowered:
    base, constants, assembly = reading.model, {}, Assembly(reading.dtype)
    reading.depends_on_base = True
    for number, tensors in reading.once(_layers).items():
        attention = f"model.layers.{number}.self_attn"
        constants[number] = _constants(tensors, attention, base)
        served = base.modules[f"{attention}.o_proj"].bias
        if served is not None:
            assembly.add(f"{attention}.o_proj", Bias(served))
        if not all(map(all_finite, constants[number].tensors())):
            reading.fault(attention, say("NOT_FINITE", dtype=base.dtype))
    lowered = finish(reading, assembly.modules())
    return replace(lowered, operators=replace(lowered.operators, attention=constants))


def _constants(tensors: Mapping[str, torch.Tensor], attention: str, base: BaseModel) -> ConstantKv:
    """A layer's ``K_a`` times the scale, and its ``V_a`` times the gate."""
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


METHOD = Method(
    name="adaption_prompt",
    peft_types={"ADAPTION_PROMPT"},
    keys={
        "target_modules": fault_of_choice("self_attn", None),
        "adapter_len": fault_of_rank,
        "adapter_layers": fault_of_rank,
    },
    required=("adapter_len", "adapter_layers"),
    check=lambda reading: reading.once(_layers),
    lower=_lower,
)
