"""Qwen2 and Qwen2.5: biases on q, k and v, which the checkpoint tells; windows in some layers."""

from __future__ import annotations

from typing import Any

from turret.server.models.decoding.arch import Arch
from turret.server.models.family import Family, read_decoder, read_windows


def _read(config: Any) -> Arch:
    return read_decoder(config, windows=read_windows(config))


FAMILY = Family(("qwen2",), _read)
