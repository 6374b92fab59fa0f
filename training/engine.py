"""The engine that trains a run's adapter with PEFT, and the type of all three engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from turret.training.base_model import (
    DTYPES,
    compute_activations_twice,
    keep_freed_memory,
    load_model,
    peak_memory_bytes,
    without_backward,
)
from turret.training.batches import BatchRow, make_batch
from turret.training.classifier import (
    ClassifierLoss,
    add_head,
    label_samples,
    label_scores,
    make_loss,
    write_head,
)
from turret.training.loss import make_optimizer, set_learning_rate
from turret.training.run.checkpoint import restore_checkpoint, save_checkpoint
from turret.training.run.samples import Progress, draw_samples, model_answers
from turret.training.settings.resolve import Resolved

if TYPE_CHECKING:
    # Imported only for types, because few runs need these modules.
    from turret.training.in_process_engine import InProcessEngine
    from turret.training.server_engine import ServerEngine


def attach(resolved: Resolved) -> Any:
    """Load the base and attach the method; the run's seed determines the result."""
    base = resolved.config.base
    assert base.weights is not None
    assert base.dtype is not None
    assert base.device is not None
    if base.device == "cpu":
        keep_freed_memory()
    else:
        # Adapters are float32. TF32 multiplies as fast as bfloat16, and rounds operands less.
        torch.backends.cuda.matmul.allow_tf32 = base.dtype != "float32"
    model = load_model(resolved.base, base.weights, DTYPES[base.dtype], base.device)
    return attach_to(model, resolved).to(base.device)


def attach_to(model: Any, resolved: Resolved) -> Any:
    """Attach the method to a base model."""
    torch.manual_seed(resolved.config.run.seed)
    attached = resolved.method.attach(model, resolved.config.method, resolved.base)
    if resolved.dataset.labels:
        add_head(attached, len(resolved.dataset.labels))
    if resolved.config.run.gradient_checkpointing:
        compute_activations_twice(model)
    return attached


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    """The trained parameters by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def pad_token(tokenizer: Any) -> int:
    """The token that fills short rows. It is never a target, so the end of text can replace it."""
    pad = tokenizer.pad_token_id
    return tokenizer.eos_token_id if pad is None else pad


class PeftEngine:
    """Trains an adapter with transformers and PEFT in this process.

    Args:
        resolved: The run.

    Attributes:
        num_parameters: The number of trained weights.
        facts: What ``run.json`` records about the engine.
    """

    facts: Mapping[str, Any] = {}

    def __init__(self, resolved: Resolved) -> None:
        config = resolved.config
        assert config.base.device is not None
        self._resolved = resolved
        self._config = config
        self._device: str = config.base.device
        self._model = attach(resolved)
        self._parameters = trainable(self._model)
        self._optimizer = make_optimizer(self._parameters.items(), config.optimizer)
        self._loss = make_loss(resolved, self._model)
        self._pad = pad_token(resolved.base.tokenizer)
        self.num_parameters = sum(p.numel() for p in self._parameters.values())

    def backward(self, parts: Sequence[Sequence[BatchRow]]) -> float:
        """Compute the gradients of a step.

        Args:
            parts: The rows of each pass.

        Returns:
            The mean loss over the learned tokens of all parts (nats).
        """
        is_packed = self._config.data.packing
        batches = [make_batch(rows, pad=self._pad, is_packed=is_packed) for rows in parts]
        num_targets = sum(batch.num_targets for batch in batches)
        self._model.train()
        total = 0.0
        for batch in batches:
            # Divide by the targets of the whole step, so that accumulation equals one large batch.
            loss = self._loss(batch) / num_targets
            loss.backward()
            total += loss.item()
        return total

    def step(self, learning_rate: float) -> float:
        """Change the weights by the gradients; returns their norm before clipping."""
        limit = self._config.optimizer.max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), limit)
        set_learning_rate(self._optimizer, learning_rate)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm.item()

    @torch.no_grad()
    def loss(self, rows: Sequence[BatchRow]) -> float:
        """The sum of the loss over rows, without gradients (nats)."""
        with without_backward(self._model):
            return self._loss(make_batch(rows, pad=self._pad, is_packed=False)).item()

    def scores(self, rows: Sequence[BatchRow]) -> dict[str, Any]:
        """The figures of a validation other than the loss, by name."""
        if not isinstance(self._loss, ClassifierLoss):
            return {}
        labels, size = self._resolved.dataset.labels, self._config.run.batch_size
        with without_backward(self._model):
            return label_scores(self._loss, rows, labels, size, self._pad)

    def save(self, checkpoints: Path, step: int) -> None:
        """Write a checkpoint to a directory."""
        save_checkpoint(checkpoints, step, self._parameters, self._optimizer)

    def restore(self, checkpoint: Path) -> int:
        """Continue from a checkpoint; returns the number of finished steps."""
        return restore_checkpoint(checkpoint, self._parameters, self._optimizer)

    def discard(self, checkpoint: Path) -> None:
        """Remove a checkpoint."""
        checkpoint.unlink()

    def write(self, folder: Path) -> None:
        """Write the adapter in PEFT's layout to an existing directory.

        Raises:
            RunError: A weight is not finite in the dtype of the saved adapter.
        """
        dtype, dataset = DTYPES[self._config.run.adapter_dtype], self._resolved.dataset
        self._resolved.method.save(self._model, folder, dtype)
        if dataset.labels:
            write_head(self._model, folder, dataset, dtype)

    def end(self, checkpoints: Sequence[Path]) -> None:
        """Remove what the checkpoints of a finished run hold outside its directory."""

    def samples(self, rows: Sequence[BatchRow], on_progress: Progress) -> list[dict[str, Any]]:
        """Answers to the examples of rows; see ``run/samples.py``."""
        examples = [example for row in rows for example in row]
        tokenizer, labels = self._resolved.base.tokenizer, self._resolved.dataset.labels
        with without_backward(self._model):
            if isinstance(self._loss, ClassifierLoss):
                return label_samples(self._loss, tokenizer, examples, labels)
            answers = model_answers(self._model, tokenizer, self._device)
            return draw_samples(answers, tokenizer, examples, on_progress)

    def peak_memory(self) -> int:
        """The peak so far in bytes, as in ``metrics.jsonl``."""
        return peak_memory_bytes(self._device)

    def close(self) -> None:
        """Free what the engine holds outside this process."""


# ``PeftEngine`` documents the methods, which all three have.
Engine: TypeAlias = "PeftEngine | InProcessEngine | ServerEngine"
