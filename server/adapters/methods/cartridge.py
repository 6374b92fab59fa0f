"""CARTRIDGE (arXiv 2506.06266): keys and values that were initialised with those of a text."""

from __future__ import annotations

from turret.server.adapters.methods.kit import *
from turret.server.adapters.methods.prompt_kit import KeysAndValues

METHOD = KeysAndValues(
    name="cartridge",
    peft_types={"CARTRIDGE"},
    ignored={"num_frozen_tokens": IN_TENSORS},
)
