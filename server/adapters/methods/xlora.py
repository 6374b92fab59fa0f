"""X-LoRA (arXiv 2402.07148): a first pass weights LoRAs for each token and module.

The first pass, with the base alone or with all LoRAs at a constant scaling, gives every token a
final state ``h``. A small classifier computes scalings from it, and the second pass applies them::

    α = softmax(MLP(h) / T)          y += Σ_k α_k s_k B_k A_k x

The checkpoint contains the classifier. The LoRAs are registered adapters, which the config
identifies by digest, in the order of the classifier's outputs. ``turret convert`` makes both from
PEFT's files.
"""

from __future__ import annotations

import re

from turret.kernels.fusion_gate import given_gate_reference
from turret.server.adapters.lowering import filled_up
from turret.server.adapters.methods.kit import *
from turret.server.adapters.operators.gate import GivenScore
from turret.server.adapters.operators.token_router import TokenRouter

_TENSOR = re.compile(r"base_model\.internal_xlora_classifier\.layers\.(\d{1,4})\.(weight|bias)")
_LAYER = re.compile(r".*?\.layers\.\d+\.")
_MAX_DEPTH = 64
# Modules that transformers creates first in a layer but computes later, by ``model_type``. PEFT
# counts modules in the order of creation.
_MADE_FIRST: Mapping[str, frozenset[str]] = {
    "granitemoehybrid": frozenset({"input_linear", "output_linear"}),
    "phi3": frozenset({"o_proj"}),
}

_DEFAULTS: Mapping[str, Any] = {
    "enable_softmax": True,
    "enable_softmax_topk": False,
    "softmax_temperature": 1.0,
    "top_k_lora": None,
    "scaling_pass_value": 0.0,
    "global_scaling_weight": 1.0,
}


def _layers(reading: Reading) -> Sequence[tuple[Any, Any]]:
    """The classifier's weights and biases in order.

    Checks all sizes except the number of outputs of the last layer.
    """
    config, findings = reading.config, reading.findings
    if COMPONENTS_KEY not in config:
        findings.add(COMPONENTS_KEY, say("PART_OF_XLORA"))
    if findings.fields:
        return []
    step = 3 if config["xlora_dropout_p"] > 0 else 2
    numbers = [step * number for number in range(config["xlora_depth"])]
    found: dict[tuple[int, str], Any] = {}
    for name, tensor in reading.checkpoint.tensors.items():
        parts = _TENSOR.fullmatch(name)
        if parts is None or int(parts[1]) not in numbers:
            findings.add(name, say("UNKNOWN_TENSOR"))
        else:
            found[int(parts[1]), parts[2]] = tensor
    width, made = config["hidden_size"], []
    for number in numbers:
        weight, bias = (found.get((number, kind)) for kind in ("weight", "bias"))
        label = f"internal_xlora_classifier.layers.{number}"
        if weight is None or bias is None:
            findings.add(label, say("PART_OF_XLORA"))
            continue
        rows = weight.shape[0] if weight.shape else 0
        outputs = rows if number == numbers[-1] else config["xlora_size"]
        findings.check_shape(f"{label}.weight", weight, (outputs, width), of_base=False)
        findings.check_shape(f"{label}.bias", bias, (outputs,), of_base=False)
        width = outputs
        made.append((weight, bias))
    hidden, served = config["hidden_size"], reading.base.hidden_size
    if hidden != served:
        why = say("DIFFERS_FROM_BASE", value=hidden, expected=served)
        findings.mismatch("hidden_size", why)
    return made


def _lower(reading: Reading) -> Lowered:
    base, components = reading.model, find_components(reading)
    updates = {name: [update_of(one, name) for one in components] for name in base.modules}
    adapted = [n for n in modules_in_order(base) if any(one is not None for one in updates[n])]
    router = _router(reading, len(adapted))
    assembly = Assembly(base.dtype)
    for number, name in enumerate(adapted):
        score = GivenScore(number)
        assembly.add(name, gate_of(updates[name], lambda _, score=score: score))
    lowered = finish(reading, assembly.modules())
    return replace(lowered, operators=replace(lowered.operators, router=router))


def modules_in_order(base: BaseModel) -> list[str]:
    """The base's linear modules, in PEFT's order."""
    first = _MADE_FIRST.get(base.model_type, frozenset())
    layers: dict[str, list[str]] = {}
    for name in base.modules:
        layer = _LAYER.match(name)
        layers.setdefault("" if layer is None else layer[0], []).append(name)
    return [
        name
        for names in layers.values()
        for name in sorted(names, key=lambda name: name.rpartition(".")[2] not in first)
    ]


def _router(reading: Reading, modules: int) -> TokenRouter:
    """The classifier for the components in ``modules`` modules.

    Raises:
        AdapterCheckpointError: Its outputs or ``top_k_lora`` do not match the components.
    """
    config, findings = {**_DEFAULTS, **reading.config}, reading.findings
    layers, components = reading.once(_layers), len(reading.components)
    outputs = len(layers[-1][0])
    wanted = components * (modules if config["layerwise_scalings"] else 1)
    if outputs != wanted:
        why = say("WRONG_COUNT", found=outputs, what="outputs", expected=wanted)
        findings.add("internal_xlora_classifier", why)
    top_k = config["top_k_lora"]
    if top_k is not None and top_k > components:
        findings.add("top_k_lora", say("NOT_IN_RANGE", least=1, most=components, value=top_k))
    findings.raise_if_any()
    weights, biases = [], []
    for weight, bias in layers:
        # The hidden states are not padded, but the outputs of a layer are, so the inputs of the
        # next one must be.
        wide = weight.float()
        if weights:
            wide = torch.nn.functional.pad(wide, (0, len(weights[-1]) - wide.shape[1]))
        weights.append(filled_up(wide))
        biases.append(filled_up(bias.float()[:, None])[:, 0].contiguous())
    router = TokenRouter(
        tuple(weights),
        tuple(biases),
        components=components,
        modules=modules,
        is_shared=not config["layerwise_scalings"],
        temperature=float(config["softmax_temperature"]) if config["enable_softmax"] else None,
        top_k=top_k,
        is_renormalised=config["enable_softmax_topk"],
        scale=float(config["global_scaling_weight"]),
    )
    if not config["scaling_pass_value"]:
        return router
    # Constants go through the same top-k and renormalisation as the classifier's output.
    constant = torch.full((1, components), float(config["scaling_pass_value"]))
    gates = given_gate_reference(
        constant, temperature=None, top_k=top_k, is_renormalised=router.is_renormalised
    )
    return replace(router, first_pass=tuple((gates[0] * router.scale).tolist()))


METHOD = Method(
    name="xlora",
    peft_types={"XLORA"},
    keys={
        COMPONENTS_KEY: fault_of_components,
        "hidden_size": fault_of_rank,
        "enable_softmax": fault_of_bool,
        "enable_softmax_topk": fault_of_bool,
        "layerwise_scalings": fault_of_bool,
        "xlora_depth": fault_of_integer(1, _MAX_DEPTH),
        "xlora_size": fault_of_rank,
        "xlora_dropout_p": fault_of_number,
        "softmax_temperature": fault_of_positive,
        "top_k_lora": optional(fault_of_rank),
        "scaling_pass_value": fault_of_number,
        "global_scaling_weight": fault_of_number,
    },
    ignored={
        "adapters": "the digests in components identify the adapters",
        "use_trainable_adapters": IN_TENSORS,
    },
    required=(
        "hidden_size",
        "xlora_depth",
        "xlora_size",
        "xlora_dropout_p",
        "layerwise_scalings",
    ),
    check=lambda reading: reading.once(_layers),
    lower=_lower,
)
