"""Prefix tuning (arXiv 2101.00190): learned keys and values before position 0 of the text."""

from __future__ import annotations

from turret.server.adapters.lowering.prefix import PREFIX_RULES, prefix_method
from turret.server.adapters.peft_format.config.rules import Irrelevant, Rules

_PROJECTION = Irrelevant("the file holds the projection's output")

PREFIX_TUNING_RULES: Rules = {
    **PREFIX_RULES,
    "prefix_projection": _PROJECTION,
    "encoder_hidden_size": _PROJECTION,
    "init_weights": Irrelevant("sets the starting point of training"),
}

METHOD = prefix_method("prefix_tuning", "PREFIX_TUNING", PREFIX_TUNING_RULES)
