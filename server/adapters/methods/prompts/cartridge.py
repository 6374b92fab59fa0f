"""CARTRIDGE (arXiv 2506.06266): keys and values that began as those of a text."""

from __future__ import annotations

from turret.server.adapters.lowering.prefix import PREFIX_RULES, prefix_method
from turret.server.adapters.peft_format.config.rules import Irrelevant, Rules

CARTRIDGE_RULES: Rules = {
    **PREFIX_RULES,
    "num_frozen_tokens": Irrelevant("training leaves so many alone; the file holds all"),
}

METHOD = prefix_method("cartridge", "CARTRIDGE", CARTRIDGE_RULES)
