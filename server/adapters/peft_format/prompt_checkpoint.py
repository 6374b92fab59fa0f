"""A PEFT checkpoint of a method that learns a prompt: one tensor, ``prompt_embeddings``."""

from __future__ import annotations

import torch

from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.peft_format.config.rules import (
    COMMON_RULES,
    Irrelevant,
    Rules,
    Used,
    check_config,
    is_one_of,
    is_rank,
)
from turret.server.adapters.peft_format.config.vocabulary_rules import is_head_to_save

EMBEDDINGS = "prompt_embeddings"
_REQUIRED = ("num_virtual_tokens", "token_dim")

PROMPT_RULES: Rules = {
    **COMMON_RULES,
    "num_virtual_tokens": Used(is_rank),
    "token_dim": Used(is_rank),
    # Two is for an encoder beside a decoder.
    "num_transformer_submodules": Used(is_one_of(1, None)),
    "num_attention_heads": Irrelevant("only keys and values have heads"),
    "num_layers": Irrelevant("soft tokens enter before the first layer"),
    "modules_to_save": Used(is_head_to_save),
}


def read_prompt(
    checkpoint: AdapterCheckpoint, rules: Rules, width_per_dim: int, findings: Findings
) -> torch.Tensor | None:
    """Checks the config and the one tensor.

    Args:
        checkpoint: As read.
        rules: A rule for every key of the config.
        width_per_dim: Columns of the tensor per ``token_dim``.
        findings: Receives what is wrong.

    Returns:
        ``[num_virtual_tokens, width_per_dim · token_dim]`` in the file's dtype, or None.
    """
    config = checkpoint.config
    check_config(config, rules, findings)
    for key in _REQUIRED:
        if key not in config:
            findings.add(key, "is required")
    for name in checkpoint.tensors:
        if name != EMBEDDINGS:
            findings.add(name, f"is not a tensor this method knows; the file holds {EMBEDDINGS}")
    tensor = checkpoint.tensors.get(EMBEDDINGS)
    if tensor is None:
        findings.add(EMBEDDINGS, "is missing")
        return None
    if findings.fields & set(_REQUIRED):
        return None
    shape = config["num_virtual_tokens"], width_per_dim * config["token_dim"]
    return tensor if findings.check_shape(EMBEDDINGS, tensor, shape, of_base=False) else None
