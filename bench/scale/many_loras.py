"""Thousands of different adapters that share a few tensor files on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from common.adapters import ALL, write_random_lora

from turret.server.models.decoding.arch import Arch

# In this order, the popular adapters have about the mean rank of all: weighted by popularity, 27
# for five adapters, 29 for ten, 30 for more. Traces for few and for many adapters then differ only
# in the number of adapters. In ascending order, the mean rank of five adapters would be 19.
RANKS = (16, 64, 8, 32)
_FILES_PER_RANK = 4
_TENSORS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def write_many_loras(
    root: Path,
    count: int,
    *,
    arch: Arch,
    base_model: str,
    targets: Sequence[str] = ALL,
    ranks: Sequence[int] = RANKS,
) -> list[str]:
    """Write ``count`` adapters with the ranks in turn, each with a unique config and thus digest.

    Tensor files are hard links to a few files. An adapter is still read, hashed and lowered in
    full, but from the page cache once its file has been read.

    Returns:
        The names of the adapters and of their directories.
    """
    originals = []
    for number in range(min(count, _FILES_PER_RANK * len(ranks))):
        folder = root / f"file-{number:02}"
        write_random_lora(
            folder,
            arch=arch,
            base_model=base_model,
            rank=ranks[number % len(ranks)],
            seed=number,
            targets=targets,
        )
        originals.append(folder)
    names = []
    for number in range(count):
        original = originals[number % len(originals)]
        folder = root / f"many-{number:05}"
        folder.mkdir()
        os.link(original / _TENSORS, folder / _TENSORS)
        config = json.loads((original / _CONFIG).read_text())
        # A different scale per adapter, so that no two adapters give the same answers.
        config["lora_alpha"] = config["r"] * (1.0 + number / 10_000)
        (folder / _CONFIG).write_text(json.dumps(config))
        names.append(folder.name)
    return names
