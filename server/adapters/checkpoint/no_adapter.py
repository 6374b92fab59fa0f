"""Refuses directories that hold no adapter, and names what they hold instead."""

from __future__ import annotations

from collections.abc import Iterable

from turret.server.adapters.checkpoint.adapter_root import AdapterDirectory, refuse
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.source import CONFIG_FILE, TENSORS_FILE
from turret.server.words import say

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Files of the trainer itself, which do not show in which format the weights are saved.
_TRAINERS_OWN = ("optimizer", "scheduler", "scaler", "rng_state", "training_args")
_MODEL_CONFIG = "config.json"


def check_is_adapter(directory: AdapterDirectory, path: str) -> None:
    """Refuse a directory that lacks one of an adapter's two files.

    Args:
        directory: Where to look; its other names show what it holds instead.
        path: The adapter's name in messages.

    Raises:
        AdapterCheckpointError: It does.
    """
    if not directory.has(CONFIG_FILE):
        if _is_model(directory.names()):
            raise refuse(path, say("WHOLE_MODEL"))
        raise refuse(path, say("NOT_AN_ADAPTER", closest=directory.adapter_below(CONFIG_FILE)))
    # Pickle files beside the tensors do no harm, because they are never opened.
    if not directory.has(TENSORS_FILE):
        refuse_missing_tensors(path, directory.names())


def refuse_missing_tensors(path: str, names: Iterable[str]) -> None:
    """Refuse an adapter without its tensors; ``names`` are those of its other files.

    Raises:
        AdapterCheckpointError: Always; a pickle file is named, if there is one.
    """
    findings = Findings(path)
    for name in names:
        if name.endswith(_PICKLE_SUFFIXES) and not name.startswith(_TRAINERS_OWN):
            findings.add(name, say("PICKLE"))
    if not findings.fields:
        findings.add(TENSORS_FILE, say("MISSING_FILE"))
    findings.raise_if_any()


def _is_model(names: list[str]) -> bool:
    has_weights = any(n.startswith("model") and ".safetensors" in n for n in names)
    is_gguf = any(name.endswith(".gguf") for name in names)
    return is_gguf or (_MODEL_CONFIG in names and has_weights)
