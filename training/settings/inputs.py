"""What a config's files and its base say against it, before torch is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from turret.clients.evaluation.rows import missing_file
from turret.server.adapters.component import MAX_COMPONENTS, MIN_COMPONENTS
from turret.server.basics.hub_id import model_place
from turret.server.command.preflight import without_cuda
from turret.server.models.decoding.arch import Projections
from turret.server.models.sources.check import check_model, name_of_model, told_context
from turret.training.errors import ConfigError
from turret.training.settings.config import BaseConfig, DataConfig, TrainConfig
from turret.training.settings.fit import check_fit
from turret.training.settings.modules import check_method
from turret.training.settings.targets import check_targets, told_projections
from turret.training.words import say

_COMPONENTS = "method.components"


def check_inputs(config: TrainConfig, folder: Path, ranks: Sequence[int] = ()) -> None:
    """Refuse paths at which there is nothing to read, and settings that do not go together.

    Args:
        config: As read.
        folder: Its paths are relative to this.
        ranks: Each of these is to take the place of the config's.

    Raises:
        ConfigError: A file or directory is not there or named for two things, torch has no CUDA, or
            the method has no use for a setting.
    """
    for key, name in (("train", config.data.train), ("validation", config.data.validation)):
        if name is None:
            continue
        path = folder / name
        if not path.is_file():
            text = missing_file(path)
            if path.is_dir():
                text = say("PATH_IS_A_DIRECTORY", path=path.absolute())
            elif path.exists():
                # Pipes cannot be read twice.
                text = say("PATH_UNUSABLE", path=path.absolute(), problem=say("NOT_A_FILE"))
            raise ConfigError.of(f"data.{key}", text)
    validation = config.data.validation
    if validation is not None and (folder / validation).samefile(folder / config.data.train):
        text = say("IS_TRAINING_FILE", path=folder / validation)
        raise ConfigError.of("data.validation", text)
    if config.base.device == "cuda" and (why := without_cuda()):
        raise ConfigError.of("base.device", why)
    for each in with_ranks(config, ranks):
        check_fit(each)
    if config.method.name == "learned_fusion":
        check_components(config.method.components or (), folder)


@dataclass(frozen=True, slots=True)
class ToldBase:
    """What is known of a base before torch is loaded.

    Attributes:
        name: As the server has it, and a run records it.
        projections: Its modules; None where that takes torch to tell.
    """

    name: str
    projections: Projections | None


def check_base(config: TrainConfig, folder: Path, ranks: Sequence[int] = ()) -> ToldBase:
    """Refuse a base that is none, or none for the method; the hub is asked for one of its own.

    Args:
        config: As :func:`check_inputs`, and so the next.
        folder: Its paths are relative to this.
        ranks: Each of these is to take the place of the config's.

    Raises:
        ConfigError: The base has no such modules, none of that rank, or a shorter context than
            ``data.max_length``.
        InvalidRequestError: The base is no model that is served.
    """
    base = base_place(config.base, folder)
    model_type = check_model(base)
    if (context := told_context(base)) is not None:
        check_max_length(config.data, context)
    projections = told_projections(base, model_type)
    if projections is None and config.method.targets is not None:
        check_targets(model_type, config.method.targets)
    if projections is not None:
        for each in with_ranks(config, ranks):
            check_method(each.method, projections)
    return ToldBase(name_of_model(base), projections)


def check_max_length(config: DataConfig, context: int) -> None:
    """Refuse examples that are longer than the base's context.

    Args:
        config: Has ``max_length``.
        context: Most positions that the base was made for.

    Raises:
        ConfigError: ``max_length`` is more.
    """
    if config.max_length > context:
        text = say("EXCEEDS_CONTEXT", most=context, value=config.max_length)
        raise ConfigError.of("data.max_length", text)


def with_ranks(config: TrainConfig, ranks: Sequence[int]) -> list[TrainConfig]:
    """The config with each of these ranks; itself if there are none."""
    methods = [replace(config.method, rank=rank) for rank in ranks] or [config.method]
    return [replace(config, method=method) for method in methods]


def component_directories(entries: Sequence[str], folder: Path = Path()) -> dict[str, Path]:
    """Component names → directories.

    Args:
        entries: ``NAME=DIRECTORY`` or ``DIRECTORY``, whose last part is the name then.
        folder: What directories are relative to.
    """
    directories = {}
    for entry in entries:
        name, equals, directory = entry.partition("=")
        path = folder / (directory if equals else name)
        directories[name if equals else path.name] = path
    return directories


def check_components(entries: Sequence[str], folder: Path) -> None:
    """Refuse what a learned fusion cannot be made of.

    Args:
        entries: As :func:`component_directories`, and so the next.
        folder: What directories are relative to.

    Raises:
        ConfigError: Too few or too many, or a directory that is none.
    """
    directories = component_directories(entries, folder)
    if len(directories) < len(entries):
        raise ConfigError.of(_COMPONENTS, say("SAME_COMPONENT_NAME"))
    if not MIN_COMPONENTS <= len(directories) <= MAX_COMPONENTS:
        limits = {"least": MIN_COMPONENTS, "most": MAX_COMPONENTS}
        text = say("ENTRIES_NOT_IN_RANGE", found=len(directories), **limits)
        raise ConfigError.of(_COMPONENTS, text)
    for path in directories.values():
        if not path.is_dir():
            raise ConfigError.of(_COMPONENTS, say("FOLDER_MISSING", path=path))


def base_place(config: BaseConfig, folder: Path) -> Path | None:
    """Where the base is: below ``folder``, on the hub (a path that is its id), or None."""
    if config.model is None:
        return None
    return model_place(config.model, folder)
