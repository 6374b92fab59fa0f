"""The provenance of an adapter: enough to train it again, and to identify its base."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from turret.server.adapters.adapter import PROVENANCE_FILE
from turret.server.models.model_source import ModelSource, stored_weights
from turret.training.fusion import component_digests
from turret.training.run.resuming import WHERE, versions
from turret.training.settings.resolve import Resolved

FILE = PROVENANCE_FILE


def describe_run(resolved: Resolved, num_parameters: int) -> dict[str, Any]:
    """Digests of base and data, the config without paths, the seed and the versions.

    On another machine or in another directory, the same run differs only in the versions.
    """
    config = dataclasses.asdict(resolved.config)
    for key in WHERE:
        config["run"].pop(key)
    for table, key in (("data", "train"), ("data", "validation"), ("base", "model")):
        value = config[table][key]
        config[table][key] = value and Path(value).name
    if config["method"]["components"] is not None:
        config["method"]["components"] = component_digests(config["method"]["components"])
    source, dataset = resolved.base.source, resolved.dataset
    return {
        "base": describe_base(source, resolved.config.base.weights == "full"),
        "data": {
            "digest": dataset.digest,
            "num_examples": dataset.num_examples,
            "num_tokens": dataset.num_tokens,
        },
        "config": config,
        "seed": resolved.config.run.seed,
        "num_parameters": num_parameters,
        "versions": versions(),
    }


def describe_base(source: ModelSource, is_full: bool = False) -> dict[str, Any]:
    """What identifies the weights on which an adapter was made.

    Args:
        source: The quantised model.
        is_full: Whether the adapter was made on the checkpoint's own weights instead.
    """
    weights = stored_weights(source).storage()
    if is_full:
        weights = {module: {"16-bit": sum(found.values())} for module, found in weights.items()}
    return {"name": source.name, "digest": source.digest, "weights": weights}
