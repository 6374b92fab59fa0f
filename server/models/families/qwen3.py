"""Qwen3: every head of queries and keys is normed; windows in some layers."""

from __future__ import annotations

from typing import Any

from turret.server.models.decoding.arch import Arch
from turret.server.models.family import Family, read_decoder, read_windows


def _read(config: Any) -> Arch:
    return read_decoder(config, windows=read_windows(config), qk_norm="head")


FAMILY = Family(("qwen3",), _read, head_dims={"qwen3": 128})
