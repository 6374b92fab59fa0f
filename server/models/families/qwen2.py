"""Qwen2 and Qwen2.5: biases on q, k and v if the checkpoint has them; windows in some layers.

The text part of Qwen2.5-VL has the same architecture. Its rotary positions have three axes, for
time, height and width (M-RoPE, arXiv 2409.12191, section 2.1), which are equal for text.
"""

from __future__ import annotations

from turret.server.models.family import Family, read_windowed

FAMILY = Family(
    {"qwen2": read_windowed, "qwen2_5_vl_text": read_windowed},
    text_part_of={"qwen2_5_vl": "qwen2_5_vl_text"},
)
