"""What the file system says of a config before torch is loaded: the files that it names."""

from __future__ import annotations

from pathlib import Path

from turret.server.models.model_directory import check_model_directory
from turret.training.errors import ConfigError
from turret.training.settings.config import TrainConfig


def check_inputs(config: TrainConfig, folder: Path) -> None:
    """Refuse paths at which there is nothing to read.

    Args:
        config: As read.
        folder: Its paths are relative to this.

    Raises:
        ConfigError: A file of examples is not there.
        InvalidRequestError: The base is no directory of a model that is served.
    """
    for key, name in (("train", config.data.train), ("validation", config.data.validation)):
        if name is None:
            continue
        path = folder / name
        if not path.is_file():
            what = "is a directory" if path.is_dir() else "does not exist"
            problem = f"{path} {what}; it is a JSONL file of examples, relative to the config"
            raise ConfigError.of(f"data.{key}", problem)
    if config.base.model is not None:
        path = folder / config.base.model
        # A name of the hub is told from a path by how it is written.
        check_model_directory(path if path.exists() else Path(config.base.model))
