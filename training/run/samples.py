"""Answers of the base model and of the trained adapter to a few validation prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeAlias

import torch

from turret.training.base_model import without_peft_warnings
from turret.training.examples import Encoded

# Longer answers say little more about a run, and every token takes a pass through the model.
_MOST_TOKENS = 64

# Called before each answer with the numbers of finished and of all answers.
Progress: TypeAlias = Callable[[int, int], None]
# Returns the tokens of a greedy answer to a prompt of an example: at most as many as the third
# argument, and with the end-of-text token if the model generated it. The last argument is whether
# the adapter answers.
AnswerPrompt: TypeAlias = Callable[[Sequence[int], Encoded, int, bool], list[int]]


def _nobody(done: int, total: int) -> None:
    """A listener that does nothing."""


def draw_samples(
    answer: AnswerPrompt,
    tokenizer: Any,
    examples: Sequence[Encoded],
    on_progress: Progress = _nobody,
) -> list[dict[str, Any]]:
    """Answer greedily, each prompt on its own.

    Args:
        answer: Answers a prompt.
        tokenizer: transformers' tokenizer.
        examples: The examples. A prompt is the part before the first learned token, or the first
            half if all tokens are learned.
        on_progress: See ``Progress``.

    Returns:
        Per example ``prompt``, ``turns`` (a chat's prompt as a list of ``[role, content]``),
        ``reference`` (the right answer), ``before`` (the answer of the base model alone), ``after``
        (the answer with the adapter) and ``cut``: which of the keys ``before`` and ``after`` hold
        answers that were cut off. The limit is 8 tokens more than twice the reference's length, but
        at most ``_MOST_TOKENS``.
    """
    total = 2 * len(examples)
    texts: dict[str, list[str]] = {"after": [], "before": []}
    cut: list[list[str]] = [[] for _ in examples]
    for key, found in texts.items():
        for number, example in enumerate(examples):
            on_progress(sum(map(len, texts.values())), total)
            most = min(_MOST_TOKENS, 2 * len(_reference(example)) + 8)
            tokens = answer(_prompt(example), example, most, key == "after")
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            if tokens[-1:] != [tokenizer.eos_token_id]:
                cut[number].insert(0, key)
                # An answer that is cut at the limit may end within a character.
                text = text.rstrip("\ufffd")
            found.append(text)
    return [
        {
            "prompt": tokenizer.decode(_prompt(example)),
            "turns": [list(turn) for turn in example.turns],
            "reference": tokenizer.decode(_reference(example), skip_special_tokens=True),
            "before": before,
            "after": after,
            "cut": keys,
        }
        for example, before, after, keys in zip(
            examples, texts["before"], texts["after"], cut, strict=True
        )
    ]


def _prompt(example: Encoded) -> tuple[int, ...]:
    length = example.learned.index(True)
    return example.tokens[: length if length > 1 else (len(example.tokens) + 1) // 2]


def _reference(example: Encoded) -> tuple[int, ...]:
    """The learned tokens after the prompt, up to the next turn of another role."""
    start = len(_prompt(example))
    rest = example.learned[start:]
    return example.tokens[start : start + (rest.index(False) if False in rest else len(rest))]


def model_answers(model: Any, tokenizer: Any, device: str) -> AnswerPrompt:
    """Greedy answers from the forward call of training.

    PEFT's ``generate`` treats prompts differently. After the first call, the cache contains any
    soft tokens or prefix, so later calls go to the base model. Adapters inside its layers still
    work there.

    Args:
        model: The result of a method's ``attach``; not changed.
        tokenizer: transformers' tokenizer.
        device: The device of the model.
    """

    @torch.no_grad()
    def answer(prompt: Sequence[int], example: Encoded, most: int, is_adapted: bool) -> list[int]:
        model.eval()
        found: list[int] = []
        call, tokens = model, list(prompt)
        past: dict[str, Any] = {}
        if example.start is not None:
            past["alora_offsets"] = [len(prompt) - example.start]
        with without_peft_warnings(), nullcontext() if is_adapted else model.disable_adapter():
            for _ in range(most):
                ids = torch.tensor([tokens], device=device)
                output = call(input_ids=ids, use_cache=True, **past)
                found.append(int(output.logits[0, -1].argmax()))
                if found[-1] == tokenizer.eos_token_id:
                    break
                # Late 5.x versions of transformers use the first name, earlier ones the second.
                name = "cache" if "cache" in output else "past_key_values"
                call, tokens, past = model.get_base_model(), found[-1:], {name: output[name]}
                if example.start is not None:
                    # aLoRA adds no soft prompt, and only the outer model passes offsets on.
                    call, past = model, past | {"alora_offsets": [1]}
        return found

    return answer
