"""Answers of the base model and of the trained adapter to a few validation prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from turret.training.base_model import without_peft_warnings
from turret.training.examples import Encoded

# Longer answers say little more about a run, and every token takes a pass through the model.
_MOST_TOKENS = 64


def _nobody(done: int, total: int) -> None:
    """A listener that does nothing."""


def draw_samples(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Encoded],
    device: str,
    on_progress: Callable[[int, int], None] = _nobody,
) -> list[dict[str, Any]]:
    """Answer greedily, each prompt on its own.

    Args:
        model: The result of a method's ``attach``; not changed.
        tokenizer: transformers' tokenizer.
        examples: The examples. A prompt is the part before the first learned token, or the first
            half if all tokens are learned.
        device: The device of the model.
        on_progress: Called before each answer with the numbers of finished and of all answers.

    Returns:
        Per example ``prompt``, ``turns`` (a chat's prompt as a list of ``[role, content]``),
        ``reference`` (the right answer), ``before`` (the answer of the base model alone), ``after``
        (the answer with the adapter) and ``cut``: which of the keys ``before`` and ``after`` hold
        answers that were cut off. The limit is a little more than the reference's length.
    """
    model.eval()
    total = 2 * len(examples)
    after, before = [], []
    for example in examples:
        on_progress(len(after), total)
        after.append(_answer(model, tokenizer, example, device))
    with model.disable_adapter():
        for example in examples:
            on_progress(len(after) + len(before), total)
            before.append(_answer(model, tokenizer, example, device))
    return [
        {
            "prompt": tokenizer.decode(_prompt(example)),
            "turns": [list(turn) for turn in example.turns],
            "reference": tokenizer.decode(_reference(example), skip_special_tokens=True),
            "before": old.text,
            "after": new.text,
            "cut": [key for key, each in (("before", old), ("after", new)) if each.is_cut],
        }
        for example, old, new in zip(examples, before, after, strict=True)
    ]


def _prompt(example: Encoded) -> tuple[int, ...]:
    length = example.learned.index(True)
    return example.tokens[: length if length > 1 else (len(example.tokens) + 1) // 2]


def _reference(example: Encoded) -> tuple[int, ...]:
    """The learned tokens after the prompt, up to the next turn of another role."""
    start = len(_prompt(example))
    rest = example.learned[start:]
    return example.tokens[start : start + (rest.index(False) if False in rest else len(rest))]


@dataclass(frozen=True, slots=True)
class _Answer:
    text: str
    is_cut: bool


@torch.no_grad()
def _answer(model: Any, tokenizer: Any, example: Encoded, device: str) -> _Answer:
    """Answer greedily, with the forward call that training uses.

    PEFT's ``generate`` would treat the prompt differently. After the first call, the cache contains
    any soft tokens or prefix, so later calls go to the base model. Adapters inside its layers still
    work there.
    """
    prompt = _prompt(example)
    answer: list[int] = []
    call, tokens = model, list(prompt)
    past: dict[str, Any] = {}
    if example.start is not None:
        past["alora_offsets"] = [len(prompt) - example.start]
    for _ in range(min(_MOST_TOKENS, 2 * len(_reference(example)) + 8)):
        with without_peft_warnings():
            output = call(input_ids=torch.tensor([tokens], device=device), use_cache=True, **past)
        answer.append(int(output.logits[0, -1].argmax()))
        if answer[-1] == tokenizer.eos_token_id:
            break
        # Late 5.x versions of transformers use the first name, earlier ones the second.
        name = "cache" if "cache" in output else "past_key_values"
        call, tokens, past = model.get_base_model(), answer[-1:], {name: output[name]}
        if example.start is not None:
            # aLoRA adds no soft prompt, and only the outer model passes offsets to its layers.
            call, past = model, past | {"alora_offsets": [1]}
    is_cut = answer[-1] != tokenizer.eos_token_id
    text = tokenizer.decode(answer, skip_special_tokens=True)
    # An answer that is cut at the limit may end within a character.
    return _Answer(text.rstrip("\ufffd") if is_cut else text, is_cut)
