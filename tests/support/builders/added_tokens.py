"""Adapters trained with more tokens than the base has, saved by PEFT and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from builders.bases.tiny_models import VOCAB_SIZE, tiny_tokenizer
from builders.methods import copy_of, quiet, randomise
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

# A word, two marks of turns and two of tools; padding rows follow them.
WORDS = ["turret"]
MARKS = ["<|user|>", "<|end|>", "<call>", "</call>"]
ADDED = [*WORDS, *MARKS]
FIRST = VOCAB_SIZE
END = FIRST + ADDED.index("<|end|>")
# The vocabulary size after ``pad_to_multiple_of=16``.
ROWS = 272
TEMPLATE = """\
{% for message in messages %}{{ '<|user|>' + message['role'] + ': ' + message['content'] }}\
{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|user|>assistant: ' }}{% endif %}"""


def grown_tokenizer(template: str | None = TEMPLATE) -> Any:
    """The tiny tokenizer with ``ADDED``; its answers end with ``<|end|>``."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(WORDS)
    tokenizer.add_tokens(MARKS, special_tokens=True)
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    assert tokenizer.convert_tokens_to_ids(ADDED) == [*range(FIRST, FIRST + len(ADDED))]
    tokenizer.chat_template = template
    return tokenizer


def resized(model: nn.Module, rows: int, seed: int = 0) -> Any:
    """A copy of a model with another number of tokens; new rows resemble existing ones."""
    copy: Any = copy_of(model)
    with quiet():
        copy.resize_token_embeddings(rows, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for matrix in (copy.get_input_embeddings().weight, copy.get_output_embeddings().weight):
            new = matrix[VOCAB_SIZE:]
            noise = torch.randn(new.shape, generator=generator)
            # Rounded to bf16, the dtype of saved bases and adapters.
            new.copy_((1.5 * matrix.std() * noise).bfloat16())
    return copy


def save_grown(
    model: nn.Module,
    config: PeftConfig,
    directory: Path,
    *,
    rows: int = ROWS,
    seed: int = 1,
    tokenizer: Any = None,
) -> PeftModel:
    """Create an adapter on a resized copy of a model, and save it with its tokenizer.

    Returns:
        The reference model.
    """
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)
        peft_model = get_peft_model(resized(model, rows, seed), config)
        assert isinstance(peft_model, PeftModel)
        randomise(peft_model, seed)
        peft_model.save_pretrained(str(directory), save_embedding_layers=True)
    (tokenizer or grown_tokenizer()).save_pretrained(directory)
    return peft_model.eval()
