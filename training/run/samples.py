"""Answers to a few validation prompts, of the base model and of the trained adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from turret.training.data.encode import Encoded
from turret.training.peft_warnings import without_peft_warnings

# Longer answers tell no more about a run; on a CPU every token costs a pass through the model.
_MOST_TOKENS = 64


def draw_samples(
    model: Any, tokenizer: Any, examples: Sequence[Encoded], device: str
) -> list[dict[str, str]]:
    """Answer greedily, each prompt on its own.

    Args:
        model: Of a method's ``attach``; only read.
        tokenizer: transformers'.
        examples: Their tokens before the first one learned are the prompt, or where all are learned
            the first half of them.
        device: Of the model.

    Returns:
        Per example ``prompt``, ``reference`` (the right answer), ``before`` (the base model alone)
        and ``after`` (with the adapter); answers are cut a little past the reference's length.
    """
    model.eval()
    after = [_answer(model, tokenizer, example, device) for example in examples]
    with model.disable_adapter():
        before = [_answer(model, tokenizer, example, device) for example in examples]
    return [
        {
            "prompt": tokenizer.decode(_prompt(example)),
            "reference": tokenizer.decode(
                example.tokens[len(_prompt(example)) :], skip_special_tokens=True
            ),
            "before": old,
            "after": new,
        }
        for example, old, new in zip(examples, before, after, strict=True)
    ]


def _prompt(example: Encoded) -> tuple[int, ...]:
    length = example.learned.index(True)
    return example.tokens[: length if length > 1 else (len(example.tokens) + 1) // 2]


@torch.no_grad()
def _answer(model: Any, tokenizer: Any, example: Encoded, device: str) -> str:
    """Greedy, by the call that training makes: PEFT's ``generate`` treats prompts differently."""
    prompt = _prompt(example)
    tokens = list(prompt)
    for _ in range(min(_MOST_TOKENS, 2 * (len(example.tokens) - len(prompt)) + 8)):
        with without_peft_warnings():
            output = model(input_ids=torch.tensor([tokens], device=device), use_cache=False)
        tokens.append(int(output.logits[0, -1].argmax()))
        if tokens[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True)
