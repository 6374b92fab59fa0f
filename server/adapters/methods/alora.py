"""aLoRA (arXiv 2504.12397, ``alora_invocation_tokens``): LoRA that starts at an invocation.

The base alone computes the tokens before the last occurrence of the invocation, so that their keys
and values are the base's own. If the prompt does not contain the invocation, the base computes all
tokens. As in PEFT, the LoRA starts at the first token of the invocation.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *
from turret.server.adapters.methods.lora import METHOD as LORA
from turret.server.adapters.operators.vocabulary import EMBEDDING
from turret.server.adapters.peft_format.lora_rules import INVOCATION

_EVERYWHERE = "it changes tokens before the invocation, which the base alone must compute"


def _check(adapter: Reading) -> None:
    if adapter.checkpoint.is_partial:
        # PEFT has no aLoRA layer for embeddings: a LoRA on the embedding would adapt all tokens.
        adapter.fault("target_modules", say("UNSUPPORTED_VALUE", value=EMBEDDING, why=_EVERYWHERE))
    last, size = max(adapter.config[INVOCATION]), adapter.base.vocab_size
    if 0 < size <= last:
        why = say("NOT_IN_RANGE", least=0, most=size - 1, value=last)
        adapter.findings.mismatch(INVOCATION, why)


def _complete(lowered: Lowered, adapter: Reading) -> Lowered:
    invocation = tuple(adapter.config[INVOCATION])
    return replace(lowered, operators=replace(lowered.operators, invocation=invocation))


METHOD = replace(
    LORA,
    name="alora",
    accepts=lambda config: isinstance(config.get(INVOCATION), list),
    refused={
        **LORA.refused,
        "bias": (("none",), _EVERYWHERE),
        "modules_to_save": ((None, []), _EVERYWHERE),
        "trainable_token_indices": ((None, [], {}), _EVERYWHERE),
    },
    check_all=_check,
    complete=_complete,
)
