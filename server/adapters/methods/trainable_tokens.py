"""Trainable tokens (PEFT's ``TRAINABLE_TOKENS``): only some rows of the embedding are trained.

The file contains the new rows of the tokens that the config lists. With tied embeddings, these are
rows of the output head as well, and PEFT saves them under both names. The rows are read like those
that other methods train in addition to their own tensors.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *
from turret.server.adapters.peft_format.config_rules import fault_of_token_list
from turret.server.adapters.peft_format.vocabulary_checkpoint import trained_modules


def _check(reading: Reading) -> None:
    """Checks the config; the rows are read with the vocabulary's part of the checkpoint."""
    if "token_indices" not in reading.config:
        reading.fault("token_indices", say("REQUIRED"))


def _lower(reading: Reading) -> Lowered:
    trained_modules(reading.config, reading.model, reading.findings)
    for name in reading.checkpoint.tensors:
        reading.fault(name, say("UNKNOWN_TENSOR"))
    return finish(reading)


METHOD = Method(
    name="trainable_tokens",
    peft_types={"TRAINABLE_TOKENS"},
    keys={
        "token_indices": fault_of_token_list,
        "target_modules": fault_of_optional_selector,
    },
    check=_check,
    lower=_lower,
)
