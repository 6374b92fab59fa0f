"""CPT (arXiv 2410.17222): soft tokens initialised with the embeddings of a few examples.

The file has the sum of the embeddings and the learned change. Label masks and loss weights matter
only in training, so inference is the same as for prompt tuning.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *
from turret.server.adapters.methods.prompt_kit import SoftTokens

_LOSS = "weights of the training loss"
_PROJECTION = "limits the steps of training"

METHOD = SoftTokens(
    name="cpt",
    peft_types={"CPT"},
    ignored={
        "cpt_token_ids": START,
        "cpt_mask": _LOSS,
        "cpt_tokens_type_mask": _LOSS,
        "opt_weighted_loss_type": _LOSS,
        "opt_loss_decay_factor": _LOSS,
        "opt_projection_epsilon": _PROJECTION,
        "opt_projection_format_epsilon": _PROJECTION,
        "tokenizer_name_or_path": "reads the examples at initialisation",
    },
)
