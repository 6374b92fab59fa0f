"""A PEFT checkpoint of a method that learns a prompt: one tensor, ``prompt_embeddings``."""

from __future__ import annotations

import torch

from turret.server.adapters.base import BaseModel
from turret.server.adapters.base_name import base_name_warning
from turret.server.adapters.checkpoint import AdapterCheckpoint
from turret.server.adapters.config_keys import (
    COMMON_RULES,
    Irrelevant,
    Rules,
    Used,
    check_config,
    is_one_of,
    is_rank,
)
from turret.server.adapters.finite import all_finite
from turret.server.adapters.lowered import Lowered
from turret.server.adapters.module_checkpoint import Findings
from turret.server.adapters.operators import AdapterOperators
from turret.server.adapters.soft_prompt import SoftPrompt
from turret.server.adapters.violations import Violations
from turret.server.adapters.vocabulary_config import is_head_to_save

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
    config, violations = checkpoint.config, findings.violations
    check_config(config, rules, violations)
    for key in _REQUIRED:
        if key not in config:
            violations.add(key, "is required")
    for name in checkpoint.tensors:
        if name != EMBEDDINGS:
            violations.add(name, f"is not a tensor this method knows; the file holds {EMBEDDINGS}")
    tensor = checkpoint.tensors.get(EMBEDDINGS)
    if tensor is None:
        violations.add(EMBEDDINGS, "is missing")
        return None
    if violations.fields & set(_REQUIRED):
        return None
    shape = config["num_virtual_tokens"], width_per_dim * config["token_dim"]
    return tensor if findings.check_shape(EMBEDDINGS, tensor, shape, of_base=False) else None


def finish_prompt(prompt: SoftPrompt, checkpoint: AdapterCheckpoint, base: BaseModel) -> Lowered:
    """Checks that nothing overflowed, and sums up.

    Raises:
        AdapterCheckpointError: A value is not finite in the serving dtype.
    """
    violations = Violations()
    if not all(map(all_finite, prompt.tensors())):
        violations.add(EMBEDDINGS, f"is not finite once rounded to {base.dtype}")
    violations.raise_if_any(checkpoint.path)
    base_model = checkpoint.config.get("base_model_name_or_path") or ""
    warning = base_name_warning(base_model, base.name)
    is_prefix = prompt.prefix is not None
    return Lowered(
        operators=AdapterOperators({}, prompt),
        ranks=(),
        target_modules=(),
        base_model=base_model,
        warnings=(warning,) if warning else (),
        num_soft_tokens=0 if is_prefix else prompt.num_positions,
        num_prefix_positions=prompt.num_positions if is_prefix else 0,
        depends_on_base=False,
    )
