"""The files that a config names, and what they say against themselves before torch is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from turret.server.basics.counted import counted
from turret.training.data.example import Example, read_examples
from turret.training.data.labels import check_labelled, labels_of
from turret.training.errors import ConfigError, DataError
from turret.training.settings.config import DataConfig


@dataclass(frozen=True, slots=True)
class DataFiles:
    """What was read.

    Attributes:
        paths: The files, the training one first.
        train: Its examples, of which a part may yet be set aside.
        validation: Those of a file of their own, or None.
        labels: What a classification tells apart, in the head's order; else empty.
        is_multi_label: Whether any number of them may hold, and not exactly one.
    """

    paths: tuple[Path, ...]
    train: list[Example]
    validation: list[Example] | None
    labels: tuple[str, ...]
    is_multi_label: bool


def data_paths(config: DataConfig, folder: Path) -> tuple[Path, ...]:
    """The files that a config in ``folder`` names, the training one first."""
    return tuple(folder / name for name in (config.train, config.validation) if name is not None)


def read_files(config: DataConfig, folder: Path) -> DataFiles:
    """Read them.

    Args:
        config: Paths are relative to ``folder``.
        folder: Of the config file.

    Raises:
        DataError: See :func:`read_examples` and :func:`labels_of`; or an example is in both files,
            or has labels where texts are learned.
    """
    paths = data_paths(config, folder)
    train = read_examples(paths[0])
    # Before a part is set aside: a label may be on so few lines that all of them are in it.
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
    """How many examples are validated on: at least one unless the share is 0, and never all."""
    if fraction == 0 or num_examples < 2:
        return 0
    return min(max(1, round(num_examples * fraction)), num_examples - 1)


def num_shared(train: Sequence[Example], held_out: Sequence[Example]) -> int:
    """How many of those that are set aside are trained on too, in another line of the file."""
    seen = {_content(example) for example in train}
    return sum(_content(example) in seen for example in held_out)


def check_compared(files: DataFiles, config: DataConfig) -> None:
    """Refuse a sweep, which compares validation losses, of what leaves nothing to validate on.

    Args:
        files: Of :func:`read_files`.
        config: What they were read by.

    Raises:
        ConfigError: Says how many examples there are, and what to do.
    """
    fraction, there = config.validation_fraction, len(files.train)
    if files.validation is not None or num_set_aside(there, fraction):
        return
    step = "add examples" if fraction else "set data.validation_fraction=0.1"
    problem = (
        f"no example is left to validate on, and a sweep compares validation losses:"
        f" {files.paths[0]} has {counted(there, 'example')}, and data.validation_fraction is"
        f" {fraction:g}; {step}, or name a file of others with data.validation"
    )
    raise ConfigError.of("data.validation_fraction", problem)


def _content(example: Example) -> object:
    messages = example.messages and tuple((m["role"], m["content"]) for m in example.messages)
    return messages, example.prompt, example.completion, example.labels


def _check_answered(examples: Sequence[Example]) -> None:
    for example in examples:
        if example.labels is not None:
            raise example.error("labels", 'are learned with data.task = "classification" alone')


def _check_disjoint(train: Sequence[Example], validation: Sequence[Example]) -> None:
    seen = {_content(example): example.line for example in train}
    for example in validation:
        line = seen.get(_content(example))
        if line is not None:
            raise DataError(
                f"{example.path}:{example.line}: line: is line {line} of the training file too"
            )
