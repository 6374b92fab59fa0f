"""A small trainer for tests: an adapter is a table of logits, with a row for each token.

The next token's logits are the row of the current token, so losses, gradients and steps are those
of a real model of one layer, computed by torch.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import safetensors.torch
import torch

from turret.server.errors import InvalidRequestError
from turret.server.training import AdamParams, Datum, DatumLoss, LearnerConfig, Published
from turret.server.words import say

CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}


@dataclass
class Table:
    """An adapter, its optimizer and the calls that it has seen."""

    config: LearnerConfig
    logits: torch.Tensor
    optimizer: torch.optim.AdamW
    calls: list[str] = field(default_factory=list)


class TableTraining:
    """Trains tables.

    Args:
        vocab_size: The number of tokens.

    Attributes:
        learners: The adapters in training.
        published: The tables that are registered for sampling, by name.
        may_run: Passes wait until it is set.
        may_serve: ``serve`` waits until it is set, on a thread, which a cancelled caller leaves.
        serving: Set when ``serve`` has begun.
    """

    def __init__(self, vocab_size: int) -> None:
        self._size = vocab_size
        self._numbers = itertools.count(1)
        self._generations = itertools.count(1)
        self.learners: dict[int, Table] = {}
        self.published: dict[str, torch.Tensor] = {}
        self.may_run = asyncio.Event()
        self.may_run.set()
        self.may_serve, self.serving = threading.Event(), threading.Event()
        self.may_serve.set()

    async def create(self, config: LearnerConfig, owner: str = "") -> int:
        if config.method != "lora":
            why = say("NOT_ONE_OF", value=config.method, choices="lora")
            raise InvalidRequestError.of("user_metadata", why)
        seed = torch.Generator().manual_seed(config.seed or 0)
        logits = (torch.randn(self._size, self._size, generator=seed) * 0.01).requires_grad_()
        number = next(self._numbers)
        self.learners[number] = Table(config, logits, torch.optim.AdamW([logits]))
        return number

    async def drop(self, adapter_id: int) -> None:
        self.learners.pop(adapter_id, None)

    async def pass_over(
        self,
        adapter_id: int,
        data: Sequence[Datum],
        loss: str,
        config: Mapping[str, float],
        *,
        is_forward_only: bool = False,
    ) -> list[DatumLoss]:
        table = self.learners[adapter_id]
        await self.may_run.wait()
        table.calls.append(f"{'forward' if is_forward_only else 'pass'} {len(data)}")
        results, total = [], torch.zeros(())
        for datum in data:
            rows = torch.log_softmax(table.logits[torch.tensor(datum.tokens)], -1)
            logprobs = rows.gather(1, datum.inputs["target_tokens"][:, None])[:, 0]
            losses = _losses(loss, logprobs, datum.inputs, {**CLIP, "beta": 0.1, **config})
            total = total + losses.sum()
            results.append(DatumLoss(logprobs.detach(), losses.detach()))
        if not is_forward_only:
            total.backward()
        return results

    async def step(self, adapter_id: int, adam: AdamParams) -> dict[str, float]:
        table = self.learners[adapter_id]
        table.calls.append("step")
        if table.logits.grad is None:
            table.logits.grad = torch.zeros_like(table.logits)
        norm = float(table.logits.grad.norm())
        if adam.grad_clip_norm:
            torch.nn.utils.clip_grad_norm_([table.logits], adam.grad_clip_norm)
        (group,) = table.optimizer.param_groups
        group |= {"lr": adam.learning_rate, "betas": (adam.beta1, adam.beta2), "eps": adam.eps}
        group["weight_decay"] = adam.weight_decay
        table.optimizer.step()
        table.optimizer.zero_grad()
        return {"grad_norm": norm, "nothing": float("nan")}

    async def save(self, adapter_id: int, folder: Path, *, with_optimizer: bool) -> None:
        table = self.learners[adapter_id]
        table.calls.append("save")
        (folder / "adapter_config.json").write_text(json.dumps(asdict(table.config)))
        tensors = {"logits": table.logits.detach()}
        safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
        if with_optimizer:
            torch.save(table.optimizer.state_dict(), folder / "optimizer.pt")

    async def load(self, adapter_id: int, folder: Path, *, with_optimizer: bool) -> None:
        table = self.learners[adapter_id]
        table.calls.append("load")
        with torch.no_grad():
            table.logits.copy_(_tensor(folder))
        if with_optimizer:
            table.optimizer.load_state_dict(torch.load(folder / "optimizer.pt"))

    async def publish(self, adapter_id: int, name: str) -> Published:
        self.published[name] = self.learners[adapter_id].logits.detach().clone()
        return self._published(name)

    def _published(self, name: str) -> Published:
        return Published(next(self._generations), self.published[name].nbytes)

    async def serve(self, folder: Path, name: str) -> Published:
        def run() -> Published:
            self.serving.set()
            assert self.may_serve.wait(60)
            self.published[name] = _tensor(folder)
            return self._published(name)

        return await asyncio.to_thread(run)

    async def withdraw(self, name: str) -> None:
        self.published.pop(name, None)


def _tensor(folder: Path) -> torch.Tensor:
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")["logits"]


def _losses(
    loss: str,
    logprobs: torch.Tensor,
    inputs: Mapping[str, torch.Tensor],
    config: Mapping[str, float],
) -> torch.Tensor:
    if loss == "cross_entropy":
        return -inputs["weights"] * logprobs
    advantages, ratio = inputs["advantages"], torch.exp(logprobs - inputs["logprobs"])
    clipped = ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"])
    if loss == "importance_sampling":
        return -ratio * advantages
    if loss == "ppo":
        return -torch.minimum(ratio * advantages, clipped * advantages)
    if loss == "cispo":
        return -clipped.detach() * logprobs * advantages
    assert loss == "dro"
    difference = logprobs - inputs["logprobs"]
    return -(logprobs * advantages - 0.5 * config["beta"] * difference**2)
