"""Converts adapters into LoRAs if their files lack state that only the base can supply."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from turret.lazy_torch import torch


@contextmanager
def peft_generator(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generator as PEFT does for ``svd_lowrank``, and restore it afterwards."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed)
        yield
