"""Qwen2 and Qwen2.5: biases on q, k and v if the checkpoint has them; windows in some layers.

The text part of Qwen2.5-VL has the same architecture. Its rotary positions have three axes, for
time, height and width (M-RoPE, arXiv 2409.12191, section 2.1), which are equal for text.
"""

from __future__ import annotations

from typing import Any

from turret.server.models.decoding.arch import Arch
from turret.server.models.family import Family, read_decoder, read_windows


def _read(config: Any) -> Arch:
    return read_decoder(config, windows=read_windows(config))


FAMILY = Family(("qwen2", "qwen2_5_vl_text"), _read, text_part_of={"qwen2_5_vl": "qwen2_5_vl_text"})
