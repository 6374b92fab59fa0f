"""An adapter in training: its tensors, their gradients, and its optimizer."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from turret.server.adapters.adapter import CONFIG_FILE, TENSORS_FILE
from turret.server.adapters.base import BaseModel, BaseModule
from turret.server.adapters.checkpoint.adapter_checkpoint import (
    PEFT_PREFIX,
    PROMPT_EMBEDDINGS,
    AdapterCheckpoint,
)
from turret.server.adapters.fuse.lora_files import (
    AdapterFiles,
    save_tensors,
    target_modules,
)
from turret.server.adapters.lowering.method import LinearMethod
from turret.server.adapters.lowering.start import NewModule
from turret.server.adapters.methods.lower import lower_checkpoint
from turret.server.adapters.operators.adapter_operators import AdapterOperators
from turret.server.adapters.operators.vocabulary import HEAD
from turret.server.errors import AdapterCheckpointError, InvalidRequestError
from turret.server.training.methods import served_method
from turret.server.training.trainer import AdamParams, LearnerConfig
from turret.server.training.training_pass import PassAdapter
from turret.server.words import say

OPTIMIZER_FILE = "optimizer.safetensors"
_serial = itertools.count(1)


# Tensors of operators by module path; see ``Segment``.
Leaves = Mapping[str, Sequence[torch.Tensor]]


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
        self._optimizer = torch.optim.AdamW(self.parameters.values(), lr=0.0, fused=True)
        self.served, self.leaves = self._refreshed(self.parameters)

    def _lower(self, base: BaseModel, tensors: Mapping[str, torch.Tensor]) -> AdapterOperators:
        checkpoint = AdapterCheckpoint(self._key, self.config, tensors, digest="", bytes_disk=0)
        return lower_checkpoint(checkpoint, base)[1].operators

    def _refreshed(self, tensors: Mapping[str, torch.Tensor]) -> tuple[PassAdapter, Leaves]:
        """The adapter with these tensors as requests would use it, and its leaves.

        Raises:
            AdapterCheckpointError: The tensors cannot be served.
        """
        self._count += 1
        operators = self._lower(
            self._base, {name: tensor.detach() for name, tensor in tensors.items()}
        )
        leaves = {
            path: [
                tensor.to(torch.float32, copy=True).requires_grad_() for tensor in module.tensors()
            ]
            for path, module in _modules(operators).items()
        }
        return PassAdapter(f"{self._key}/{self._count}", operators), leaves

    @property
    def num_soft_tokens(self) -> int:
        """The number of soft tokens before each sequence."""
        operators = self.served.operators
        prompt = None if operators is None else operators.soft_prompt
        return 0 if prompt is None else prompt.num_positions

    def fresh_leaves(self, device: torch.device | None = None) -> dict[str, list[torch.Tensor]]:
        """The leaves with separate gradients, on the CPU or another device, for one segment."""
        return {
            path: [leaf.detach().to(device).requires_grad_() for leaf in leaves]
            for path, leaves in self.leaves.items()
        }

    def collect(self) -> None:
        """Turn the gradients of the operators into gradients of the tensors, and drop them."""
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
        for leaf in itertools.chain(*self.leaves.values()):
            leaf.grad = None

    def step(self, adam: AdamParams) -> dict[str, float]:
        """Update the tensors with the gradients since the last step, and reset the gradients.

        Returns:
            The norm of the gradient before it was clipped.

        Raises:
            InvalidRequestError: The gradient is infinite or NaN; the tensors stay as they were.
            AdapterCheckpointError: The new tensors cannot be served, such as infinite ones; the
                tensors stay as they were.
        """
        self.collect()
        tensors = list(self.parameters.values())
        limit = adam.grad_clip_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(tensors, limit, foreach=True)
        if not norm.isfinite():
            self._optimizer.zero_grad()
            raise InvalidRequestError(say("GRADIENT_NOT_FINITE"))
        for group in self._optimizer.param_groups:
            group |= {
                "lr": adam.learning_rate,
                "betas": (adam.beta1, adam.beta2),
                "eps": adam.eps,
                "weight_decay": adam.weight_decay,
            }
        before = [tensor.detach().clone() for tensor in tensors]
        self._optimizer.step()
        self._optimizer.zero_grad()
        try:
            self.served, self.leaves = self._refreshed(self.parameters)
        except AdapterCheckpointError:
            with torch.no_grad():
                for tensor, old in zip(tensors, before, strict=True):
                    tensor.copy_(old)
            raise
        return {"grad_norm": float(norm)}

    # Files.

    def files(self) -> AdapterFiles:
        """The adapter in PEFT's layout. The tensors change with the next step."""
        return AdapterFiles(self.config, self._tensors())

    def save(self, folder: Path, *, with_optimizer: bool) -> None:
        """Write the adapter in PEFT's layout, and the optimizer's state alongside it."""
        save_tensors(self._tensors(), folder / TENSORS_FILE)
        text = json.dumps(self.config, indent=2, sort_keys=True) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
        if with_optimizer:
            save_tensors(self._state(), folder / OPTIMIZER_FILE)

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {_in_file(name): p.detach() for name, p in self.parameters.items()}

    def _state(self) -> dict[str, torch.Tensor]:
        return {
            f"{name}/{key}": value.reshape(-1) if value.dim() == 0 else value
            for name, p in self.parameters.items()
            for key, value in self._optimizer.state[p].items()
        }

    def load(self, folder: Path, *, with_optimizer: bool) -> None:
        """Restore the tensors, and optionally the optimizer's state, that ``save`` wrote.

        Raises:
            AdapterCheckpointError: The tensors cannot be served; everything stays as it was.
        """
        # A save may replace the directory meanwhile, so read both files from the same open
        # directory.
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            opened = Path(f"/proc/self/fd/{directory}")
            tensors = {
                name.removeprefix(PEFT_PREFIX): tensor
                for name, tensor in load_file(opened / TENSORS_FILE).items()
            }
            saved = load_file(opened / OPTIMIZER_FILE) if with_optimizer else {}
        finally:
            os.close(directory)
        self.served, self.leaves = self._refreshed(tensors)
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(tensors[name])
        self._optimizer.state.clear()
        for key, value in saved.items():
            name, _, field = key.rpartition("/")
            state = self._optimizer.state[self.parameters[name]]
            state[field] = value.reshape(()) if field == "step" else value


def add_gradients(total: Leaves, more: Leaves) -> None:
    """Add the gradients of leaves to those of others with the same names and shapes."""
    for path, leaves in total.items():
        for leaf, other in zip(leaves, more[path], strict=True):
            if other.grad is not None:
                grad = other.grad.to(leaf.device)
                leaf.grad = grad if leaf.grad is None else leaf.grad + grad


def _modules(operators: AdapterOperators) -> dict[str, Any]:
    """The operators of all linear modules, including the head, and the prompt."""
    head = {} if operators.head is None else {HEAD: operators.head}
    prompt = {} if operators.soft_prompt is None else {PROMPT_EMBEDDINGS: operators.soft_prompt}
    return {**operators.modules, **head, **prompt}


def _in_file(name: str) -> str:
    """The name of a tensor in PEFT's file."""
    return name if name == PROMPT_EMBEDDINGS else f"{PEFT_PREFIX}{name}"


# New adapters.

# A parameter, its gradient and two moments in float32, the same number in an operator, its copy
# with a gradient, and one more gradient in a pass.
BYTES_PER_PARAMETER = 32
_ALPHA = 32.0


def num_bytes(new: LearnerConfig, modules: Sequence[str], base: BaseModel) -> int:
    """The approximate memory of an adapter in training; arguments are those of ``new_adapter``."""
    method, _ = served_method(new.method)
    has_rank = isinstance(method, LinearMethod) and method.rank is not None
    numbers = 0
    for module, tensors in _start(new, modules, base, None):
        count = sum(tensor.numel() for tensor in tensors.values())
        # Operators may have more numbers than the tensors, such as two factors for one tensor.
        low_rank = new.rank * (module.inputs + module.outputs)
        numbers += max(count, low_rank) if has_rank else 2 * count
    return BYTES_PER_PARAMETER * numbers


def new_adapter(
    new: LearnerConfig, modules: Sequence[str], base: BaseModel
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The config and the initial tensors of an adapter.

    Unless it learns a prompt, it does not change the model yet.

    Args:
        new: What to train, with a method of ``METHODS`` and a seed.
        modules: The paths of the trained modules.
        base: The base model.

    Returns:
        The config as PEFT writes it, and the tensors by name, without PEFT's prefix.

    Raises:
        InvalidRequestError: The method cannot have this rank.
    """
    assert new.seed is not None
    method, changes = served_method(new.method)
    assert method.start is not None
    config: dict[str, Any] = {
        "peft_type": next(iter(method.peft_types)),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
    }
    targets: list[str] = []
    if isinstance(method, LinearMethod):
        config["target_modules"] = targets = target_modules(list(modules), base)
        if method.rank is not None:
            config[method.rank] = new.rank
        if method.alpha is not None:
            config[method.alpha] = _ALPHA if new.alpha is None else new.alpha
    else:
        config["token_dim"] = base.hidden_size
    config |= {**method.start.config(new.rank, targets), **changes}
    generator = torch.Generator().manual_seed(new.seed)
    return config, {
        f"{module.name}.{role}".removeprefix("."): tensor
        for module, tensors in _start(new, modules, base, generator)
        for role, tensor in tensors.items()
    }


def _start(
    new: LearnerConfig, modules: Sequence[str], base: BaseModel, generator: torch.Generator | None
) -> Iterator[tuple[NewModule, Mapping[str, torch.Tensor]]]:
    """The tensors of each module by role; without a generator, on the meta device.

    A prompt is treated as a module without a name, as wide as an embedding.
    """
    method, _ = served_method(new.method)
    assert method.start is not None
    adapted = [base.modules[name] for name in modules]
    if not isinstance(method, LinearMethod):
        width = base.hidden_size
        adapted = [BaseModule("", width, width, None, lambda: torch.empty(width, width))]
    for module in adapted:
        made = NewModule(module, new.rank, generator)
        yield made, method.start.tensors(made)
