"""Reads and writes an adapter in PEFT's layout.

Files are written deterministically: the same weights give the same bytes.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from turret.server.adapters.adapter import CONFIG_FILE, TENSORS_FILE
from turret.server.adapters.checkpoint import AdapterCheckpoint
from turret.server.adapters.checkpoint.adapter_root import AdapterRoot
from turret.server.adapters.checkpoint.reader import read_checkpoint
from turret.training.words import RunError, say

_MAX_ELEMENTS = 1 << 40


def read_adapter(folder: Path, shown: str | None = None) -> AdapterCheckpoint:
    """Read the two files of a directory.

    Args:
        folder: The directory.
        shown: Its name in errors; None for the last part of its path.
    """
    folder = folder.resolve()
    return read_checkpoint(
        AdapterRoot(folder.parent), folder.name, max_elements=_MAX_ELEMENTS, shown=shown
    )


def write_adapter(
    folder: Path, config: Mapping[str, Any], state: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``.

    Args:
        folder: An existing directory.
        config: PEFT's keys.
        state: Tensors by PEFT's names.
        dtype: The dtype of the saved tensors; integers stay as they are.

    Raises:
        RunError: A weight is not finite in ``dtype``.
        OSError: The files cannot be written.
    """
    tensors = {}
    for name, tensor in state.items():
        kept = dtype if tensor.is_floating_point() else tensor.dtype
        tensors[name] = tensor.detach().to("cpu", kept).contiguous()
        if not bool(torch.isfinite(tensors[name]).all()):
            raise RunError(say("WEIGHT_NOT_FINITE", name=name, dtype=dtype))
    # Do not use ``save_file``: it raises no OSErrors, and only their owner can read its files.
    (folder / TENSORS_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))
    # Sets have no order: sorting keeps the file the same from run to run.
    plain = {key: sorted(v) if isinstance(v, set) else v for key, v in config.items()}
    plain["inference_mode"] = True
    text = json.dumps(plain, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder that replaces ``output`` once it is complete."""
    output.parent.mkdir(parents=True, exist_ok=True)
    build = Path(tempfile.mkdtemp(prefix=".building-", dir=output.parent))
    try:
        yield build
        build.chmod(0o755)
        build.replace(output)
    except BaseException:
        shutil.rmtree(build, ignore_errors=True)
        raise
