"""Examples to token ids, as the server will see them, and which of them to learn.

What stands before an answer is tokenised on its own, and the answer on its own: so it is when the
server tokenises a prompt and the model goes on from there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from turret.training.data.example import Example
from turret.training.data.invocation import Invocation
from turret.training.errors import DataError
from turret.training.settings.config import DataConfig


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example.

    Attributes:
        tokens: Token ids.
        learned: Per token, whether the loss asks for it. The first token never is: nothing
            precedes it.
        turns: Role and content of what stands before the first answer learned, if it is a chat.
        start: The first position that an aLoRA acts on; None where adapters act everywhere.
        labels: The numbers of all labels that hold, where any number may; else None.
    """

    tokens: tuple[int, ...]
    learned: tuple[bool, ...]
    turns: tuple[tuple[str, str], ...] = ()
    start: int | None = None
    labels: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class EncodedSet:
    """A file's examples, and how many were dropped or cut for their length."""

    examples: tuple[Encoded, ...]
    num_dropped: int
    num_truncated: int


def encode_all(
    tokenizer: Any,
    examples: Iterable[Example],
    config: DataConfig,
    max_length: int,
    invocation: Invocation | None = None,
) -> EncodedSet:
    """Encode a file's examples.

    Args:
        tokenizer: transformers'.
        examples: Of one file.
        config: Template, loss, what to do with long examples.
        max_length: Most tokens of an example.
        invocation: Where an aLoRA begins to act; what comes before is not learned.

    Raises:
        DataError: An example cannot be rendered, is too long where that is an error, lacks the
            invocation, or has nothing to learn; or none is left.
    """
    encoded, dropped, truncated, shortest = [], 0, 0, sys.maxsize
    path = None
    for example in examples:
        path = example.path
        item = encode(tokenizer, example, config, invocation)
        length = len(item.tokens)
        if length > max_length:
            if config.too_long == "error":
                problem = f"{length} tokens, data.max_length is {max_length}"
                raise example.error("line", problem)
            learned = item.learned[:max_length]
            item = replace(item, tokens=item.tokens[:max_length], learned=learned)
            if config.too_long == "drop" or not any(item.learned):
                dropped += 1
                shortest = min(shortest, length)
                continue
            truncated += 1
        if not any(item.learned):
            raise example.error("line", "has no token to learn")
        encoded.append(item)
    if not encoded:
        raise none_left(path, max_length, shortest)
    return EncodedSet(tuple(encoded), dropped, truncated)


def none_left(path: Path | None, max_length: int, shortest: int) -> DataError:
    """All of a file's examples are too long; ``shortest`` is the tokens of the shortest of them."""
    return DataError(
        f"{path}: every example is longer than data.max_length = {max_length}: the shortest has"
        f" {shortest} tokens; raise it"
    )


def encode(
    tokenizer: Any, example: Example, config: DataConfig, invocation: Invocation | None = None
) -> Encoded:
    """Encode one example.

    Raises:
        DataError: No chat template, or the template refuses the messages, or it renders an
            earlier turn differently once a later one follows; or it lacks the invocation.
    """
    turns: Sequence[Mapping[str, str]] = ()
    if example.messages is not None:
        turns = example.messages
        pieces = _encode_chat(tokenizer, example, turns)
    elif example.prompt is None:
        pieces = [(_with_end(tokenizer, tokenizer(example.completion)["input_ids"]), True)]
    elif config.template == "chat" or (config.template == "auto" and tokenizer.chat_template):
        turns = [
            {"role": "user", "content": example.prompt},
            {"role": "assistant", "content": example.completion},
        ]
        pieces = _encode_chat(tokenizer, example, turns)
    else:
        answer = tokenizer(example.completion, add_special_tokens=False)["input_ids"]
        prompt = tokenizer(example.prompt)["input_ids"]
        pieces = [(prompt, False), (_with_end(tokenizer, answer), True)]
    tokens = tuple(token for ids, _ in pieces for token in ids)
    is_all = config.loss_on == "all"
    learned = [is_answer or is_all for ids, is_answer in pieces for _ in ids]
    learned[:1] = [False] * len(learned[:1])
    start, shown = None, _turns_before_answer(turns)
    if invocation is not None:
        prompt = tokens[: len(tokens) - len(pieces[-1][0])]
        start = invocation.start_in(prompt, example, tokenizer)
        # Learn nothing before the invocation: when serving, the base computes those tokens.
        first = start + len(invocation.tokens)
        learned[:first] = [False] * first
        shown = tuple((turn["role"], turn["content"]) for turn in turns[:-1])
    return Encoded(tokens, tuple(learned), shown, start)


def encode_prompt(tokenizer: Any, example: Example, config: DataConfig) -> Encoded:
    """Encode what stands before an example's last answer; nothing of it is learned.

    Raises:
        DataError: No chat template, or the template refuses the messages.
    """
    turns: Sequence[Mapping[str, str]] = ()
    if example.messages is not None:
        # Labels stand beside the messages, an answer is their last one.
        turns = example.messages if example.labels is not None else example.messages[:-1]
    elif config.template == "chat" or (config.template == "auto" and tokenizer.chat_template):
        turns = [{"role": "user", "content": example.prompt or ""}]
    if turns or example.messages is not None:
        _check_template(tokenizer, example)
        ids = _ids(tokenizer, _render(tokenizer, example, turns, is_open=True))
    else:
        ids = tokenizer(example.prompt)["input_ids"]
    shown = tuple((turn["role"], turn["content"]) for turn in turns)
    return Encoded(tuple(ids), (False,) * len(ids), shown)


def _check_template(tokenizer: Any, example: Example) -> None:
    if not tokenizer.chat_template:
        raise example.error(
            "messages", "this model has no chat template; use prompt and completion"
        )


def _turns_before_answer(messages: Sequence[Mapping[str, str]]) -> tuple[tuple[str, str], ...]:
    turns = []
    for message in messages:
        if message["role"] == "assistant":
            break
        turns.append((message["role"], message["content"]))
    return tuple(turns)


def _encode_chat(
    tokenizer: Any, example: Example, messages: Sequence[Mapping[str, str]]
) -> list[tuple[list[int], bool]]:
    """(tokens, whether they are the assistant's answer), up to the end of the last answer."""
    _check_template(tokenizer, example)
    pieces: list[tuple[list[int], bool]] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        opened = _render(tokenizer, example, messages[:index], is_open=True)
        closed = _render(tokenizer, example, messages[: index + 1], is_open=False)
        if not (opened.startswith(done) and closed.startswith(opened)):
            problem = "the chat template renders what precedes it differently once it follows"
            raise example.error(f"messages[{index}]", problem)
        pieces.append((_ids(tokenizer, opened[len(done) :]), False))
        answer, rest = _split_at_end(tokenizer, _ids(tokenizer, closed[len(opened) :]))
        pieces += [(answer, True), (rest, False)]
        done = closed
    return pieces[:-1]


def _render(
    tokenizer: Any, example: Example, messages: Sequence[Mapping[str, str]], *, is_open: bool
) -> str:
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=is_open
        )
    except Exception as error:
        # jinja raises many kinds; all of them are about the messages.
        raise example.error("messages", f"chat template: {error}") from error


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a rendered piece: the template has written the special tokens."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _with_end(tokenizer: Any, ids: list[int]) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if ids[-1:] == [end] else [*ids, end]


def _split_at_end(tokenizer: Any, ids: list[int]) -> tuple[list[int], list[int]]:
    """An answer with its end-of-turn token, which is supplied if missing, and what follows."""
    end = tokenizer.eos_token_id
    if end not in ids:
        return [*ids, end], []
    cut = len(ids) - ids[::-1].index(end)
    return ids[:cut], ids[cut:]
