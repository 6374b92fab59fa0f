"""CPT (arXiv 2410.17222): soft tokens initialised with the embeddings of a few examples.

The file contains the sums of these embeddings and the learned changes. Label masks and loss weights
matter only in training, so inference is the same as for prompt tuning.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *
from turret.server.adapters.methods.prompt_kit import SoftTokens

METHOD = SoftTokens(
    name="cpt",
    peft_types={"CPT"},
    ignored={
        "cpt_token_ids": START,
        "cpt_mask": TRAINING,
        "cpt_tokens_type_mask": TRAINING,
        "opt_weighted_loss_type": TRAINING,
        "opt_loss_decay_factor": TRAINING,
        "opt_projection_epsilon": TRAINING,
        "opt_projection_format_epsilon": TRAINING,
        "tokenizer_name_or_path": START,
    },
)
