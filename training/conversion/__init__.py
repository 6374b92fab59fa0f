"""Converts adapters into LoRAs if their files lack state that only the base can supply."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from turret.lazy_torch import torch


@dataclass(frozen=True, slots=True)
class MadeLora:
    """The LoRA that a conversion makes for one module: ``y += b (a x) + bias``.

    Attributes:
        a: ``[rank, in_features]`` fp32.
        b: ``[out_features, rank]`` fp32.
        bias: ``[out_features]`` fp32, or None.
    """

    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None

    @property
    def rank(self) -> int:
        return len(self.a)


@contextmanager
def peft_generator(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generator as PEFT does for ``svd_lowrank``, and restore it afterwards."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed)
        yield
