"""CPT (arXiv 2410.17222): soft tokens that began as the embeddings of a few examples.

The file holds embeddings and what was learned on top in one; label masks and loss weights are
training's alone, so that inference is prompt tuning's.
"""

from __future__ import annotations

from turret.server.adapters.lowering.soft_tokens import soft_tokens_method
from turret.server.adapters.peft_format.config.rules import Irrelevant, Rules
from turret.server.adapters.peft_format.prompt_checkpoint import PROMPT_RULES

_LOSS = Irrelevant("weighs the loss in training")
_PROJECTION = Irrelevant("bounds the steps of training")

CPT_RULES: Rules = {
    **PROMPT_RULES,
    "cpt_token_ids": Irrelevant("sets the starting point of training"),
    "cpt_mask": _LOSS,
    "cpt_tokens_type_mask": _LOSS,
    "opt_weighted_loss_type": _LOSS,
    "opt_loss_decay_factor": _LOSS,
    "opt_projection_epsilon": _PROJECTION,
    "opt_projection_format_epsilon": _PROJECTION,
    "tokenizer_name_or_path": Irrelevant("read with the examples it starts from"),
}

METHOD = soft_tokens_method("cpt", "CPT", CPT_RULES)
