"""Soft tokens from a checkpoint, whichever way they were trained."""

from __future__ import annotations

import functools

from turret.server.adapters.base import BaseModel
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.lowered import Lowered, Method
from turret.server.adapters.operators.soft_prompt import SoftPrompt
from turret.server.adapters.peft_format.config.rules import Rules
from turret.server.adapters.peft_format.prompt_checkpoint import read_prompt


def soft_tokens_method(name: str, peft_type: str, rules: Rules) -> Method:
    """A method whose file holds ``prompt_embeddings``, ``[num_virtual_tokens, hidden]``."""
    return Method(name, {peft_type}, rules, functools.partial(_lower, rules))


def _lower(rules: Rules, checkpoint: AdapterCheckpoint, base: BaseModel, *_: object) -> Lowered:
    findings = Findings(checkpoint.path, base.name)
    tensor = read_prompt(checkpoint, rules, 1, findings)
    if tensor is not None and tensor.shape[1] != base.hidden_size:
        why = f"is {tensor.shape[1]}, the base model's hidden size is {base.hidden_size}"
        findings.mismatch("token_dim", why)
    findings.raise_if_any()
    assert tensor is not None  # or there was a fault
    prompt = SoftPrompt(soft_tokens=tensor.to(base.dtype).contiguous())
    return finish(checkpoint, base, prompt=prompt, depends_on_base=False)
