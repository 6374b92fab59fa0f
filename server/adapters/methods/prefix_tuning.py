"""Prefix tuning (arXiv 2101.00190): learned keys and values before position 0 of the text."""

from __future__ import annotations

from turret.server.adapters.methods.kit import *
from turret.server.adapters.methods.prompt_kit import KeysAndValues

METHOD = KeysAndValues(
    name="prefix_tuning",
    peft_types={"PREFIX_TUNING"},
    ignored={"prefix_projection": IN_TENSORS, "encoder_hidden_size": IN_TENSORS},
)
