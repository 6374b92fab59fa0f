"""Mistral and Ministral: windows in every layer, in none, or in some.

Mistral Small 3.1 and later, and Ministral 3, consist of one of these and a vision tower.
"""

from __future__ import annotations

from typing import Any

from turret.server.models.decoding.arch import Arch, QueryGrowth
from turret.server.models.family import Family, read_windowed


def _read_3(config: Any) -> Arch:
    """Read Ministral 3: queries grow with their position, as in Llama 4."""
    rope = config.rope_parameters
    beta = rope.get("llama_4_scaling_beta")
    growth = beta and QueryGrowth(float(beta), int(rope["original_max_position_embeddings"]))
    return read_windowed(config, query_growth=growth or None)


FAMILY = Family(
    {"mistral": read_windowed, "ministral": read_windowed, "ministral3": _read_3},
    text_part_of={"mistral3": "mistral"},
    head_dims={"ministral3": 128},
)
