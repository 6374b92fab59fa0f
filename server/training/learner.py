"""An adapter in training: its tensors, their gradients, and its optimizer."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from turret.server.adapters.adapter import CONFIG_FILE, TENSORS_FILE
from turret.server.adapters.base import BaseModel
from turret.server.adapters.checkpoint.adapter_checkpoint import AdapterCheckpoint
from turret.server.adapters.fuse.lora_files import (
    PREFIX,
    AdapterFiles,
    save_tensors,
    target_modules,
)
from turret.server.adapters.methods import METHODS as SERVED
from turret.server.adapters.methods.lower import lower_checkpoint
from turret.server.adapters.operators.adapter_operators import AdapterOperators
from turret.server.adapters.operators.vocabulary import HEAD
from turret.server.errors import InvalidRequestError
from turret.server.training.trainer import AdamParams
from turret.server.words import say

OPTIMIZER_FILE = "optimizer.safetensors"
_serial = itertools.count(1)


# Tensors of operators by module path; see ``Segment``.
Leaves = Mapping[str, Sequence[torch.Tensor]]


@dataclass(slots=True)
class _Served:
    """An adapter in training with its current tensors, for the store of adapters."""

    key: str
    operators: AdapterOperators | None
    bytes_device: int = 0
    # The adapter is not registered, so nothing counts its residency.
    is_retired: bool = True


class Learner:
    """An adapter in training.

    Its operators are lowered from the tensors like those of a loaded adapter. So training uses the
    same formula as serving.

    Args:
        config: The adapter's config, as PEFT writes it.
        tensors: Its tensors by the names in its file, without PEFT's prefix.
        base: The base model.

    Attributes:
        parameters: The tensors, fp32.
        served: The adapter as requests would use it.
        leaves: See ``Segment``.
    """

    def __init__(
        self, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], base: BaseModel
    ) -> None:
        self.config = config
        self._base = base
        self._key = f"training-{next(_serial)}"
        self.parameters = {
            name: tensor.to(torch.float32, copy=True).requires_grad_()
            for name, tensor in tensors.items()
        }
        self._count = 0
        self._optimizer = torch.optim.AdamW(self.parameters.values(), lr=0.0, foreach=False)
        self.served, self.leaves = self._refreshed()

    def _lower(self, base: BaseModel, tensors: Mapping[str, torch.Tensor]) -> AdapterOperators:
        checkpoint = AdapterCheckpoint(self._key, self.config, tensors, digest="", bytes_disk=0)
        return lower_checkpoint(checkpoint, base)[1].operators

    def _refreshed(self) -> tuple[_Served, Leaves]:
        self._count += 1
        operators = self._lower(
            self._base, {name: tensor.detach() for name, tensor in self.parameters.items()}
        )
        leaves = {
            path: [tensor.float().clone().requires_grad_() for tensor in module.tensors()]
            for path, module in _modules(operators).items()
        }
        return _Served(f"{self._key}/{self._count}", operators), leaves

    def fresh_leaves(self) -> dict[str, list[torch.Tensor]]:
        """The leaves with separate gradients, for one segment."""
        return {
            path: [leaf.detach().requires_grad_() for leaf in leaves]
            for path, leaves in self.leaves.items()
        }

    def collect(self) -> None:
        """Turn the gradients of the operators into gradients of the tensors."""
        with torch.enable_grad():
            # In float32, gradients are not rounded on their way through the serving dtype.
            wide = replace(self._base, dtype=torch.float32)
            modules = _modules(self._lower(wide, self.parameters))
        pairs = [
            (tensor, leaf.grad)
            for path, leaves in self.leaves.items()
            for tensor, leaf in zip(modules[path].tensors(), leaves, strict=True)
            if leaf.grad is not None and tensor.requires_grad
        ]
        if pairs:
            torch.autograd.backward([tensor for tensor, _ in pairs], [grad for _, grad in pairs])

    def step(self, adam: AdamParams) -> dict[str, float]:
        """Update the tensors with the gradients since the last step, and reset the gradients.

        Returns:
            The norm of the gradient before it was clipped.

        Raises:
            InvalidRequestError: The gradient is infinite or NaN; the tensors stay as they were.
        """
        self.collect()
        tensors = list(self.parameters.values())
        limit = adam.grad_clip_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(tensors, limit, foreach=False)
        if not norm.isfinite():
            self._optimizer.zero_grad()
            for leaf in itertools.chain(*self.leaves.values()):
                leaf.grad = None
            raise InvalidRequestError(say("GRADIENT_NOT_FINITE"))
        for group in self._optimizer.param_groups:
            group |= {
                "lr": adam.learning_rate,
                "betas": (adam.beta1, adam.beta2),
                "eps": adam.eps,
                "weight_decay": adam.weight_decay,
            }
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.served, self.leaves = self._refreshed()
        return {"grad_norm": float(norm)}

    # Files.

    def files(self) -> AdapterFiles:
        """The adapter in PEFT's layout, with copies of the tensors."""
        tensors = {f"{PREFIX}{name}": p.detach().clone() for name, p in self.parameters.items()}
        return AdapterFiles(self.config, tensors)

    def save(self, folder: Path, *, with_optimizer: bool) -> None:
        """Write the adapter in PEFT's layout, and the optimizer's state beside it."""
        tensors = {f"{PREFIX}{name}": p.detach() for name, p in self.parameters.items()}
        save_tensors(tensors, folder / TENSORS_FILE)
        text = json.dumps(self.config, indent=2, sort_keys=True) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
        if with_optimizer:
            save_tensors(self._state(), folder / OPTIMIZER_FILE)

    def _state(self) -> dict[str, torch.Tensor]:
        return {
            f"{name}/{key}": value.reshape(-1) if value.dim() == 0 else value
            for name, p in self.parameters.items()
            for key, value in self._optimizer.state[p].items()
        }

    def load(self, folder: Path, *, with_optimizer: bool) -> None:
        """Restore the tensors, and optionally the optimizer's state, that ``save`` wrote."""
        # A save may replace the directory meanwhile, so read both files from the same open
        # directory.
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            opened = Path(f"/proc/self/fd/{directory}")
            tensors = load_file(opened / TENSORS_FILE)
            saved = load_file(opened / OPTIMIZER_FILE) if with_optimizer else {}
        finally:
            os.close(directory)
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(tensors[f"{PREFIX}{name}"])
        self._optimizer.state.clear()
        for key, value in saved.items():
            name, _, field = key.rpartition("/")
            state = self._optimizer.state[self.parameters[name]]
            state[field] = value.reshape(()) if field == "step" else value
        self.served, self.leaves = self._refreshed()


def add_gradients(total: Leaves, more: Leaves) -> None:
    """Add the gradients of leaves to those of others with the same names and shapes."""
    for path, leaves in total.items():
        for leaf, other in zip(leaves, more[path], strict=True):
            if other.grad is not None:
                leaf.grad = other.grad if leaf.grad is None else leaf.grad + other.grad


def _modules(operators: AdapterOperators) -> dict[str, Any]:
    """The operators of all linear modules, including the head."""
    head = {} if operators.head is None else {HEAD: operators.head}
    return {**operators.modules, **head}


# New adapters.

_ALPHA = 32.0
METHODS = ("lora", "rslora", "dora", "loha", "ia3")


# A parameter, its gradient and two moments, the same number in an operator, its copy with a
# gradient, and one more gradient in a pass: eight numbers in float32.
_BYTES_PER_PARAMETER = 32


def num_bytes(method: str, rank: int, modules: Sequence[str], base: BaseModel) -> int:
    """The approximate memory of an adapter in training; arguments are those of ``new_adapter``."""
    shapes = [(base.modules[name].out_features, base.modules[name].in_features) for name in modules]
    outputs = sum(rows for rows, _ in shapes)
    low_rank = rank * sum(rows + columns for rows, columns in shapes)
    count = {"loha": 2 * low_rank, "ia3": outputs}.get(method, low_rank + outputs)
    return _BYTES_PER_PARAMETER * count


def new_adapter(
    method: str, rank: int, seed: int, modules: Sequence[str], base: BaseModel
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The config and the initial tensors of an adapter that does not change the model yet.

    Args:
        method: One of ``METHODS``.
        rank: The rank.
        seed: Determines the tensors.
        modules: The paths of the trained modules.
        base: The base model.

    Returns:
        The config as PEFT writes it, and the tensors by name, without PEFT's prefix.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(rows: int, columns: int) -> torch.Tensor:
        # Kaiming initialisation with a = √5, as in PEFT and torch.
        return (torch.rand(rows, columns, generator=generator) * 2 - 1) / math.sqrt(columns)

    def normal(rows: int, columns: int, scale: float) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * scale

    is_low_rank = method in ("lora", "rslora", "dora")
    kind = SERVED["lora" if method == "rslora" else method]
    config: dict[str, Any] = {
        "peft_type": next(iter(kind.peft_types)),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "target_modules": target_modules(list(modules), base),
    }
    if is_low_rank:
        config |= {"r": rank, "lora_alpha": _ALPHA}
        config |= {"use_rslora": method == "rslora", "use_dora": method == "dora"}
    elif method == "loha":
        config |= {"r": rank, "alpha": _ALPHA}
    else:
        config |= {"feedforward_modules": []}
    tensors: dict[str, torch.Tensor] = {}
    for name in modules:
        module = base.modules[name]
        rows, columns = module.out_features, module.in_features
        if is_low_rank:
            tensors[f"{name}.lora_A.weight"] = uniform(rank, columns)
            tensors[f"{name}.lora_B.weight"] = torch.zeros(rows, rank)
            if method == "dora":
                norms = torch.linalg.vector_norm(module.dequantize(), dim=1)
                tensors[f"{name}.lora_magnitude_vector"] = norms
        elif method == "loha":
            tensors[f"{name}.hada_w1_a"] = normal(rows, rank, 0.1)
            tensors[f"{name}.hada_w1_b"] = normal(rank, columns, 1.0)
            tensors[f"{name}.hada_w2_a"] = torch.zeros(rows, rank)
            tensors[f"{name}.hada_w2_b"] = normal(rank, columns, 1.0)
        else:
            tensors[f"{name}.ia3_l"] = torch.ones(rows, 1)
    return config, tensors
