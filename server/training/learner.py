"""An adapter in training: its tensors, their gradients, and its optimizer."""

from __future__ import annotations

import itertools
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from turret.server.adapters.adapter import CONFIG_FILE, TENSORS_FILE
from turret.server.adapters.base import BaseModel, BaseModule
from turret.server.adapters.checkpoint import (
    PEFT_PREFIX,
    PROMPT_EMBEDDINGS,
    AdapterCheckpoint,
    Findings,
)
from turret.server.adapters.checkpoint.reader import all_finite
from turret.server.adapters.fuser import digest_of, save_tensors, target_modules
from turret.server.adapters.loader import LoadedAdapter
from turret.server.adapters.lowering import LinearMethod, NewModule, in_one_block
from turret.server.adapters.methods import method_for
from turret.server.adapters.methods.lower import lower_checkpoint
from turret.server.adapters.operators.adapter_operators import AdapterOperators
from turret.server.adapters.operators.vocabulary import HEAD
from turret.server.errors import AdapterCheckpointError, InvalidRequestError
from turret.server.training import AdamParams, LearnerConfig, served_method
from turret.server.training.training_pass import PassAdapter
from turret.server.words import say

OPTIMIZER_FILE = "optimizer.safetensors"
_serial = itertools.count(1)


# Tensors of operators by module path; see ``Segment``.
Leaves = Mapping[str, Sequence[torch.Tensor]]


class Learner:
    """An adapter in training.

    The adapter's numbers exist in three forms. The parameters are the fp32 tensors of the
    adapter's file, which the optimizer changes. The method lowers them to operators in the serving
    dtype, as it does for a loaded adapter, so training uses the same formula as serving. The leaves
    are fp32 copies of the operators' tensors: a pass adds its gradients to them, and ``collect``
    takes these back through the lowering to the parameters.

    Args:
        config: The adapter's config, as PEFT writes it.
        tensors: The method's tensors by their names in the adapter's file, without PEFT's prefix.
        base: The base model.

    Attributes:
        parameters: The tensors by name. They and their gradients are views of two long vectors,
            so that the optimizer changes them in one call.
        served: The operators, as requests would use them. A step changes their tensors in place.
        leaves: The copies with gradients, by module path.
    """

    def __init__(
        self, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], base: BaseModel
    ) -> None:
        self.config = config
        self._base = base
        self._key = f"training-{next(_serial)}"
        self._weights, views = _in_one_vector(list(tensors.values()))
        self._weights.grad = torch.zeros_like(self._weights)
        self.parameters = dict(zip(tensors, views, strict=True))
        self._gradients = _split(self._weights.grad, views)
        for parameter, gradient in zip(views, self._gradients, strict=True):
            parameter.requires_grad_().grad = gradient
        self._optimizer = torch.optim.AdamW([self._weights], lr=0.0, fused=True)
        tensors = {name: parameter.detach() for name, parameter in self.parameters.items()}
        self._method, self._lowered = lower_checkpoint(self._checkpoint(tensors), base)
        # The names and shapes stay the same, so they are checked only once. In float32, gradients
        # are not rounded on their way through the serving dtype.
        wide = replace(base, dtype=torch.float32)
        checkpoint = self._checkpoint(self.parameters)
        self._reading = method_for(checkpoint).read(checkpoint, wide)
        operators = _modules(self._lowered.operators)
        self._served = [tensor for module in operators.values() for tensor in module.tensors()]
        self._leaf_values, self._leaves = _in_one_vector(self._served)
        numbers = iter(self._leaves)
        self.leaves: Leaves = {
            path: [next(numbers).requires_grad_() for _ in module.tensors()]
            for path, module in operators.items()
        }
        self._count = 0
        self._refresh()

    def _checkpoint(
        self, tensors: Mapping[str, torch.Tensor], digest: str = "", size: int = 0
    ) -> AdapterCheckpoint:
        return AdapterCheckpoint(self._key, self.config, tensors, digest=digest, bytes_disk=size)

    def _refresh(self) -> None:
        """Compute the operators from the parameters, and drop all gradients.

        Raises:
            AdapterCheckpointError: A number is NaN or infinite.
        """
        self._count += 1
        self.served = PassAdapter(f"{self._key}/{self._count}", self._lowered.operators)
        self._drop_gradients()
        reading = self._reading
        reading.findings = Findings(self._key)
        with torch.enable_grad():
            made = _modules(method_for(reading.checkpoint).lower(reading).operators)
            found = [tensor for path in self.leaves for tensor in made[path].tensors()]
            self._source = _Source.apply(self._leaves, *found)
        with torch.no_grad():
            torch._foreach_copy_(self._served, found)  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_copy_(self._leaves, self._served)  # pyright: ignore[reportPrivateImportUsage]
        findings = Findings(self._key)
        if not (all_finite(self._weights) and all_finite(self._leaf_values)):
            findings.add(TENSORS_FILE, say("NOT_FINITE", dtype=self._base.dtype))
        findings.raise_if_any()

    def _drop_gradients(self) -> None:
        assert self._weights.grad is not None
        self._weights.grad.zero_()
        for leaf in self._leaves:
            leaf.grad = None

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
        """Turn the gradients of the operators into gradients of the tensors."""
        torch.autograd.backward(self._source, retain_graph=True)

    def step(self, adam: AdamParams) -> dict[str, float]:
        """Update the tensors with the gradients since the last step, and reset the gradients.

        Without gradients, nothing changes.

        Returns:
            The norm of the gradient before it was clipped, as ``grad_norm``.

        Raises:
            InvalidRequestError: The gradient is infinite or NaN; the tensors stay as they were.
            AdapterCheckpointError: The new tensors cannot be served, for example because they are
                infinite. The old tensors are kept, but the optimizer's averages include the
                gradient.
        """
        if all(leaf.grad is None for leaf in self._leaves):
            return {"grad_norm": 0.0}
        self.collect()
        # The norm of one long vector would be less exact.
        norm = get_total_norm(self._gradients, foreach=True)
        if not norm.isfinite():
            self._drop_gradients()
            raise InvalidRequestError(say("GRADIENT_NOT_FINITE"))
        if adam.grad_clip_norm:
            clip_grads_with_norm_([self._weights], adam.grad_clip_norm, norm)
        for group in self._optimizer.param_groups:
            group |= {
                "lr": adam.learning_rate,
                "betas": (adam.beta1, adam.beta2),
                "eps": adam.eps,
                "weight_decay": adam.weight_decay,
            }
        self._change(self._optimizer.step)
        return {"grad_norm": float(norm)}

    def _change(self, change: Callable[[], object]) -> None:
        """Change the tensors, and the operators with them.

        Raises:
            AdapterCheckpointError: A number is NaN or infinite; the tensors stay as they were.
        """
        before = self._weights.clone()
        change()
        try:
            self._refresh()
        except AdapterCheckpointError:
            self._weights.copy_(before)
            self._refresh()
            raise

    def digest(self) -> str:
        """The digest of the files that ``save`` writes."""
        return digest_of(self.config, self._tensors())

    def loaded(self, digest: str, size: int) -> LoadedAdapter:
        """The adapter as if it had been loaded from the files that ``save`` writes.

        Args:
            digest: The digest of the files.
            size: The size of the files.
        """
        facts = self._lowered.facts(self._checkpoint(self._tensors(), digest, size), self._method)
        # Copy the operators, because the next step changes them in place.
        copies: dict[str, Any] = in_one_block(_modules(self._lowered.operators))[0]
        head, prompt = copies.pop(HEAD, None), copies.pop(PROMPT_EMBEDDINGS, None)
        operators = AdapterOperators(copies, prompt, head=head)
        depends_on_base = self._lowered.depends_on_base
        return LoadedAdapter(facts, operators, self._base.generation if depends_on_base else None)

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
        parameters = list(self.parameters.values())
        # All tensors share one step count here, but the file has one for each tensor.
        of_all = {
            key: _split(value, parameters) if value.dim() else [value.view(1)] * len(parameters)
            for key, value in self._optimizer.state[self._weights].items()
        }
        return {
            f"{name}/{key}": values[number]
            for number, name in enumerate(self.parameters)
            for key, values in of_all.items()
        }

    def load(self, folder: Path, *, with_optimizer: bool) -> None:
        """Restore the tensors, and optionally the optimizer's state, that ``save`` wrote.

        Raises:
            AdapterCheckpointError: The tensors cannot be served. The tensors and the optimizer stay
                as they were, and the gradients are reset.
        """
        # A save may replace the directory meanwhile, so read both files from the same open
        # directory.
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            opened = Path(f"/proc/self/fd/{directory}")
            tensors = load_file(opened / TENSORS_FILE)
            saved = load_file(opened / OPTIMIZER_FILE) if with_optimizer else {}
        finally:
            os.close(directory)
        # Convert everything first, so that an error changes nothing.
        weights = torch.cat([tensors[_in_file(name)].view(-1) for name in self.parameters])
        found: defaultdict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        for key, value in saved.items():
            name, _, field = key.rpartition("/")
            found[field][name] = value.view(-1)
        state: dict[str, torch.Tensor] = {}
        for field, values in found.items():
            ordered = [values[name] for name in self.parameters]
            state[field] = ordered[0].view(()) if field == "step" else torch.cat(ordered)
        self._change(lambda: self._weights.copy_(weights))
        self._optimizer.state.clear()
        if state:
            self._optimizer.state[self._weights] = state


class _Source(torch.autograd.Function):
    """A scalar whose backward pass begins with the gradients of the leaves.

    Going back from one scalar takes less time than ``torch.autograd.backward`` with many tensors.
    The graph does not keep the tensors' values.
    """

    @staticmethod
    def forward(ctx: Any, leaves: Sequence[torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        ctx.leaves = leaves
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):  # type: ignore[override]
        return None, *(leaf.grad for leaf in ctx.leaves)


def _in_one_vector(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A vector with the numbers of all tensors in float32, and its views in their shapes."""
    vector = torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors])
    return vector, _split(vector, tensors)


def _split(vector: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    parts = vector.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


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


# Eight numbers in float32: a parameter, its gradient and two moments, the number in an operator,
# its copy (the leaf) and the copy's gradient, and one more gradient during a pass.
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

    Unless the adapter is a learned prompt, it does not change the model yet.

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
    """Each module with its initial tensors by role, on the meta device if there is no generator.

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
