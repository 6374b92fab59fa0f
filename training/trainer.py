"""The training loop. ``run/__init__.py`` describes the files that it writes."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turret.server.adapters.adapter import PROVENANCE_FILE
from turret.training.base_model import DTYPES
from turret.training.batches import BatchRow, BatchStream
from turret.training.engine import Engine, PeftEngine
from turret.training.fusion import adapter_digest
from turret.training.loss import learning_rate
from turret.training.run import (
    MetricsLog,
    RunFolder,
    checkpoints_in,
    read_metrics,
    step_of,
    what_next,
)
from turret.training.run.provenance import check_same_run, describe_run
from turret.training.settings import render_config
from turret.training.settings.checks import PROMPTS
from turret.training.settings.resolve import Resolved
from turret.training.words import RunError, say
from turret.words import counted

# Called with every line of metrics.jsonl and with the events between them: ``kind`` is ``begin``
# (with ``steps``), ``phase`` (``text`` is the current work) or ``note`` (``text`` for the reader).
Observer = Callable[[dict[str, Any]], None]


def _nobody(row: dict[str, Any]) -> None:
    """A listener that does nothing."""


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """A finished run, or the first steps of one.

    Attributes:
        folder: The directory of the run.
        steps: The number of steps.
        validation_loss: The loss after the steps, in nats per learned token; None without a
            validation set.
        seconds: Seconds of training, over all attempts.
    """

    folder: RunFolder
    steps: int
    validation_loss: float | None
    seconds: float


class Trainer:
    """Runs the training.

    Args:
        resolved: The run to train.
        listen: See ``Observer``.
        open_engine: Creates the engine that trains the adapter.
    """

    def __init__(
        self,
        resolved: Resolved,
        listen: Observer = _nobody,
        open_engine: Callable[[Resolved], Engine] = PeftEngine,
    ) -> None:
        config = resolved.config
        assert config.run.steps is not None
        self._resolved = resolved
        self._config = config
        self._listen = listen
        self._open_engine = open_engine
        self._num_steps = config.run.steps
        self._folder = RunFolder(Path(config.run.output))

    def run(
        self, *, resume: bool = False, overwrite: bool = False, until: int | None = None
    ) -> FinishedRun:
        """Train, from the start or from the newest checkpoint, and write the adapter.

        Args:
            resume: Continue the run in the output directory.
            overwrite: Remove an existing run.
            until: Stop after this step, with a checkpoint and without an adapter if it is not the
                last one.

        Raises:
            RunError: The directory contains a run and neither flag is set, or that run is finished
                or a different one, or the loss is no longer finite.
        """
        started = time.monotonic()
        self._listen({"kind": "begin", "steps": self._num_steps})
        self._folder.check(resume=resume, overwrite=overwrite)
        if resume:
            self.check_same()
        self._say("preparing the model")
        with closing(self._open_engine(self._resolved)) as engine:
            if overwrite and self._folder.facts.exists():
                engine.end(checkpoints_in(self._folder.checkpoints))
                self._folder.clear()
            until = min(until or self._num_steps, self._num_steps)
            return self._run(engine, started, until, resume=resume)

    def _run(self, engine: Engine, started: float, until: int, *, resume: bool) -> FinishedRun:
        origin = describe_run(self._resolved, engine.num_parameters)
        facts = {**origin, **engine.facts}
        self._check_room(engine.num_parameters)
        step = 0
        if resume:
            newest = self._folder.newest_checkpoint
            if newest is not None:
                step = engine.restore(newest)
            self._listen({"kind": "note", "text": f"resuming from step {step}"})
        else:
            self._folder.path.mkdir(parents=True, exist_ok=True)
            # Write the facts first, so that a run stopped here can be resumed or overwritten.
            self._folder.write_facts(facts)
            self._folder.config.write_text(render_config(self._config), encoding="utf-8")
        log = MetricsLog(
            self._folder.metrics,
            keep_up_to_step=step if step else -1,
            tensorboard=self._folder.tensorboard if self._config.run.report_to != "none" else None,
        )
        before = log.seconds
        try:
            loop = _Loop(self._resolved, engine, log, self._listen)
            step, loss = loop.run(step, until, self._folder.checkpoints)
        finally:
            log.close()
        if until < self._num_steps:
            return FinishedRun(self._folder, step, loss, round(log.seconds, 3))
        memory = engine.peak_memory()
        result = {"validation_loss": loss, "seconds": log.seconds, "memory_bytes": memory}
        self._folder.write_facts(facts | {"result": result})
        # Write the adapter after everything but the samples, because its directory marks the run as
        # finished.
        self._write_adapter(engine, origin | {"steps": self._num_steps, "validation_loss": loss})
        engine.end(checkpoints_in(self._folder.checkpoints))
        self._listen({"kind": "note", "text": what_next(self._resolved, self._folder)})
        self._write_samples(engine)
        # Wall time of this attempt plus the training time of earlier ones.
        waited = before + time.monotonic() - started
        self._folder.write_facts(facts | {"result": result, "waited_seconds": round(waited, 1)})
        return FinishedRun(self._folder, until, loss, log.seconds)

    @property
    def is_started(self) -> bool:
        """Whether the directory contains a run, this one or another, finished or not."""
        return self._folder.facts.exists()

    def finished(self, until: int | None = None) -> FinishedRun | None:
        """The result of this run, if it is already finished, or of its first ``until`` steps.

        Raises:
            RunError: The directory contains a run with other inputs.
        """
        if self._folder.is_finished:
            result = self.check_same()["result"]
            loss, seconds = result["validation_loss"], result["seconds"]
            return FinishedRun(self._folder, self._num_steps, loss, seconds)
        newest = self._folder.newest_checkpoint
        if until is None or newest is None or step_of(newest) < until:
            return None
        self.check_same()
        for row in read_metrics(self._folder.metrics):
            if (row["kind"], row["step"]) == ("validation", until):
                return FinishedRun(self._folder, until, row["loss"], row["seconds"])
        return None

    def check_same(self) -> dict[str, Any]:
        """The facts of the existing run; raises RunError if it has other inputs."""
        facts = self._folder.read_facts()
        now = describe_run(self._resolved, facts["num_parameters"])
        check_same_run(facts, now, self._folder.path)
        return facts

    def _check_room(self, num_parameters: int) -> None:
        """Raises RunError if the disk is too full for what the run will write to it.

        For methods that learn a prompt, the adapter is not counted: its network is not saved, only
        the small prompt.
        """
        run, needed = self._config.run, 0
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

    def _write_samples(self, engine: Engine) -> None:
        rows = self._resolved.dataset.validation[: self._config.run.samples]
        count = sum(len(row) for row in rows)

        def progress(done: int, total: int) -> None:
            self._say(f"answering {counted(count, 'sample')} {done + 1}/{total}")

        samples = engine.samples(rows, progress)
        text = "".join(json.dumps(sample) + "\n" for sample in samples)
        self._folder.samples.write_text(text, encoding="utf-8")

    def _write_adapter(self, engine: Engine, facts: dict[str, Any]) -> None:
        """Write the adapter; its directory appears only when every file in it is complete."""
        partial = self._folder.path / "adapter.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        engine.write(partial)
        provenance = {**facts, "adapter": {"digest": adapter_digest(partial)}}
        text = json.dumps(provenance, indent=2, sort_keys=True) + "\n"
        (partial / PROVENANCE_FILE).write_text(text, encoding="utf-8")
        partial.rename(self._folder.adapter)


class _Loop:
    """Steps, validations and checkpoints of one attempt."""

    def __init__(
        self, resolved: Resolved, engine: Engine, log: MetricsLog, listen: Observer
    ) -> None:
        config = resolved.config
        assert config.run.steps is not None
        self._config = config
        self._num_steps = config.run.steps
        self._engine = engine
        self._log = log
        self._listen = listen
        self._stream = make_stream(resolved)
        self._validation = resolved.dataset.validation
        self._tokens = log.tokens
        self._started = time.monotonic() - log.seconds

    def run(self, step: int, until: int, checkpoints: Path) -> tuple[int, float | None]:
        """Train from ``step`` finished steps to at least ``until``.

        Returns:
            The number of finished steps, and the last validation loss.
        """
        run = self._config.run
        loss = None
        if step == 0:
            self._validate(0)
        while step < until:
            self._step(step)
            step += 1
            if step == until or step % run.validate_every == 0:
                loss = self._validate(step)
            is_due = run.checkpoint_every and step % run.checkpoint_every == 0
            if step < self._num_steps and (is_due or step == until):
                self._engine.save(checkpoints, step)
                for path in checkpoints_in(checkpoints)[: -run.keep_checkpoints]:
                    self._engine.discard(path)
        # If no step was made, the run was resumed from a checkpoint at or after ``until``.
        return step, self._validate(step) if loss is None else loss

    def _step(self, step: int) -> None:
        run = self._config.run
        first = step * run.gradient_accumulation
        parts = [self._stream.rows(first + i) for i in range(run.gradient_accumulation)]
        loss = self._engine.backward(parts)
        if not loss < float("inf"):
            raise RunError(say("LOSS_NOT_FINITE", step=step + 1, loss=loss))
        rate = learning_rate(step, self._num_steps, self._config.optimizer)
        norm = self._engine.step(rate)
        self._tokens += sum(len(each.tokens) for rows in parts for row in rows for each in row)
        self._write(
            {
                "kind": "step",
                "step": step + 1,
                "loss": loss,
                "learning_rate": rate,
                "grad_norm": norm,
            }
        )

    def _validate(self, step: int) -> float | None:
        if not self._validation:
            return None

        def progress(done: int, total: int) -> None:
            self._listen({"kind": "phase", "text": f"validating {done + 1}/{total}"})

        size = self._config.run.batch_size
        loss = validation_loss(self._engine.loss, self._validation, size, progress)
        row: dict[str, Any] = {"kind": "validation", "step": step, "loss": loss}
        self._write(row | self._engine.scores(self._validation))
        return loss

    def _write(self, row: dict[str, Any]) -> None:
        self._log.seconds = time.monotonic() - self._started
        row |= {
            "tokens": self._tokens,
            "seconds": round(self._log.seconds, 3),
            "memory_bytes": self._engine.peak_memory(),
        }
        self._log.write(row)
        self._listen(row)


def validation_loss(
    loss: Callable[[Sequence[BatchRow]], float],
    rows: Sequence[BatchRow],
    batch_size: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """Mean loss per learned token over all rows, in nats; reports finished batches.

    Args:
        loss: The sum of the losses of a batch.
        rows: The rows.
        batch_size: The number of rows in a batch.
        on_progress: Called with the numbers of finished and of all batches.
    """
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    total = 0.0
    for done, batch in enumerate(batches):
        on_progress(done, len(batches))
        total += loss(batch)
    return total / sum(sum(example.learned[1:]) for row in rows for example in row)


def make_stream(resolved: Resolved) -> BatchStream:
    """The batches of a run, in order."""
    config = resolved.config
    return BatchStream(
        resolved.dataset.train,
        batch_size=config.run.batch_size,
        seed=config.run.seed,
    )
