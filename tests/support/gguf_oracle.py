"""transformers' reading of a GGUF file, and equality of architectures up to fp32."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from turret.server.models.decoding import Arch, Rope


def transformers_state(file: Path) -> dict[str, torch.Tensor]:
    """The weights in bf16 that transformers reads, without a tied head."""
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    state: dict[str, torch.Tensor] = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return state


def near(found: Any, expected: Any) -> bool:
    """Whether two values are equal, where floats may differ by a rounding to fp32."""
    if isinstance(found, Rope):
        scales = found.scaling == pytest.approx(expected.scaling, rel=1e-6)
        pairs = (found.inv_freq, expected.inv_freq), (found.long_inv_freq, expected.long_inv_freq)
        return scales and all(
            ours is theirs
            or (ours is not None and theirs is not None and torch.allclose(ours, theirs, rtol=1e-6))
            for ours, theirs in pairs
        )
    if dataclasses.is_dataclass(found):
        names = [field.name for field in dataclasses.fields(found)]
        return all(near(getattr(found, name), getattr(expected, name)) for name in names)
    if isinstance(found, float):
        return found == pytest.approx(expected, rel=1e-6)
    return bool(found == expected)


def assert_alike(found: Arch, expected: Arch) -> None:
    for field in dataclasses.fields(found):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        if field.name == "ropes":
            assert ours.keys() == theirs.keys()
            assert all(near(ours[kind], theirs[kind]) for kind in ours)
        else:
            assert near(ours, theirs), (field.name, ours, theirs)
