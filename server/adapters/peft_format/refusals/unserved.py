"""Values of ``peft_type``: those that are served, and what to do with an adapter of another."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from turret.server.basics.closest import did_you_mean

CONVERT = (
    "`turret convert DIR --base MODEL --output NEW`, with the model it was trained on, makes an"
    " exact LoRA of it, which is served"
)
# ``peft_type`` → advice; tests follow it with the PEFT installed.
UNSERVED: Mapping[str, str] = {
    "ADAMSS": f"the clusters of rows it adapts are not in its file; {CONVERT}",
    "PSOFT": f"the factors it turns are not in its file; {CONVERT}",
    "LILY": (
        "its routers average over all tokens of a call, so that no token has a result of its own;"
        " train one of the served methods"
    ),
    "SHADOW": "it is a second model beside the base; train one of the served methods",
}
# What the methods serve; a test compares. A start refuses by it all others, before torch and with
# it the methods are loaded.
SERVED_TYPES = frozenset(
    {
        *("ADALORA", "ADAPTION_PROMPT", "BEFT", "BOFT", "BONE", "C3A", "CARTRIDGE", "CPT", "DEFT"),
        *("DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LN_TUNING"),
        *("LOHA", "LOKR", "LORA", "MISS", "MULTITASK_PROMPT_TUNING", "OFT", "OSF", "PEANUT"),
        *("POLY", "PREFIX_TUNING", "PROMPT_TUNING", "PVERA", "P_TUNING", "RANDLORA", "ROAD"),
        *("SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "TURRET_FUSION", "UNILORA"),
        *("VBLORA", "VERA", "WAVEFT", "XLORA"),
    }
)
_TABLE = "docs/adapters.md has a table of all that are served"


def peft_type_of(config: Mapping[str, Any]) -> str:
    """A config's ``peft_type`` in upper case; "" where it is missing or no text."""
    value = config.get("peft_type")
    return value.upper() if isinstance(value, str) else ""


def why_unserved(kind: str, served: Collection[str]) -> str:
    """What to say of a ``peft_type`` that no method takes.

    Args:
        kind: Of :func:`peft_type_of`.
        served: Those that a method takes, of which one may have been meant.
    """
    if not kind:
        return f"is required: PEFT writes what made the adapter there, such as LORA; {_TABLE}"
    if kind in UNSERVED:
        return f"{kind!r} is not supported by this version: {UNSERVED[kind]}"
    meant = did_you_mean(kind, sorted({*served, *UNSERVED}))
    return f"{kind!r:.60} is not supported by this version{meant}; {_TABLE}"
