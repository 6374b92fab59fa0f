"""Converts the lines of a data file to token ids, and determines which of them to learn.

A file is JSONL. A line has one of these shapes, and no other keys:

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    {"prompt": "…", "completion": "…"}
    {"text": "…"}

If an example may have any number of labels, labels replace the answer:

    {"messages": [{"role": "user", "content": "…"}], "labels": ["…", "…"]}
    {"prompt": "…", "labels": []}

Blank lines are skipped. Reading needs no torch, so that errors are reported before it is loaded.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from turret.clients.rows import Row, RowError, read_rows
from turret.server.adapters.adapter import MAX_LABEL_CHARS, MAX_LABELS
from turret.server.basics.files import unreadable
from turret.server.engine.scheduling.sequence import last_occurrence
from turret.training.settings import DataConfig
from turret.training.words import ConfigError, DataError, Text, say


@dataclass(frozen=True, slots=True)
class DataFiles:
    """The content of the example files.

    Attributes:
        paths: The files, the training one first.
        train: The examples of the training file; a part of them may be held out later.
        validation: The examples of a separate validation file, or None.
        labels: The classes of a classification, in the head's order; else empty.
        is_multi_label: Whether an example may have any number of labels, not exactly one.
    """

    paths: tuple[Path, ...]
    train: list[Example]
    validation: list[Example] | None
    labels: tuple[str, ...]
    is_multi_label: bool


def read_files(config: DataConfig, folder: Path) -> DataFiles:
    """Read the example files.

    Args:
        config: The config; its paths are relative to ``folder``.
        folder: The directory of the config file.

    Raises:
        DataError: See :func:`read_examples` and :func:`labels_of`; or an example is in both files,
            or has labels where texts are learned.
    """
    names = (config.train, config.validation)
    paths = tuple(folder / name for name in names if name is not None)
    train = read_examples(paths[0])
    # Collect the labels before the split: all lines of a rare label may go to the validation part.
    labels = labels_of(train) if config.task == "classification" else ()
    is_multi_label = bool(labels) and train[0].labels is not None
    validation = None
    if config.validation is not None:
        validation = read_examples(paths[1])
        if labels:
            check_labelled(validation, is_multi_label=is_multi_label)
        _check_disjoint(train, validation)
    if not labels:
        _check_answered([*train, *(validation or ())])
    return DataFiles(paths, train, validation, labels, is_multi_label)


def num_set_aside(num_examples: int, fraction: float) -> int:
    """The number of examples to hold out: at least one, but not all.

    It is 0 if the share is 0 or if there is only one example.
    """
    if fraction == 0 or num_examples < 2:
        return 0
    return min(max(1, round(num_examples * fraction)), num_examples - 1)


def num_shared(train: Sequence[Example], held_out: Sequence[Example]) -> int:
    """The number of held-out examples that occur again among the training examples."""
    seen = {_content(example) for example in train}
    return sum(_content(example) in seen for example in held_out)


def check_compared(files: DataFiles, config: DataConfig) -> None:
    """Reject a sweep without validation examples, because a sweep compares validation losses.

    Args:
        files: The result of :func:`read_files`.
        config: The config by which they were read.

    Raises:
        ConfigError: There are no validation examples; the error names the number of examples.
    """
    fraction, there = config.validation_fraction, len(files.train)
    if files.validation is not None or num_set_aside(there, fraction):
        return
    text = say("VALIDATION_EMPTY", path=files.paths[0], found=there)
    raise ConfigError.of("data.validation_fraction", text)


def _content(example: Example) -> object:
    messages = example.messages and tuple((m["role"], m["content"]) for m in example.messages)
    return messages, example.prompt, example.completion, example.labels


def _check_answered(examples: Sequence[Example]) -> None:
    for example in examples:
        if example.labels is not None:
            raise example.error("labels", say("LABELS_NEED_CLASSIFICATION"))


def _check_disjoint(train: Sequence[Example], validation: Sequence[Example]) -> None:
    seen = {_content(example): example.line for example in train}
    for example in validation:
        line = seen.get(_content(example))
        if line is not None:
            raise example.error(None, say("ALSO_IN_TRAINING", line=line))


@dataclass(frozen=True, slots=True)
class Example:
    """One line of a file.

    Attributes:
        path: The path of the file.
        line: The line, from 1.
        messages: Chat messages, with ``role`` and ``content``; else None.
        prompt: The prompt; None for chat and plain text.
        completion: The text to learn after the prompt, or the whole plain text.
        labels: The right labels, each once, if the line has labels and no answer; else None.
    """

    path: Path
    line: int
    messages: tuple[Mapping[str, str], ...] | None = None
    prompt: str | None = None
    completion: str = ""
    labels: tuple[str, ...] | None = None

    def error(self, field: str | None, problem: Text) -> DataError:
        """The error for a field of this example, or for the whole example."""
        return DataError.of(self.path, self.line, field, problem)


def read_examples(path: Path) -> list[Example]:
    """Read a file.

    Raises:
        DataError: The file cannot be read, or is empty, or a line is malformed (the first is
            named).
    """
    try:
        return [_example(row) for row in read_rows(path, is_training=True)]
    except OSError as error:
        raise DataError(unreadable(path, error)) from error
    except RowError as error:
        raise DataError(error.problem, error.place) from error


def data_digest(*paths: Path) -> str:
    """SHA-256, hex, over the bytes of the files, each preceded by its length."""
    digest = hashlib.sha256()
    for path in paths:
        data = path.read_bytes()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def _example(row: Row) -> Example:
    keys, values = set(row.values), row.values
    if keys == {"messages"}:
        return Example(row.path, row.line, messages=row.turns())
    if keys == {"messages", "labels"}:
        labels = row.labels()
        return Example(row.path, row.line, messages=row.turns(is_answered=False), labels=labels)
    if keys == {"text"}:
        return Example(row.path, row.line, completion=row.text("text", values["text"]))
    if keys not in ({"prompt", "labels"}, {"prompt", "completion"}):
        raise row.shape_error()
    if "labels" in keys:
        labels = row.labels()
        prompt = row.text("prompt", values["prompt"], may_be_empty=True)
        return Example(row.path, row.line, prompt=prompt, labels=labels)
    prompt = row.text("prompt", values["prompt"], may_be_empty=True)
    completion = row.text("completion", values["completion"])
    return Example(row.path, row.line, prompt=prompt, completion=completion)


# Examples for classification. The number of the label is the last token of a row, and the only one
# to learn. The head gets the model's state for the token before. If an example may have any number
# of labels, the row's number in its batch replaces the label's number.


def right_labels(example: Example) -> tuple[str, ...]:
    """The right labels of an example: its labels, its completion or its last message."""
    if example.labels is not None:
        return example.labels
    return (example.completion if example.messages is None else example.messages[-1]["content"],)


def labels_of(examples: Sequence[Example]) -> tuple[str, ...]:
    """The labels of a training set, sorted.

    Raises:
        DataError: A line has no prompt or an unsupported label, there are too few or too many
            different labels, or only some lines have ``labels``.
    """
    is_multi_label = examples[0].labels is not None
    check_labelled(examples, is_multi_label=is_multi_label)
    labels = tuple(sorted({label for example in examples for label in right_labels(example)}))
    least = 1 if is_multi_label else 2
    if not least <= len(labels) <= MAX_LABELS:
        limits = {"least": least, "most": MAX_LABELS}
        path = examples[0].path
        raise DataError(say("LABEL_COUNT", path=path, found=len(labels), **limits))
    return labels


def check_labelled(examples: Iterable[Example], *, is_multi_label: bool) -> None:
    """Reject lines without a label, or whose labels have a different form from the first line's.

    Raises:
        DataError: See :func:`labels_of`.
    """
    for example in examples:
        field = "text" if example.messages is None else "messages"
        if example.messages is None and example.prompt is None:
            raise example.error(field, say("NO_LABEL"))
        if (example.labels is not None) != is_multi_label:
            raise example.error("labels", say("MIXED_LABELS"))
        field = "labels" if is_multi_label else "completion"
        longest = max(map(len, right_labels(example)), default=0)
        if longest > MAX_LABEL_CHARS:
            text = say("TOO_MANY_CHARACTERS", most=MAX_LABEL_CHARS, found=longest)
            raise example.error(field, text)


def _numbers(example: Example, numbers: Mapping[str, int]) -> tuple[int, ...]:
    field = "completion" if example.labels is None else "labels"
    for label in right_labels(example):
        if label not in numbers:
            raise example.error(field, say("UNKNOWN_LABEL", value=label))
    return tuple(sorted(numbers[label] for label in right_labels(example)))


# The invocation of an aLoRA: the adapter takes effect at its last occurrence before the answer, as
# in the server (``server/engine/scheduling/sequence.py``).

_KEY = "method.invocation"


@dataclass(frozen=True, slots=True)
class Invocation:
    """An invocation in a tokenizer's tokens.

    Attributes:
        text: The text of ``method.invocation``.
        tokens: Its ids; at least one.
    """

    text: str
    tokens: tuple[int, ...]

    def start_in(self, prompt: Sequence[int], example: Example, tokenizer: Any) -> int:
        """The first position on which the adapter acts.

        Args:
            prompt: Tokens before the last answer.
            example: The example that the tokens belong to.
            tokenizer: The tokenizer that made the tokens.

        Raises:
            DataError: The prompt does not contain these tokens.
        """
        start = last_occurrence(prompt, self.tokens)
        if start is not None:
            return start
        field = "messages" if example.messages is not None else "prompt"
        field = "text" if field == "prompt" and example.prompt is None else field
        text = say("INVOCATION_MISSING", value=self.text)
        if self.text in tokenizer.decode(list(prompt)):
            # The tokenizer merges the ends of the invocation with the text around it.
            tokens = f"{list(self.tokens)!s:.60}"
            text = say("INVOCATION_SPLIT", value=self.text, tokens=tokens)
        raise example.error(field, text)


def invocation_of(tokenizer: Any, text: str) -> Invocation:
    """The tokens of a text.

    Raises:
        ConfigError: The text has no tokens.
    """
    tokens = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not tokens:
        raise ConfigError.of(_KEY, say("NO_TOKENS"))
    return Invocation(text, tokens)


def invocation_before_answers(tokenizer: Any) -> str:
    """The text that the chat template writes before an answer.

    Raises:
        ConfigError: The tokenizer has no template, or the template writes nothing before an answer.
    """
    text = ""
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "a"}]
        asked, opened = (
            tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=is_open)
            for is_open in (False, True)
        )
        text = opened[len(asked) :] if opened.startswith(asked) else ""
    if not text:
        raise ConfigError.of(_KEY, say("INVOCATION_REQUIRED"))
    return text


# Examples as tokens. Prompt and answer are tokenised separately, because the server tokenises a
# prompt alone before the model continues it.


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example.

    Attributes:
        tokens: Token ids.
        learned: Whether each token is learned. The first token never is, because nothing precedes
            it.
        turns: Role and content of the turns before the first learned answer, for a chat.
        start: The first position on which an aLoRA acts; None if the adapter acts everywhere.
        labels: The numbers of all right labels, if an example may have any number; else None.
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
    *,
    labels: Sequence[str] = (),
    invocation: Invocation | None = None,
) -> EncodedSet:
    """Encode a file's examples.

    Args:
        tokenizer: transformers' tokenizer.
        examples: The examples of one file.
        config: The config of the template, the loss and the treatment of long examples. An example
            of a classification that is cut loses the end of its text, not its label.
        labels: The classes of a classification.
        invocation: The tokens from which an aLoRA acts; tokens before them are not learned.

    Raises:
        DataError: An example cannot be rendered, is too long although ``config`` forbids that,
            lacks the invocation, has an unknown label or has nothing to learn; or no example is
            left.
    """
    numbers = {label: number for number, label in enumerate(labels)}
    encoded, dropped, truncated, shortest = [], 0, 0, sys.maxsize
    path, most = None, config.max_length
    for example in examples:
        path = example.path
        if labels:
            item = encode_prompt(tokenizer, example, config)
        else:
            item = encode(tokenizer, example, config, invocation)
        length = len(item.tokens)
        is_long = length > most
        if is_long:
            if config.too_long == "error":
                raise example.error(None, say("TOO_MANY_TOKENS", found=length, most=most))
            item = replace(item, tokens=item.tokens[:most], learned=item.learned[:most])
        if labels:
            item = _labelled(example, item, numbers)
        if is_long and (config.too_long == "drop" or not any(item.learned)):
            dropped += 1
            shortest = min(shortest, length)
            continue
        if not any(item.learned):
            raise example.error(None, say("NOTHING_TO_LEARN"))
        truncated += is_long
        encoded.append(item)
    if not encoded:
        raise DataError(say("ALL_TOO_LONG", path=path, most=most, found=shortest))
    return EncodedSet(tuple(encoded), dropped, truncated)


def _labelled(example: Example, item: Encoded, numbers: Mapping[str, int]) -> Encoded:
    """The prompt of an example, with its label as the last token and the only one to learn.

    Raises:
        DataError: The prompt has no tokens, or a label is unknown.
    """
    right = _numbers(example, numbers)
    if not item.tokens:
        raise example.error("prompt", say("NO_TOKENS"))
    learned = (*item.learned, True)
    if example.labels is not None:
        return replace(item, tokens=(*item.tokens, 0), learned=learned, labels=right)
    return replace(item, tokens=(*item.tokens, right[0]), learned=learned)


def encode(
    tokenizer: Any, example: Example, config: DataConfig, invocation: Invocation | None = None
) -> Encoded:
    """Encode one example.

    Raises:
        DataError: The tokenizer has no chat template, the template rejects the messages or renders
            a turn differently once another one follows, or the invocation is missing.
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
        # Learn nothing up to the end of the invocation. On a server, the base computes the tokens
        # before the invocation, and the prompt contains the invocation itself.
        first = start + len(invocation.tokens)
        learned[:first] = [False] * first
        shown = tuple((turn["role"], turn["content"]) for turn in turns[:-1])
    return Encoded(tokens, tuple(learned), shown, start)


def encode_prompt(tokenizer: Any, example: Example, config: DataConfig) -> Encoded:
    """Encode the part of an example before its last answer; none of it is learned.

    Raises:
        DataError: The tokenizer has no chat template, or the template rejects the messages.
    """
    turns: Sequence[Mapping[str, str]] = ()
    if example.messages is not None:
        # Labels have a separate key, whereas an answer is the last message.
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
        raise example.error("messages", say("NEEDS_CHAT_TEMPLATE"))


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
    """Pieces up to the end of the last answer: (tokens, whether they are an answer)."""
    _check_template(tokenizer, example)
    pieces: list[tuple[list[int], bool]] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        opened = _render(tokenizer, example, messages[:index], is_open=True)
        closed = _render(tokenizer, example, messages[: index + 1], is_open=False)
        if not (opened.startswith(done) and closed.startswith(opened)):
            raise example.error(f"messages[{index}]", say("TEMPLATE_REWRITES"))
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
        # jinja raises many types of errors; all of them concern the messages.
        raise example.error("messages", say("CHAT_TEMPLATE_FAILED", problem=error)) from error


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a rendered piece: the template has written the special tokens."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _with_end(tokenizer: Any, ids: list[int]) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if ids[-1:] == [end] else [*ids, end]


def _split_at_end(tokenizer: Any, ids: list[int]) -> tuple[list[int], list[int]]:
    """An answer with its end-of-turn token, which is added if missing, and the text after it."""
    end = tokenizer.eos_token_id
    if end not in ids:
        return [*ids, end], []
    cut = len(ids) - ids[::-1].index(end)
    return ids[:cut], ids[cut:]
