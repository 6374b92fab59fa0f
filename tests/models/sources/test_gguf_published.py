"""The metadata of a GGUF file of a published size is read like its config.

The keys are those that llama.cpp's converter writes for the published config. Values without a key
must equal those of the released models.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import pytest
from builders.bases.gguf_converters import CONVERTERS
from builders.bases.published_mixtures import MIXTURES
from builders.bases.published_models import MODELS, Published
from gguf_oracle import assert_alike
from transformers import AutoConfig

from turret.server.models.families import read_arch, text_config
from turret.server.models.sources.gguf_file import read_gguf_config

# No key stores its window.
WINDOWS_LOST = "mistralai/Ministral-8B-Instruct-2410"


@dataclass(frozen=True)
class Stored:
    """The parts of a ``ReaderTensor`` from which a config is read."""

    data: np.ndarray
    shape: tuple[int, ...]


def published() -> list[Published]:
    kinds = {"gemma3", "mistral3", *CONVERTERS}
    all_models = (*MODELS, *MIXTURES)
    return [m for m in all_models if m.model_type in kinds and m.repository != WINDOWS_LOST]


@pytest.mark.parametrize("model", published(), ids=lambda model: model.repository)
def test_a_published_file_is_read_as_its_config(model: Published, tmp_path: Path) -> None:
    config = text_config(AutoConfig.from_pretrained(model.write(tmp_path)))
    expected = read_arch(config)
    said = config.to_dict()
    converter = CONVERTERS[said["model_type"]]
    fields: dict[str, Any] = {"general.architecture": converter.architecture}
    for key, value in converter.keys(said).items():
        # A file stores 32-bit floats.
        own = float(np.float32(value)) if isinstance(value, float) else value
        fields[f"{converter.architecture}.{key}"] = own
    sizes = expected.hidden_size, expected.vocab_size
    nothing = np.zeros(0, np.float32)
    tensors = {"token_embd.weight": Stored(nothing, sizes)}
    if not expected.tie_word_embeddings:
        tensors["output.weight"] = Stored(nothing, sizes)
    for name, values in converter.factors(said).items():
        tensors[name] = Stored(values, values.shape)
    stored = cast(dict[str, gguf.ReaderTensor], tensors)
    found, _ = read_gguf_config(tmp_path / "m.gguf", fields, stored)
    assert_alike(read_arch(found), expected)
