"""Soft tokens from a checkpoint, whichever way they were trained."""

from __future__ import annotations

from turret.server.adapters.base import BaseModel
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.finish import finish_prompt
from turret.server.adapters.lowering.lowered import Lowered
from turret.server.adapters.peft_format.prompt_checkpoint import read_prompt
from turret.server.adapters.peft_format.rules import Rules
from turret.server.adapters.soft_prompt import SoftPrompt


def lower_soft_tokens(checkpoint: AdapterCheckpoint, base: BaseModel, rules: Rules) -> Lowered:
    """Takes ``prompt_embeddings``, ``[num_virtual_tokens, hidden]``, as soft tokens.

    Raises:
        AdapterCheckpointError: A key or tensor is unsupported or inconsistent (names all).
        AdapterMismatchError: The embeddings are not as wide as the base's.
    """
    findings = Findings(checkpoint.path, base.name)
    tensor = read_prompt(checkpoint, rules, 1, findings)
    if tensor is not None and tensor.shape[1] != base.hidden_size:
        why = f"is {tensor.shape[1]}, the base model's hidden size is {base.hidden_size}"
        findings.mismatch("token_dim", why)
    findings.raise_if_any()
    assert tensor is not None  # or there was a fault
    soft_tokens = tensor.to(base.dtype).contiguous()
    return finish_prompt(SoftPrompt(soft_tokens=soft_tokens), checkpoint, base)
