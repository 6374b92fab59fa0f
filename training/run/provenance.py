"""What an adapter was made of: enough to make it again, and to know what it fits."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import turret
from turret.server.adapters.source import PROVENANCE_FILE
from turret.training.errors import RunError
from turret.training.fusion.components import component_digests
from turret.training.settings.resolve import Resolved

FILE = PROVENANCE_FILE
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def describe_run(resolved: Resolved, num_parameters: int) -> dict[str, Any]:
    """Digests of base and data, the config without paths, seed and versions.

    The same run described on another machine or in another directory is equal but for versions.
    """
    config = dataclasses.asdict(resolved.config)
    config["run"].pop("output")
    for table, key in (("data", "train"), ("data", "validation"), ("base", "model")):
        value = config[table][key]
        config[table][key] = value and Path(value).name
    if config["method"]["components"] is not None:
        config["method"]["components"] = component_digests(config["method"]["components"])
    source, dataset = resolved.base.source, resolved.dataset
    return {
        "base": {"name": source.name, "digest": source.digest},
        "data": {
            "digest": dataset.digest,
            "num_examples": dataset.num_examples,
            "num_tokens": dataset.num_tokens,
        },
        "config": config,
        "seed": resolved.config.run.seed,
        "num_parameters": num_parameters,
        "versions": {
            "turret": turret.__version__,
            "python": platform.python_version(),
            **{package: version(package) for package in _PACKAGES},
        },
    }


def check_same_run(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on with a run that was made of something else.

    Raises:
        RunError: Base, data, config or versions differ; names the keys.
    """
    keys = [
        key
        for part in ("base", "data", "config", "versions")
        for key in _differences(part, before.get(part), now[part])
    ]
    if keys:
        raise RunError(
            f"{folder} cannot be resumed, these differ from the run there: {', '.join(keys)}"
        )


def _differences(key: str, before: Any, now: Any) -> list[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        return [
            name
            for part in sorted({*before, *now})
            for name in _differences(f"{key}.{part}", before.get(part), now.get(part))
        ]
    # Tuples come back from JSON as lists.
    plain = list(now) if isinstance(now, tuple) else now
    return [] if before == plain else [key]
