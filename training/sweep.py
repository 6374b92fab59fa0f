"""``turret train sweep``: trains with several settings, and reports the loss and cost of each."""

from __future__ import annotations

import dataclasses
import functools
import json
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from turret.clients.results import Model
from turret.server.api.tenants import MAX_MODELS
from turret.training.base_model import check_base
from turret.training.engine import Engine
from turret.training.in_process_engine import is_shared
from turret.training.report import write_report
from turret.training.run import RunFolder, what_next
from turret.training.serving_cost import serving_cost
from turret.training.settings.checks import base_place, check_method
from turret.training.settings.resolve import Resolved, resolve
from turret.training.settings.variants import Variant
from turret.training.trainer import FinishedRun, Observer, Trainer
from turret.training.words import RunError, say

# ``stops_early`` compares the variants after a ninth and after a third of their steps.
_EARLY_DIVISORS = (9, 3)
# Each time, it keeps the best third of them.
_KEPT_DIVISOR = 3
OpenEngine: TypeAlias = Callable[[Resolved], Engine]


# Shows the progress of one run of the sweep; called with the run's title.
Announce: TypeAlias = Callable[[str], AbstractContextManager[Observer]]


@dataclass(frozen=True, slots=True)
class VariantResult:
    """The result of one variant.

    Attributes:
        settings: See ``Variant``.
        output: The directory of the run.
        steps: The number of trained steps. A variant with fewer than its config was stopped early.
        validation_loss: The loss after these steps, in nats per learned token.
        num_parameters: The number of trained weights.
        file_bytes: The size of the adapter's tensors.
        relative_multiply_adds: The multiply-adds that the adapter adds per token, as a share of the
            base's.
        seconds: The duration of the training.
        what_next: The path of the adapter, and the commands that serve and prompt it.
    """

    settings: Mapping[str, Any]
    output: str
    steps: int
    validation_loss: float
    num_parameters: int
    file_bytes: int
    relative_multiply_adds: float
    seconds: float
    what_next: str

    def figures(self) -> dict[str, Any]:
        """The settings and the fields without ``what_next``, for ``sweep.json``."""
        fields = dataclasses.asdict(self)
        del fields["what_next"]
        return {**fields.pop("settings"), **fields}


def sweep(
    variants: Sequence[Variant],
    folder: Path,
    announce: Announce,
    open_engine: OpenEngine,
    served: Model | None = None,
    *,
    stops_early: bool = False,
) -> list[VariantResult]:
    """Train every variant, and write ``sweep.json`` into the sweep's directory at the end.

    Variants that are already finished are not trained again, so a sweep that was stopped continues.
    All variants are checked before the first is trained. Those that the engine of a server trains
    share a base and are trained together; the others follow, one at a time.

    Args:
        variants: At least one. Their configs must have validation examples.
        folder: The directory to which the configs' paths are relative.
        announce: Shows the progress of a run, or of those that are trained together.
        open_engine: Creates the engine that trains the adapter of a run.
        served: The model of the server that trains, if one does.
        stops_early: Whether to stop all but the third of the variants with the lowest validation
            loss, after a ninth of their steps and again after a third of them.

    Raises:
        ConfigError: A variant cannot be trained.
        TrainingError: See ``Trainer.run``.
    """
    with announce("sweep"):
        for config in (variant.config for variant in variants):
            place = base_place(config.base, folder)
            check_base(place, functools.partial(check_method, config.method))
        runs = [_Run(v, resolve(v.config, folder, served), served is not None) for v in variants]
        for run in runs:
            trainer = Trainer(run.resolved)
            if trainer.is_started:
                trainer.check_same()
    results: dict[str, FinishedRun] = {}
    left = list(runs)
    # Successive halving, the synchronous form of ASHA (arXiv 1810.05934).
    for divisor in (*(_EARLY_DIVISORS if stops_early else ()), 1):
        found = _train_all(left, divisor, announce, open_engine)
        results |= {run.name: result for run, result in zip(left, found, strict=True)}
        left.sort(key=lambda run: results[run.name].validation_loss or 0.0)
        left = left[: -(-len(left) // _KEPT_DIVISOR)]
    done = [_described(run, results[run.name]) for run in runs]
    text = json.dumps([result.figures() for result in done], indent=2) + "\n"
    output = (folder / variants[0].config.run.output).parent
    (output / "sweep.json").write_text(text, encoding="utf-8")
    return done


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """The run of a variant."""

    variant: Variant
    resolved: Resolved
    is_served: bool

    @property
    def name(self) -> str:
        return self.resolved.config.run.output

    @property
    def is_together(self) -> bool:
        return self.is_served or is_shared(self.resolved)

    def train(self, divisor: int, listen: Observer, open_engine: OpenEngine) -> FinishedRun:
        """Train for the number of steps divided by ``divisor``, unless they are already done."""
        folder, num_steps = RunFolder(Path(self.name)), self.resolved.config.run.steps
        assert num_steps is not None
        if folder.is_finished:
            listen({"kind": "note", "text": f"{self.variant.title} is already trained"})
        trainer = Trainer(self.resolved, listen, open_engine)
        with folder.held():
            until = max(1, num_steps // divisor)
            result = trainer.finished(until)
            if result is None:
                result = trainer.run(resume=trainer.is_started, until=until)
                write_report(folder)
        if result.validation_loss is None:
            raise RunError(say("NO_VALIDATION_LOSS", path=folder.path))
        return result


def _described(run: _Run, result: FinishedRun) -> VariantResult:
    """The result with the cost of serving it."""
    assert result.validation_loss is not None
    cost = serving_cost(run.resolved)
    return VariantResult(
        settings=run.variant.settings,
        output=run.name,
        steps=result.steps,
        validation_loss=result.validation_loss,
        num_parameters=result.folder.read_facts()["num_parameters"],
        file_bytes=cost.file_bytes,
        relative_multiply_adds=cost.relative_multiply_adds,
        seconds=result.seconds,
        what_next=what_next(run.resolved, result.folder),
    )


def _train_all(
    runs: Sequence[_Run], divisor: int, announce: Announce, open_engine: OpenEngine
) -> list[FinishedRun]:
    found: dict[str, FinishedRun] = {}
    shared = [run for run in runs if run.is_together]
    if shared:
        with announce("sweep") as listen:
            results = _together(shared, divisor, listen, open_engine)
        found |= {run.name: result for run, result in zip(shared, results, strict=True)}
    for run in runs:
        if not run.is_together:
            with announce(run.variant.title) as listen:
                found[run.name] = run.train(divisor, listen, open_engine)
    return [found[run.name] for run in runs]


def _together(
    runs: Sequence[_Run], divisor: int, listen: Observer, open_engine: OpenEngine
) -> list[FinishedRun]:
    """Train variants at the same time on one base; if one fails, the others stop."""
    engines: list[Any] = []
    opening, is_over = threading.Lock(), threading.Event()

    def opened(resolved: Resolved) -> Any:
        # Open one engine at a time: transformers changes torch's global state when it makes a model
        # without weights.
        with opening:
            engine: Any = open_engine(resolved)
        engines.append(engine)
        if is_over.is_set():
            engine.cancel()
        return engine

    listener = _shared_listeners(listen, len(runs))
    with ThreadPoolExecutor(min(len(runs), MAX_MODELS)) as pool:
        waiting = [
            pool.submit(run.train, divisor, listener(run.variant.title), opened) for run in runs
        ]
        try:
            for each in as_completed(waiting):
                each.result()
        except BaseException:
            is_over.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for engine in engines:
                engine.cancel()
            raise
    return [each.result() for each in waiting]


def _shared_listeners(listen: Observer, num_runs: int) -> Callable[[str], Observer]:
    """A function that makes a run's listener by its title; together they report a single run."""
    lock = threading.Lock()
    steps: Counter[str] = Counter()

    def listener(title: str) -> Observer:
        def heard(row: dict[str, Any]) -> None:
            with lock:
                if row["kind"] == "begin":
                    row = row | {"steps": row["steps"] * num_runs}
                elif row["kind"] == "phase":
                    row = row | {"text": f"{title}: {row['text']}"}
                elif row["kind"] != "note":
                    steps[title] = row["step"]
                    row = row | {"step": steps.total()}
                listen(row)

        return heard

    return listener
