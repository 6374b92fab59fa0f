"""Checkpoints, from which a run continues as if it had never stopped."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.optim.optimizer import Optimizer8bit

from turret.server.basics.files import replace_file
from turret.training.run import checkpoint_path


def save_checkpoint(
    folder: Path,
    step: int,
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write ``step-NNNNNNNN.pt`` atomically."""
    state: dict[str, Any] = {
        "step": step,
        "parameters": {name: parameter.data for name, parameter in parameters.items()},
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    folder.mkdir(exist_ok=True)
    replace_file(checkpoint_path(folder, step), buffer.getvalue())


def restore_checkpoint(
    path: Path, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> int:
    """Restore the state of a run; returns the number of finished steps.

    The optimizer must have the same groups and parameters as in the run that saved the checkpoint.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    assert state["parameters"].keys() == parameters.keys()
    for name, parameter in parameters.items():
        parameter.data.copy_(state["parameters"][name])
    if isinstance(optimizer, Optimizer8bit) and optimizer.is_paged:
        _restore_paged(optimizer, state["optimizer"])
    else:
        optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    # The machine may have another number of GPUs than the one that saved the checkpoint.
    for device, generator in enumerate(state["cuda_rng"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(generator, device)
    return state["step"]


def _restore_paged(optimizer: Optimizer8bit, state: dict[str, Any]) -> None:
    """Restore the states of an optimizer into memory that can move to the host.

    bitsandbytes would restore them as ordinary tensors on the GPU, which may have no room for them.
    """
    # Leave tensors that are not paged on the CPU: the first step moves them to the GPU.
    optimizer.load_state_dict(state, move_to_device=False)
    for parameter, found in optimizer.state.items():
        for name in ("state1", "state2"):
            buffer = optimizer.get_state_buffer(parameter, dtype=found[name].dtype)
            found[name] = buffer.copy_(found[name])
