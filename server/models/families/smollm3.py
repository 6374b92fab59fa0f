"""SmolLM3: every fourth layer does not rotate queries and keys."""

from __future__ import annotations

from typing import Any

from turret.server.models.decoding.arch import Arch
from turret.server.models.family import Family, read_windowed, without_rope


def _read(config: Any) -> Arch:
    return read_windowed(
        config,
        rope_of_layer=without_rope(config.no_rope_layers, config.num_hidden_layers),
    )


FAMILY = Family({"smollm3": _read})
