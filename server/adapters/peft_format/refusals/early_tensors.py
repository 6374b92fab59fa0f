"""Where a LoRA's config and the header of its tensors contradict each other, without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.no_adapter import (
    LEFT_OUT,
    NO_TENSORS,
    WHOLE_WEIGHT,
    holds_integers,
    lacks_switch,
    lacks_switched,
)
from turret.server.adapters.checkpoint.safetensors_header import SafetensorsHeader
from turret.server.adapters.checkpoint.tensor_names import (
    canonical_name,
    name_in_training,
    text_prefix,
)
from turret.server.adapters.peft_format.refusals.unserved import peft_type_of
from turret.server.adapters.source import TENSORS_FILE

_A, _LAYERS, _DORA = ".lora_A.weight", "model.layers.", "use_dora"
_MAGNITUDE = "lora_magnitude_vector"
_MAGNITUDES = (f".{_MAGNITUDE}.weight", f".{_MAGNITUDE}", ".weight_m_wdecomp.weight")
_INTEGERS = {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"}
# Keys of LoRAs that have other tensors, or whose modules are named otherwise.
_OTHER_TENSORS = (
    *("use_bdlora", "use_qalora", "arrow_config", "kasa_config", "alora_invocation_tokens"),
    *("velora_config", "monteclora_config", "target_parameters", "layer_replication"),
)
# Parts of names of whole weights that may be served: of vocabularies and of heads.
_MAY_BE_WHOLE = {"embed_tokens", "lm_head", "score", "classifier", "modules_to_save"}


def check_tensors(config: Mapping[str, Any], header: SafetensorsHeader, findings: Findings) -> None:
    """Note what the methods would note of a LoRA or DoRA once the model is there, in their words.

    Of other variants, and of modules outside the decoder layers, nothing is said here.
    """
    if peft_type_of(config) != "LORA" or any(config.get(key) for key in _OTHER_TENSORS):
        return
    if not header.entries:
        findings.add(TENSORS_FILE, NO_TENSORS)
    method = "dora" if config.get(_DORA) is True else "lora"
    names = [canonical_name(entry.name) for entry in header.entries]
    for name, entry in zip(names, header.entries, strict=True):
        if entry.dtype in _INTEGERS:
            findings.add(name, holds_integers(f"torch.{_INTEGERS[entry.dtype]}", method))
        is_whole = name.endswith(".weight") and not name.endswith(_MAGNITUDES)
        if is_whole and ".lora_" not in name and _MAY_BE_WHOLE.isdisjoint(name.split(".")):
            findings.add(name, WHOLE_WEIGHT)
    modules = [
        name.removesuffix(_A) for name in names if name.startswith(_LAYERS) and name.endswith(_A)
    ]
    _check_magnitudes(config, set(names), modules, findings)
    prefix = text_prefix(entry.name for entry in header.entries)
    _check_targets(config.get("target_modules"), modules, prefix, findings)


def _check_magnitudes(
    config: Mapping[str, Any], names: set[str], modules: Sequence[str], findings: Findings
) -> None:
    is_on = config.get(_DORA) is True
    for module in modules:
        is_there = any(module + suffix in names for suffix in _MAGNITUDES)
        if is_there and not is_on:
            findings.add(f"{module}.{_MAGNITUDE}", lacks_switch(_DORA))
        if is_on and not is_there:
            findings.add(f"{module}.{_MAGNITUDE}", lacks_switched(_DORA))


def _check_targets(
    targets: object, modules: Sequence[str], prefix: str, findings: Findings
) -> None:
    """Note each module that a list of targets leaves out; of an expression, the base decides."""
    if not isinstance(targets, list) or not all(isinstance(one, str) for one in targets):
        return
    targets = [_in_one_way(one) for one in targets]
    suffixes = tuple(f".{one}" for one in targets)
    for module in modules:
        name = _in_one_way(name_in_training(module, prefix))
        if name not in targets and not name.endswith(suffixes):
            findings.add(f"{module}{_A}", LEFT_OUT)


def _in_one_way(name: str) -> str:
    """A block of experts has two names in files, and one where it is served."""
    return name.replace("block_sparse_moe.", "mlp.")
