"""The loss of a batch: the head runs on positions with a target only.

Over all positions of a batch, the logits of a vocabulary of 49,152 tokens take more time and memory
than the layers of a small model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from turret.server.models.families import read_arch
from turret.training.base_model import without_peft_warnings
from turret.training.batches import IGNORED, TrainingBatch
from turret.training.settings import OptimizerConfig

# Number of positions whose logits exist at a time. Longer inputs are computed in parts, and again
# in the backward pass.
HEAD_ROWS = 512


class LossFunction:
    """Sum of the cross entropy over a batch's targets.

    Args:
        model: The result of a method's ``attach``.
        head: The base's ``lm_head``; its input is taken from the model's own forward pass.
        device: The device of the model.
    """

    def __init__(self, model: Any, head: torch.nn.Module, device: str) -> None:
        self._model = model
        self._head = head
        self._device = device
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._arch = read_arch(base.config)

    def __call__(self, batch: TrainingBatch) -> torch.Tensor:
        """The sum, a scalar fp32 with gradient (nats)."""
        total = torch.zeros((), device=self._device)
        for part in self._parts(batch):
            if batch.num_targets <= HEAD_ROWS or not torch.is_grad_enabled():
                total = total + self._head_loss(*part)
            else:
                total = total + checkpoint(self._head_loss, *part, use_reentrant=False)
        return total

    @torch.no_grad()
    def of_targets(self, batch: TrainingBatch) -> torch.Tensor:
        """The loss of each target, row by row, ``[num_targets]`` fp32 (nats)."""
        return torch.cat([self._head_loss(*part, "none") for part in self._parts(batch)])

    def _parts(self, batch: TrainingBatch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The head's input at the targets and the targets, ``HEAD_ROWS`` at a time."""
        hidden = self._hidden(batch)
        # Drop the positions of a learned prompt, which come first.
        hidden = hidden[:, -batch.targets.shape[1] :].flatten(0, 1)
        # Search on the CPU, where the batch is: on the device, the result would require a wait.
        targets = batch.targets.flatten()
        asked = (targets != IGNORED).nonzero().squeeze(1)
        states = hidden[asked.to(self._device)]
        wanted = targets[asked].to(self._device)
        return zip(states.split(HEAD_ROWS), wanted.split(HEAD_ROWS), strict=True)

    def _hidden(self, batch: TrainingBatch) -> torch.Tensor:
        """The head's input, ``[rows, positions, hidden]``; the head itself computes nothing."""
        taken: list[torch.Tensor] = []

        def take(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
            taken.append(inputs[0])
            return (inputs[0][:, :0],)

        keywords: dict[str, Any] = {}
        if batch.positions is not None:
            keywords["position_ids"] = batch.positions.to(self._device)
        if batch.starts:
            # Pass offsets, because PEFT would also look for the invocation in the answer. Offsets
            # count from the row's end.
            width = batch.tokens.shape[1]
            keywords["alora_offsets"] = [width - start for start in batch.starts]
        handle = self._head.register_forward_pre_hook(take)
        try:
            with without_peft_warnings():
                self._model(input_ids=batch.tokens.to(self._device), use_cache=False, **keywords)
        finally:
            handle.remove()
        return taken[0]

    def _head_loss(
        self, states: torch.Tensor, targets: torch.Tensor, reduction: str = "sum"
    ) -> torch.Tensor:
        logits = self._head(states).float() * self._arch.logit_scale
        if self._arch.logit_softcap is not None:
            logits = self._arch.logit_softcap * (logits / self._arch.logit_softcap).tanh()
        return cross_entropy(logits, targets, reduction=reduction)


# The part of a parameter's name by which PEFT marks the second factor, whose learning rate LoRA+
# raises.
_B = ".lora_B."


def make_optimizer(
    parameters: Iterable[tuple[str, torch.nn.Parameter]], config: OptimizerConfig
) -> torch.optim.Optimizer:
    """Create the optimizer.

    Args:
        parameters: The trained parameters as (name, parameter).
        config: The resolved config; the learning rate is set, and the optimizer fits the device.

    Returns:
        Two groups with LoRA+ (arXiv 2402.12354), else one; each holds its learning rate relative to
        ``learning_rate`` as ``ratio``.
    """
    ratio = config.lora_plus_ratio or 1.0
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in parameters:
        groups.setdefault(ratio if _B in name else 1.0, []).append(parameter)
    kinds: dict[str, Any] = {
        "adamw": torch.optim.AdamW,
        "adamw8bit": AdamW8bit,
        "paged-adamw8bit": PagedAdamW8bit,
    }
    return kinds[config.name](
        [{"params": members, "ratio": scale} for scale, members in groups.items()],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
    )


def learning_rate(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """The learning rate of a step, counted from 0: a linear rise, then half a cosine to 0.

    The learning rate depends only on the step, so a resumed run needs no schedule state.
    """
    assert config.learning_rate is not None  # resolved
    warmup = max(1, round(num_steps * config.warmup_fraction))
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, num_steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group, times its ``ratio``."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["ratio"]
