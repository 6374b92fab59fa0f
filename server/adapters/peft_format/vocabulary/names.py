"""The names under which PEFT saves tensors of the embedding and the head."""

from __future__ import annotations

from collections.abc import Mapping

from turret.lazy_torch import torch
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.operators.module_names import EMBEDDING, HEAD
from turret.server.words import say

WHOLE, FROZEN, ROWS, A, B, MAGNITUDE = "weight", "base", "rows", "a", "b", "magnitude"
_SUFFIXES = {
    # PEFT saves the original matrix along with an adapter that targets the module.
    ".base_layer.weight": FROZEN,
    ".weight": WHOLE,
    ".token_adapter.trainable_tokens_delta": ROWS,
    ".lora_embedding_A": A,
    ".lora_embedding_B": B,
    ".lora_magnitude_vector": MAGNITUDE,
    ".lora_magnitude_vector.weight": MAGNITUDE,
}
LOW_RANK = (A, B, MAGNITUDE)
BY_NAME = {
    module + suffix: (module, role)
    for module in (EMBEDDING, HEAD)
    for suffix, role in _SUFFIXES.items()
    if module == EMBEDDING or role not in LOW_RANK
} | {
    # With a learned prompt, PEFT's prefix is only "base_model.", which leaves these names.
    "embed_tokens.weight": (EMBEDDING, WHOLE),
    f"base_model.{HEAD}.weight": (HEAD, WHOLE),
}
# Maps a role to (name in the file, tensor).
Found = dict[str, tuple[str, "torch.Tensor"]]

# With ``save_embedding_layers``, which a resized vocabulary sets, PEFT also saves the content of
# its wrappers. This maps those additional names to the usual ones.
_WRAPPED = {
    f"{module}{suffix}": f"{module}{usual}"
    for module in (EMBEDDING, HEAD)
    for suffix, usual in (
        (".modules_to_save.weight", ".weight"),
        (".original_module.weight", ".base_layer.weight"),
        (".token_adapter.base_layer.weight", ".base_layer.weight"),
    )
}


def without_wrappers(
    tensors: Mapping[str, torch.Tensor], findings: Findings
) -> Mapping[str, torch.Tensor]:
    """The tensors by their usual names. Reports duplicates that are not equal."""
    if _WRAPPED.keys().isdisjoint(tensors):
        return tensors
    result = {name: tensor for name, tensor in tensors.items() if name not in _WRAPPED}
    for name, usual in _WRAPPED.items():
        if name not in tensors:
            continue
        copy = tensors[name]
        known = result.setdefault(usual, copy)
        is_alike = (known.dtype, known.shape) == (copy.dtype, copy.shape)
        if not is_alike or not torch.equal(known, copy):
            findings.add(name, say("DIFFERENT_COPY", other=usual))
    return result
