"""The loss of a batch: the head runs on positions with a target only.

Over all positions of a batch, logits of a 49 152-token vocabulary cost more than the layers of a
small model do, in time and in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from turret.server.models.families import read_arch
from turret.training.data.batch import IGNORED, Batch
from turret.training.models.peft_warnings import without_peft_warnings

# Positions whose logits exist at one time; more are computed in turn, and again in the backward.
HEAD_ROWS = 512


class LossFunction:
    """Sum of the cross entropy over a batch's targets.

    Args:
        model: What a method's ``attach`` returns.
        head: The base's ``lm_head``; its input is taken from the model's own forward pass.
        device: Of the model.
    """

    def __init__(self, model: Any, head: torch.nn.Module, device: str) -> None:
        self._model = model
        self._head = head
        self._device = device
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._arch = read_arch(base.config)

    def __call__(self, batch: Batch) -> torch.Tensor:
        """The sum, a scalar fp32 with gradient (nats)."""
        total = torch.zeros((), device=self._device)
        for part in self._parts(batch):
            if batch.num_targets <= HEAD_ROWS or not torch.is_grad_enabled():
                total = total + self._head_loss(*part)
            else:
                total = total + checkpoint(self._head_loss, *part, use_reentrant=False)
        return total

    @torch.no_grad()
    def of_targets(self, batch: Batch) -> torch.Tensor:
        """The loss of each target, row by row, ``[num_targets]`` fp32 (nats)."""
        return torch.cat([self._head_loss(*part, "none") for part in self._parts(batch)])

    def _parts(self, batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The head's input at the targets and the targets, ``HEAD_ROWS`` at a time."""
        hidden = self._hidden(batch)
        # A learned prompt's own positions come first.
        hidden = hidden[:, -batch.targets.shape[1] :].flatten(0, 1)
        # Found on the CPU, where the batch is: on the device it would have to wait for the answer.
        targets = batch.targets.flatten()
        asked = (targets != IGNORED).nonzero().squeeze(1)
        states = hidden[asked.to(self._device)]
        wanted = targets[asked].to(self._device)
        return zip(states.split(HEAD_ROWS), wanted.split(HEAD_ROWS), strict=True)

    def _hidden(self, batch: Batch) -> torch.Tensor:
        """The head's input, ``[rows, positions, hidden]``; the head itself computes nothing."""
        taken: list[torch.Tensor] = []

        def take(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
            taken.append(inputs[0])
            return (inputs[0][:, :0],)

        keywords: dict[str, Any] = {}
        if batch.positions is not None:
            keywords["position_ids"] = batch.positions.to(self._device)
        if batch.starts:
            # PEFT would search the answer too; it counts from the end of the row.
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
