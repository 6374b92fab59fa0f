"""Checks that a run may resume the one in its directory: both must have the same inputs."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import turret
from turret.training.errors import RunError
from turret.training.run.folder import RunFolder
from turret.training.settings.checks import PRESETS, KnownBase, expand_targets
from turret.training.settings.config import TrainConfig
from turret.training.settings.declared import DECLARED
from turret.training.words import Text, say

_PARTS = ("base", "data", "config", "versions")
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
# Keys of ``run`` that determine where results are written, but do not change them.
WHERE = ("output", "report_to")
# Paths are not compared, since a run may have been moved.
_NOT_COMPARED = {"base": ("model",), "data": ("train", "validation"), "run": WHERE}


def versions() -> dict[str, str]:
    """The versions of all software that determines a run's numbers."""
    return {
        "turret": turret.__version__,
        "python": platform.python_version(),
        **{package: version(package) for package in _PACKAGES},
    }


def check_same_run(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Reject resuming a run that has other inputs.

    Args:
        before: ``run.json`` of the existing run.
        now: The same for this run, or a part of it.
        folder: The directory of the run.

    Raises:
        RunError: Base, data, config or versions differ; the error names the keys.
    """
    # If the number of steps is set, epochs follow from it; ignore the configured value.
    run_keys = now.get("config", {}).get("run", {})
    idle = "config.run.epochs" if run_keys.get("steps") is not None else ""
    found = [
        each
        for part in _PARTS
        if part in now
        for each in _differences(part, before.get(part), now[part])
        if each.key != idle
    ]
    if not found:
        return
    run = RunFolder(folder)
    about = {"path": folder, "found": ", ".join(each.text for each in found)}
    if not run.is_finished and all(each.key.startswith("config.") for each in found):
        raise RunError(say("RUN_SETTINGS_DIFFER", command=run.resume_command(), **about))
    raise RunError(say("RUN_DIFFERS", **about))


@dataclass(frozen=True, slots=True)
class _Difference:
    key: str
    there: Any
    here: Any

    @property
    def text(self) -> Text:
        # Show the key of a config as the file and --set name it.
        name = self.key.removeprefix("config.")
        if name == "data.digest":
            return say("EXAMPLES_CHANGED")
        if name.endswith("digest"):
            return say("DIGEST_CHANGED", key=name)
        before, after = self._shown(self.there), self._shown(self.here)
        return say("DIFFERENCE", key=name, before=before, after=after)

    @staticmethod
    def _shown(value: Any) -> str:
        return "none" if value is None else f"{json.dumps(value):.60}"


def check_settings(
    config: TrainConfig,
    folder: RunFolder,
    data: str | None = None,
    base: KnownBase | None = None,
    *,
    is_served: bool = False,
) -> None:
    """Like :func:`check_same_run`, but compares only inputs that are known before torch is loaded.

    A run continues only where it began, on a server or not.

    Args:
        config: The config as read. Of the keys that it omits, only those that the method determines
            are compared.
        folder: The run's directory.
        data: The digest of the files that the config names; None if it is not compared.
        base: The known facts about the base; None if it is not compared.
        is_served: Whether the run is to continue on a server.
    """
    before = folder.read_facts()
    if not folder.is_finished and ("server" in before) != is_served:
        command = folder.resume_command()
        raise RunError(say("RUN_ELSEWHERE", path=folder.path, command=command))
    there = before.get("config", {})
    asked = {
        table: {
            key: value
            for key, value in keys.items()
            if value is not None and key not in _NOT_COMPARED.get(table, ())
        }
        for table, keys in dataclasses.asdict(config).items()
    }
    method, optimizer = asked["method"], asked["optimizer"]
    if method["name"] == there.get("method", {}).get("name"):
        learning_rate, defaults = DECLARED[method["name"]]
        rate = {"learning_rate": learning_rate}
        keys = {k: v for k, v in defaults.items() if isinstance(v, int | float)}
        for table, filled_in in (("method", keys), ("optimizer", rate)):
            has = there.get(table, {})
            left = {k: v for k, v in filled_in.items() if has.get(k) is not None}
            asked[table].update({k: v for k, v in left.items() if k not in asked[table]})
    # A run records the components' digests and the names of the target modules, so these keys
    # cannot be compared as they are.
    method.pop("components", None)
    targets = tuple(dict.fromkeys(method.pop("targets", ())))
    if targets and base is not None and base.projections is not None:
        targets = expand_targets(base.projections, targets)
    if targets and targets[0] not in PRESETS:
        method["targets"] = targets
    if optimizer["name"].startswith("paged"):
        # Without CUDA, paged optimizers are replaced by adamw8bit.
        del optimizer["name"]
    known = {table: {key: there.get(table, {}).get(key) for key in asked[table]} for table in asked}
    now = {"config": asked, "versions": versions()}
    name = before.get("base", {}).get("name")
    if base is not None and name is not None:
        # The digest is compared later, because computing it may take minutes.
        before = {**before, "base": {"name": name}}
        now["base"] = {"name": base.name}
    digest = before.get("data", {}).get("digest")
    if data is not None and digest is not None:
        before = {**before, "data": {"digest": digest}}
        now["data"] = {"digest": data}
    check_same_run({**before, "config": known}, now, folder.path)


def _differences(key: str, before: Any, now: Any) -> list[_Difference]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        return [
            each
            for part in sorted({*before, *now})
            for each in _differences(f"{key}.{part}", before.get(part), now.get(part))
        ]
    # Tuples come back from JSON as lists.
    plain = list(now) if isinstance(now, tuple) else now
    return [] if before == plain else [_Difference(key, before, plain)]
