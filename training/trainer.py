"""The training loop. ``run/folder.py`` describes the files that it writes."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from turret.training.base_model import (
    DTYPES,
    compute_activations_twice,
    keep_freed_memory,
    load_model,
    peak_memory_bytes,
    without_backward,
)
from turret.training.batches import BatchStream, Row, TrainingBatch, make_batch
from turret.training.classifier import (
    ClassifierLoss,
    add_head,
    classifier_loss,
    label_samples,
    label_scores,
    make_loss,
    write_head,
)
from turret.training.errors import RunError
from turret.training.fusion import adapter_digest
from turret.training.loss import LossFunction, learning_rate, make_optimizer, set_learning_rate
from turret.training.run.checkpoint import restore_checkpoint, save_checkpoint
from turret.training.run.folder import MetricsLog, RunFolder, what_next
from turret.training.run.provenance import FILE, describe_run
from turret.training.run.resuming import check_same_run
from turret.training.run.samples import draw_samples
from turret.training.settings.checks import PROMPTS
from turret.training.settings.config import render_config
from turret.training.settings.resolve import Resolved
from turret.training.words import say
from turret.words import counted

# Called with every line of metrics.jsonl and with the events between them: ``kind`` is ``begin``
# (with ``steps``), ``phase`` (``text`` is the current work) or ``note`` (``text`` for the reader).
Listener = Callable[[dict[str, Any]], None]


def _nobody(row: dict[str, Any]) -> None:
    """A listener that does nothing."""


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """A finished run.

    Attributes:
        folder: The directory of the run.
        validation_loss: The final loss, in nats per learned token; None without a validation set.
        seconds: Seconds of training, over all attempts.
        memory_bytes: The peak, as in ``metrics.jsonl``.
    """

    folder: RunFolder
    validation_loss: float | None
    seconds: float
    memory_bytes: int


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


class Trainer:
    """Runs the training.

    Args:
        resolved: The run to train.
        listen: Called with every line of the metrics as it is written.
    """

    def __init__(self, resolved: Resolved, listen: Listener = _nobody) -> None:
        config = resolved.config
        assert config.run.steps is not None
        assert config.base.device is not None
        self._resolved = resolved
        self._config = config
        self._listen = listen
        self._num_steps = config.run.steps
        self._device: str = config.base.device
        self._folder = RunFolder(Path(config.run.output))

    def run(self, *, resume: bool = False, overwrite: bool = False) -> FinishedRun:
        """Train, from the start or from the newest checkpoint, and write the adapter.

        Args:
            resume: Continue the run in the output directory.
            overwrite: Remove an existing run.

        Raises:
            RunError: The directory contains a run and neither flag is set, or that run is finished
                or a different one, or the loss is no longer finite.
        """
        started = time.monotonic()
        self._listen({"kind": "begin", "steps": self._num_steps})
        self._folder.check(resume=resume, overwrite=overwrite)
        if overwrite and self._folder.facts.exists():
            self._folder.clear()
        if resume:
            self._check_same()
        self._say("loading the base model")
        model = attach(self._resolved)
        parameters = trainable(model)
        optimizer = make_optimizer(parameters.items(), self._config.optimizer)
        facts = describe_run(self._resolved, sum(p.numel() for p in parameters.values()))
        self._check_room(parameters.values())
        step = 0
        if resume:
            newest = self._folder.newest_checkpoint
            if newest is not None:
                step = restore_checkpoint(newest, parameters, optimizer)
            self._listen({"kind": "note", "text": f"resuming from step {step}"})
        else:
            self._folder.path.mkdir(parents=True, exist_ok=True)
            self._folder.config.write_text(render_config(self._config), encoding="utf-8")
            self._folder.write_facts(facts)
        log = MetricsLog(
            self._folder.metrics,
            keep_up_to_step=step if step else -1,
            tensorboard=self._folder.tensorboard if self._config.run.report_to != "none" else None,
        )
        before = log.seconds
        try:
            loop = _Loop(self._resolved, model, parameters, optimizer, log, self._listen)
            loss = loop.run(step, self._folder.checkpoints)
        finally:
            log.close()
        memory = peak_memory_bytes(self._device)
        result = {"validation_loss": loss, "seconds": log.seconds, "memory_bytes": memory}
        self._folder.write_facts(facts | {"result": result})
        # Write the adapter after everything but the samples: an existing adapter means a result.
        self._write_adapter(model, facts | {"steps": self._num_steps, "validation_loss": loss})
        self._listen({"kind": "note", "text": what_next(self._resolved, self._folder)})
        self._write_samples(model)
        # Wall time of this attempt plus the training time of earlier ones.
        waited = before + time.monotonic() - started
        self._folder.write_facts(facts | {"result": result, "waited_seconds": round(waited, 1)})
        return FinishedRun(self._folder, loss, log.seconds, memory)

    @property
    def is_started(self) -> bool:
        """Whether the directory contains a run, this one or another, finished or not."""
        return self._folder.facts.exists()

    def finished(self) -> FinishedRun | None:
        """The result of this run, if it is already finished.

        Raises:
            RunError: The directory contains a run with other inputs.
        """
        if not self._folder.is_finished:
            return None
        return FinishedRun(self._folder, **self._check_same()["result"])

    def _check_same(self) -> dict[str, Any]:
        """The facts of the existing run; raises RunError if it has other inputs."""
        facts = self._folder.read_facts()
        now = describe_run(self._resolved, facts["num_parameters"])
        check_same_run(facts, now, self._folder.path)
        return facts

    def _check_room(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Raises RunError if the disk is too full for what the run will write to it.

        For methods that learn a prompt, the adapter is not counted: its network is not saved, only
        the small prompt.
        """
        run, num_parameters = self._config.run, sum(p.numel() for p in parameters)
        needed = 0
        if self._config.method.name not in PROMPTS:
            needed += num_parameters * DTYPES[run.adapter_dtype].itemsize
        if run.checkpoint_every and run.checkpoint_every <= self._num_steps:
            # A checkpoint has the weights in float32. The oldest is removed after a new one is
            # written.
            needed += num_parameters * 4 * (run.keep_checkpoints + 1)
        there = next(
            path for path in (self._folder.path, *self._folder.path.parents) if path.exists()
        )
        free = shutil.disk_usage(there).free
        if free < needed:
            raise RunError(say("RUN_DISK_FULL", path=there, free=free, needed=needed))

    def _say(self, text: str) -> None:
        self._listen({"kind": "phase", "text": text})

    def _write_samples(self, model: Any) -> None:
        rows = self._resolved.dataset.validation[: self._config.run.samples]
        examples = [example for row in rows for example in row]
        count = len(examples)

        def progress(done: int, total: int) -> None:
            self._say(f"answering {counted(count, 'sample')} {done + 1}/{total}")

        tokenizer = self._resolved.base.tokenizer
        labels = self._resolved.dataset.labels
        with without_backward(model):
            if labels:
                loss = classifier_loss(model, self._resolved.dataset, self._device)
                samples = label_samples(loss, tokenizer, examples, labels)
            else:
                samples = draw_samples(model, tokenizer, examples, self._device, progress)
        text = "".join(json.dumps(sample) + "\n" for sample in samples)
        self._folder.samples.write_text(text, encoding="utf-8")

    def _write_adapter(self, model: Any, facts: dict[str, Any]) -> None:
        """Write the adapter; its directory appears only when every file in it is complete."""
        partial = self._folder.path / "adapter.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        dtype, dataset = DTYPES[self._config.run.adapter_dtype], self._resolved.dataset
        self._resolved.method.save(model, partial, dtype)
        if dataset.labels:
            write_head(model, partial, dataset, dtype)
        provenance = {**facts, "adapter": {"digest": adapter_digest(partial)}}
        text = json.dumps(provenance, indent=2, sort_keys=True) + "\n"
        (partial / FILE).write_text(text, encoding="utf-8")
        partial.rename(self._folder.adapter)


class _Loop:
    """Steps, validations and checkpoints of one attempt."""

    def __init__(
        self,
        resolved: Resolved,
        model: Any,
        parameters: dict[str, torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        log: MetricsLog,
        listen: Listener,
    ) -> None:
        config, dataset = resolved.config, resolved.dataset
        assert config.base.device is not None
        assert config.run.steps is not None
        self._config = config
        self._device: str = config.base.device
        self._num_steps = config.run.steps
        self._model = model
        self._parameters = parameters
        self._optimizer = optimizer
        self._log = log
        self._listen = listen
        self._loss = make_loss(resolved, model)
        self._pad = pad_token(resolved.base.tokenizer)
        self._stream = make_stream(resolved)
        self._validation = dataset.validation
        self._labels = dataset.labels
        self._tokens = log.tokens
        self._started = time.monotonic() - log.seconds

    def run(self, step: int, checkpoints: Path) -> float | None:
        """Train from ``step`` finished steps to the end; returns the last validation loss."""
        run = self._config.run
        loss = None
        if step == 0:
            self._validate(0)
        while step < self._num_steps:
            self._step(step)
            step += 1
            is_last = step == self._num_steps
            if is_last or step % run.validate_every == 0:
                loss = self._validate(step)
            if run.checkpoint_every and not is_last and step % run.checkpoint_every == 0:
                save_checkpoint(
                    checkpoints,
                    step,
                    self._parameters,
                    self._optimizer,
                    keep=run.keep_checkpoints,
                )
        return loss

    def _step(self, step: int) -> None:
        run = self._config.run
        first = step * run.gradient_accumulation
        batches = [self._stream.batch(first + i) for i in range(run.gradient_accumulation)]
        num_targets = sum(batch.num_targets for batch in batches)
        self._model.train()
        total = 0.0
        for batch in batches:
            # Divide by the targets of the whole step, so that accumulation equals one large batch.
            loss = self._loss(batch) / num_targets
            loss.backward()
            total += loss.item()
        if not total < float("inf"):
            raise RunError(say("LOSS_NOT_FINITE", step=step + 1, loss=total))
        limit = self._config.optimizer.max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), limit)
        rate = learning_rate(step, self._num_steps, self._config.optimizer)
        set_learning_rate(self._optimizer, rate)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._tokens += sum(batch.num_tokens for batch in batches)
        self._write(
            {
                "kind": "step",
                "step": step + 1,
                "loss": total,
                "learning_rate": rate,
                "grad_norm": norm.item(),
            }
        )

    def _validate(self, step: int) -> float | None:
        if not self._validation:
            return None

        def progress(done: int, total: int) -> None:
            self._listen({"kind": "phase", "text": f"validating {done + 1}/{total}"})

        size = self._config.run.batch_size
        with without_backward(self._model):
            loss = validation_loss(self._loss, self._validation, size, self._pad, progress)
            row: dict[str, Any] = {"kind": "validation", "step": step, "loss": loss}
            if isinstance(self._loss, ClassifierLoss):
                row |= label_scores(self._loss, self._validation, self._labels, size, self._pad)
        self._write(row)
        return loss

    def _write(self, row: dict[str, Any]) -> None:
        self._log.seconds = time.monotonic() - self._started
        row |= {
            "tokens": self._tokens,
            "seconds": round(self._log.seconds, 3),
            "memory_bytes": peak_memory_bytes(self._device),
        }
        self._log.write(row)
        self._listen(row)


@torch.no_grad()
def validation_loss(
    loss: LossFunction,
    rows: Sequence[Row],
    batch_size: int,
    pad: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """Mean loss per learned token over all rows, in nats; reports finished batches."""
    batches: list[TrainingBatch] = [
        make_batch(rows[start : start + batch_size], pad=pad, is_packed=False)
        for start in range(0, len(rows), batch_size)
    ]
    total = 0.0
    for done, batch in enumerate(batches):
        on_progress(done, len(batches))
        total += loss(batch).item()
    return total / sum(batch.num_targets for batch in batches)


def make_stream(resolved: Resolved) -> BatchStream:
    """The batches of a run, in order."""
    config = resolved.config
    return BatchStream(
        resolved.dataset.train,
        batch_size=config.run.batch_size,
        pad=pad_token(resolved.base.tokenizer),
        seed=config.run.seed,
        is_packed=config.data.packing,
    )


def pad_token(tokenizer: Any) -> int:
    """The token that fills short rows. It is never a target, so the end of text can replace it."""
    pad = tokenizer.pad_token_id
    return tokenizer.eos_token_id if pad is None else pad
