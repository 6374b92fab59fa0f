"""The inputs of a run: enough to train its adapter again, and to compare it with another run."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import turret
from turret.server.models.model_source import ModelSource, stored_weights
from turret.training.fusion import component_digests
from turret.training.run import RunFolder
from turret.training.settings.resolve import Resolved
from turret.training.words import RunError, Text, say

_PARTS = ("base", "data", "config", "versions")
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
# Keys of ``run`` that determine where results are written, but do not change them.
_WHERE = ("output", "report_to")


def versions() -> dict[str, str]:
    """The versions of all software that determines a run's numbers."""
    return {
        "turret": turret.__version__,
        "python": platform.python_version(),
        **{package: version(package) for package in _PACKAGES},
    }


def describe_run(resolved: Resolved, num_parameters: int) -> dict[str, Any]:
    """Digests of base and data, the config without paths, the seed and the versions.

    On another machine or in another directory, the same run differs only in the versions.
    """
    config = dataclasses.asdict(resolved.config)
    for key in _WHERE:
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
    """The name, the digest and the formats of the weights on which an adapter was made.

    Args:
        source: The quantised model.
        is_full: Whether the adapter was made on the checkpoint's own weights instead.
    """
    weights = stored_weights(source).storage()
    if is_full:
        weights = {module: {"16-bit": sum(found.values())} for module, found in weights.items()}
    return {"name": source.name, "digest": source.digest, "weights": weights}


def check_same_run(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Reject resuming a run that has other inputs.

    Args:
        before: ``run.json`` of the existing run.
        now: The result of ``describe_run`` for this run.
        folder: The directory of the run.

    Raises:
        RunError: Base, data, config or versions differ; the error names the keys.
    """
    found: dict[str, Text] = {}
    for part in _PARTS:
        found |= _differences(part, before.get(part), now[part])
    # Epochs follow from the steps, so do not report them, too.
    found.pop("config.run.epochs", None)
    if not found:
        return
    run = RunFolder(folder)
    about = {"path": folder, "found": ", ".join(found.values())}
    if not run.is_finished and all(key.startswith("config.") for key in found):
        raise RunError(say("RUN_SETTINGS_DIFFER", command=run.resume_command(), **about))
    raise RunError(say("RUN_DIFFERS", **about))


def _differences(key: str, before: Any, now: Any) -> Iterator[tuple[str, Text]]:
    """The keys whose values differ, each with a description."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for part in sorted({*before, *now}):
            yield from _differences(f"{key}.{part}", before.get(part), now.get(part))
        return
    # Tuples come back from JSON as lists.
    now = list(now) if isinstance(now, tuple) else now
    if before == now:
        return
    # Show the key of a config as the file and --set name it.
    name = key.removeprefix("config.")
    if name == "data.digest":
        yield key, say("EXAMPLES_CHANGED")
    elif name.endswith("digest"):
        yield key, say("DIGEST_CHANGED", key=name)
    else:
        yield key, say("DIFFERENCE", key=name, before=_shown(before), after=_shown(now))


def _shown(value: Any) -> str:
    return "none" if value is None else f"{json.dumps(value):.60}"
