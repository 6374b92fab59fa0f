"""Checkpoints of every method on small models, written by PEFT."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from builders.method_kinds import ALL, KINDS, Drawn, redraw
from hypothesis import HealthCheck, Phase, settings
from peft import AdaLoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

__all__ = ["ALL", "drawing", "load_adapter", "make_config", "quiet", "randomise", "save_adapter"]

CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}


@contextmanager
def quiet() -> Iterator[None]:
    """Hide PEFT's advice for training."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make_config(method: str, **changes: Any) -> PeftConfig:
    """A config of the method, by default for every linear module."""
    kind, values = KINDS[method]
    with quiet():
        return kind(**{**CAUSAL, **copy.deepcopy(values), **changes})


def randomise(peft_model: nn.Module, seed: int, strength: float = 0.5) -> None:
    """Replace every trained tensor, so that each matters and updates are as large as weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(peft_model.named_parameters()):
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            value = redraw(name, Drawn(parameter, noise, strength))
            parameter.copy_(value.to(parameter.dtype))


def save_adapter(
    model: nn.Module,
    config: PeftConfig,
    directory: Path,
    *,
    seed: int = 1,
    strength: float = 0.5,
    share: bool = False,
) -> PeftModel:
    """Create an adapter on a copy of ``model``, save it in PEFT's layout and return it."""
    with quiet(), torch.random.fork_rng():
        # PEFT uses the global generator; the biases of a p-tuning encoder keep these values.
        torch.manual_seed(seed)
        peft_model = get_peft_model(copy_of(model, share), copy.deepcopy(config))
        assert isinstance(peft_model, PeftModel)
        randomise(peft_model, seed, strength)
        if isinstance(config, AdaLoraConfig) and config.rank_pattern is None:
            prune(peft_model, seed)
        peft_model.save_pretrained(str(directory))
    return peft_model


def prune(peft_model: PeftModel, seed: int) -> None:
    """Give an AdaLoRA a rank pattern as after training, with one module without ranks."""
    generator = torch.Generator().manual_seed(seed)
    pattern = {}
    for name, parameter in peft_model.get_base_model().named_parameters():
        if "lora_E" in name:
            pattern[name] = (torch.rand(len(parameter), generator=generator) < 0.6).tolist()
    first = next(iter(pattern))
    pattern[first] = [False] * len(pattern[first])
    peft_model.peft_config["default"].rank_pattern = pattern  # type: ignore[attr-defined]


def copy_of(model: nn.Module, share: bool = False) -> Any:
    """A copy of a model.

    With ``share``, only the modules are copied, for adapters that do not change the base's tensors.
    """
    tensors = (*model.parameters(), *model.buffers()) if share else ()
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def load_adapter(model: nn.Module, directory: Path, *, share: bool = False) -> PeftModel:
    """The reference: a copy of ``model`` with the directory loaded by PEFT."""
    with quiet():
        return PeftModel.from_pretrained(copy_of(model, share), str(directory)).eval()


def drawing(num_examples: int) -> settings:
    """Hypothesis' settings without shrinking, which would take minutes.

    A failure names its config.
    """
    return settings(
        max_examples=num_examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
