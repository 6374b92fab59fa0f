"""Fills in the keys that the config leaves open, depending on method, base model and machine."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from bitsandbytes.functional import has_avx512bf16

from turret.clients.results import Model
from turret.training.base_model import TrainingBase, find_base
from turret.training.batches import Dataset, load_dataset
from turret.training.examples import invocation_of
from turret.training.methods import METHODS, TrainingMethod
from turret.training.settings import (
    BaseConfig,
    DataConfig,
    MethodConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from turret.training.settings.checks import base_place, check_method, component_directories
from turret.training.words import ConfigError, say
from turret.words import counted


@dataclass(frozen=True, slots=True)
class Resolved:
    """A run before it starts.

    Attributes:
        config: The config, with all keys that the method or the loop reads, and with absolute
            paths.
        method: The method.
        base: The base, which is not loaded yet.
        dataset: The examples, read and encoded.
        notes: Choices that differ from the config or drop data; shown to the user.
    """

    config: TrainConfig
    method: TrainingMethod
    base: TrainingBase
    dataset: Dataset
    notes: tuple[str, ...]


def resolve(config: TrainConfig, folder: Path, served: Model | None = None) -> Resolved:
    """Fill in the config, and read the files that it names.

    Args:
        config: The config, after ``check_inputs``.
        folder: The directory to which its paths are relative.
        served: The model of the server that trains; None for a run in this process.

    Raises:
        TrainingError: The config and the data do not make a valid run.
        InvalidRequestError: The base is not a supported model.
    """
    folder = folder.resolve()
    notes: list[str] = []
    method = METHODS[config.method.name]
    directory = base_place(config.base, folder)
    base = find_base(directory, functools.partial(check_method, config.method))
    if served is None:
        settings = _resolve_base(config.base, directory)
    else:
        settings = _served_base(config.base, directory, base, served)
    config = replace(
        config,
        base=settings,
        method=method.resolve(_rooted(config.method, folder), base),
        optimizer=_resolve_optimizer(config.optimizer, method, str(settings.device), notes),
    )
    notes += method.notes(config.method, base)
    text = config.method.invocation
    invocation = None if text is None else invocation_of(base.tokenizer, text)
    dataset = load_dataset(config.data, folder, base, config.run.seed, invocation)
    notes += _notes_on(dataset, config.data)
    validation = config.data.validation
    config = replace(
        config,
        data=replace(
            config.data,
            train=str(folder / config.data.train),
            validation=None if validation is None else str(folder / validation),
        ),
        run=_resolve_run(config.run, folder, len(dataset.train)),
    )
    return Resolved(config, method, base, dataset, tuple(notes))


def _notes_on(dataset: Dataset, config: DataConfig) -> Iterator[str]:
    if dataset.num_dropped:
        dropped = counted(dataset.num_dropped, "example")
        yield f"left out {dropped} longer than data.max_length"
    if dataset.num_truncated:
        yield f"cut {counted(dataset.num_truncated, 'example')} to data.max_length"
    if config.validation_fraction and not dataset.validation:
        there = counted(dataset.num_examples, "example")
        yield f"no validation: {there} to train on, too few to set any aside"
    if dataset.num_shared:
        yield (
            f"the training examples also contain {counted(dataset.num_shared, 'example')} of the"
            " validation set; remove repeated lines, or set data.validation to a file of other"
            " examples"
        )


def _rooted(config: MethodConfig, folder: Path) -> MethodConfig:
    """The method's config, with absolute directories of its components."""
    if config.components is None:
        return config
    directories = component_directories(config.components, folder)
    return replace(config, components=tuple(f"{n}={path}" for n, path in directories.items()))


def _resolve_base(config: BaseConfig, directory: Path | None) -> BaseConfig:
    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise ConfigError.of("base.device", say("NO_CUDA_DEVICE", device="cuda"))
    device = config.device or ("cuda" if has_cuda else "cpu")
    if device == "cuda":
        # Cards that only emulate bfloat16 are faster in float32.
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = has_avx512bf16()
    return replace(
        config,
        model=None if directory is None else str(directory),
        device=device,
        weights=config.weights or "nf4",
        dtype=config.dtype or ("bfloat16" if has_bf16 else "float32"),
    )


def _served_base(
    config: BaseConfig, directory: Path | None, base: TrainingBase, served: Model
) -> BaseConfig:
    """The base as a server has it.

    Raises:
        ConfigError: The server has another base, or another dtype.
    """
    if served.digest != base.source.digest:
        text = say("OTHER_BASE_SERVED", name=base.source.name, served=served.name)
        raise ConfigError.of("base.model", text)
    if config.dtype not in (None, served.dtype):
        why = say("NOT_ONE_OF", value=config.dtype, choices=served.dtype)
        raise ConfigError.of("base.dtype", why)
    return replace(
        config,
        model=None if directory is None else str(directory),
        weights="nf4",
        dtype=served.dtype,
    )


def _resolve_optimizer(
    config: OptimizerConfig, method: TrainingMethod, device: str, notes: list[str]
) -> OptimizerConfig:
    if config.name == "paged-adamw8bit" and device != "cuda":
        notes.append("paged-adamw8bit needs CUDA; adamw8bit is used instead")
        config = replace(config, name="adamw8bit")
    return replace(config, learning_rate=config.learning_rate or method.learning_rate)


def _resolve_run(run: RunConfig, folder: Path, num_rows: int) -> RunConfig:
    """Compute the steps from the epochs, or the epochs from the steps, so that both are set."""
    rows_per_step = run.batch_size * run.gradient_accumulation
    run = replace(run, output=os.path.normpath(folder / run.output))
    if run.steps is None:
        return replace(run, steps=max(1, math.ceil(run.epochs * num_rows / rows_per_step)))
    return replace(run, epochs=float(f"{run.steps * rows_per_step / num_rows:.3g}"))
