"""What the file system says of a config before torch is loaded: the files that it names."""

from __future__ import annotations

from pathlib import Path

from turret.server.basics.hub_id import HubId
from turret.server.models.sources.check import check_model
from turret.training.errors import ConfigError
from turret.training.settings.config import BaseConfig, TrainConfig


def check_inputs(config: TrainConfig, folder: Path) -> None:
    """Refuse paths at which there is nothing to read.

    Args:
        config: As read.
        folder: Its paths are relative to this.

    Raises:
        ConfigError: A file of examples is not there.
        InvalidRequestError: The base is no model that is served.
    """
    for key, name in (("train", config.data.train), ("validation", config.data.validation)):
        if name is None:
            continue
        path = folder / name
        if not path.is_file():
            what = "is a directory" if path.is_dir() else "does not exist"
            problem = f"{path} {what}; it is a JSONL file of examples, relative to the config"
            raise ConfigError.of(f"data.{key}", problem)
    check_model(base_place(config.base, folder))


def base_place(config: BaseConfig, folder: Path) -> Path | None:
    """Where the base is: below ``folder``, on the hub (a path that is its id), or None."""
    if config.model is None:
        return None
    path = folder / config.model
    return Path(config.model) if not path.exists() and HubId.find(config.model) else path
