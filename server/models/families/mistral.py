"""Mistral 7B and its like: a sliding window in every layer, or in none."""

from __future__ import annotations

from typing import Any

from turret.server.models.decoding.arch import Arch
from turret.server.models.family import Family, read_decoder, read_windows


def _read(config: Any) -> Arch:
    return read_decoder(config, windows=read_windows(config))


FAMILY = Family(("mistral",), _read)
