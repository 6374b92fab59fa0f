"""aLoRA (arXiv 2504.12397, ``alora_invocation_tokens``): LoRA from its invocation in the prompt on.

Tokens before the last occurrence of the invocation are computed by the base alone, so that their
keys and values are the base's own; where the prompt does not hold it, all are. PEFT begins with the
invocation's first token.
"""

from __future__ import annotations

from dataclasses import replace

from turret.server.adapters.base import BaseModel
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.lowered import Lowered, Method
from turret.server.adapters.methods.lora.lora import lower_factors
from turret.server.adapters.peft_format.config.lora_rules import INVOCATION, LORA_RULES
from turret.server.adapters.peft_format.config.rules import Rejected, Rules
from turret.server.adapters.peft_format.lora_checkpoint import lora_format, read_lora

_EVERYWHERE = "acts before the invocation too, where the tokens must be the base's"

ALORA_RULES: Rules = {
    **LORA_RULES,
    "bias": Rejected(("none",), _EVERYWHERE),
    "modules_to_save": Rejected((None, []), _EVERYWHERE),
    "trainable_token_indices": Rejected((None, [], {}), _EVERYWHERE),
}


def lower(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None, *_: object
) -> Lowered:
    config, findings = checkpoint.config, Findings(checkpoint.path, base.name)
    form = replace(lora_format(config), rules=ALORA_RULES)
    found = read_lora(checkpoint, base, max_rank, form)
    if checkpoint.is_partial:
        # PEFT has no such layer, and adapts all tokens.
        findings.add("target_modules", f"names the embedding, whose LoRA {_EVERYWHERE}")
    tokens = tuple(config[INVOCATION])
    if max(tokens) >= base.vocabulary.size:
        why = f"holds {max(tokens)}, the base model has {base.vocabulary.size} tokens"
        findings.mismatch(INVOCATION, why)
    findings.raise_if_any()
    lowered = lower_factors(checkpoint, base, found)
    return replace(lowered, operators=replace(lowered.operators, invocation=tokens))


METHOD = Method(
    "alora",
    {"LORA"},
    ALORA_RULES,
    lower,
    accepts=lambda config: isinstance(config.get(INVOCATION), list),
)
