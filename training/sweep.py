"""``turret train sweep``: trains at several ranks, and reports the loss and cost of each."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from turret.clients.messages.results import Model
from turret.server.models.decoding.arch import Projections
from turret.training.base_model import find_base
from turret.training.engine import Engine, LocalEngine
from turret.training.errors import RunError
from turret.training.methods import method_named
from turret.training.report import write_report
from turret.training.run.folder import RunFolder, rank_folder, what_next
from turret.training.serving_cost import serving_cost
from turret.training.settings.checks import base_place, check_fit, check_method, with_ranks
from turret.training.settings.config import TrainConfig
from turret.training.settings.resolve import Resolved, resolve
from turret.training.trainer import FinishedRun, Listener, Trainer
from turret.training.words import say

OpenEngine: TypeAlias = Callable[[Resolved], Engine]


class Announce(Protocol):
    """Shows the progress of one run of the sweep."""

    def __call__(self, num_steps: int | None, title: str) -> AbstractContextManager[Listener]: ...


@dataclass(frozen=True, slots=True)
class RankResult:
    """The result of one rank.

    Attributes:
        rank: ``method.rank``.
        validation_loss: The final loss, in nats per learned token.
        num_parameters: The number of trained weights.
        file_bytes: The size of the adapter's tensors.
        relative_multiply_adds: The multiply-adds that the adapter adds per token, over the base's.
        seconds: The duration of the training.
        what_next: The path of the adapter, and the commands that serve and prompt it.
    """

    rank: int
    validation_loss: float
    num_parameters: int
    file_bytes: int
    relative_multiply_adds: float
    seconds: float
    what_next: str

    def figures(self) -> dict[str, float]:
        """The fields without ``what_next``, for ``sweep.json``."""
        return {key: v for key, v in dataclasses.asdict(self).items() if key != "what_next"}


def sweep(
    config: TrainConfig,
    folder: Path,
    ranks: Sequence[int],
    announce: Announce,
    open_engine: OpenEngine = LocalEngine,
    served: Model | None = None,
) -> Iterator[RankResult]:
    """Train every rank into ``OUTPUT/rank-N`` and write ``OUTPUT/sweep.json`` at the end.

    Ranks that are already finished are not trained again, so a sweep that was stopped continues.
    All ranks are checked at once. A server trains all of them together; without one, each is
    trained when its result is requested.

    Args:
        config: The config of the runs; its rank is replaced. It must have validation examples.
        folder: The directory to which the config's paths are relative.
        ranks: At least one rank.
        announce: Shows the progress of each run, or of all runs on a server.
        open_engine: Creates the engine that trains the adapter of a run.
        served: The model of the server that trains, if one does.

    Raises:
        ConfigError: The method has no rank, or cannot have one of these.
        TrainingError: See ``Trainer.run``.
    """
    _check_ranks(config, folder, ranks)
    runs = [_Run.of(config, rank) for rank in ranks]
    if served is None:
        found = (_alone(run, folder, announce, open_engine) for run in runs)
    else:
        found = _together(runs, folder, announce, open_engine, served)
    return _results(found, folder / config.run.output)


def _results(found: Iterator[RankResult], output: Path) -> Iterator[RankResult]:
    results = []
    for result in found:
        results.append(result)
        yield result
    text = json.dumps([result.figures() for result in results], indent=2) + "\n"
    (output / "sweep.json").write_text(text, encoding="utf-8")


def _check_ranks(config: TrainConfig, folder: Path, ranks: Sequence[int]) -> None:
    """Check all ranks, before any of them is trained."""
    configs = with_ranks(config, ranks)

    def check(projections: Projections) -> None:
        for each in configs:
            check_method(each.method, projections)

    for each in configs:
        check_fit(each)
    base = find_base(base_place(config.base, folder), check)
    for each in configs:
        method_named(each.method.name).resolve(each.method, base)


def _train(trainer: Trainer, folder: RunFolder) -> FinishedRun:
    with folder.held():
        if finished := trainer.finished():
            return finished
        result = trainer.run(resume=trainer.is_started)
        write_report(result.folder)
        return result


@dataclass(frozen=True, slots=True)
class _Run:
    """The run of one rank."""

    rank: int
    config: TrainConfig

    @classmethod
    def of(cls, config: TrainConfig, rank: int) -> _Run:
        (config,) = with_ranks(config, [rank])
        output = str(rank_folder(Path(config.run.output), rank))
        return cls(rank, replace(config, run=replace(config.run, output=output)))

    def train(self, resolved: Resolved, listen: Listener, open_engine: OpenEngine) -> FinishedRun:
        """Train the rank, unless it is already finished."""
        folder = RunFolder(Path(resolved.config.run.output))
        if folder.is_finished:
            listen({"kind": "note", "text": f"rank {self.rank} is already trained"})
        result = _train(Trainer(resolved, listen, open_engine), folder)
        if result.validation_loss is None:
            raise RunError(say("NO_VALIDATION_LOSS", path=folder.path))
        return result

    def described(self, resolved: Resolved, result: FinishedRun) -> RankResult:
        """The result with the cost of serving it."""
        assert result.validation_loss is not None
        cost = serving_cost(resolved)
        return RankResult(
            rank=self.rank,
            validation_loss=result.validation_loss,
            num_parameters=result.folder.read_facts()["num_parameters"],
            file_bytes=cost.file_bytes,
            relative_multiply_adds=cost.relative_multiply_adds,
            seconds=result.seconds,
            what_next=what_next(resolved, result.folder),
        )


def _alone(run: _Run, folder: Path, announce: Announce, open_engine: OpenEngine) -> RankResult:
    with announce(None, f"rank {run.rank}") as listen:
        resolved = resolve(run.config, folder)
        result = run.train(resolved, listen, open_engine)
    return run.described(resolved, result)


def _together(
    runs: Sequence[_Run],
    folder: Path,
    announce: Announce,
    open_engine: OpenEngine,
    served: Model,
) -> Iterator[RankResult]:
    """Train all ranks at the same time on a server; if one fails, the others stop."""
    engines: list[Any] = []
    opening, is_over = threading.Lock(), threading.Event()

    def opened(resolved: Resolved) -> Any:
        # transformers changes torch's global state when it makes a model without weights.
        with opening:
            engine: Any = open_engine(resolved)
        engines.append(engine)
        if is_over.is_set():
            engine.cancel()
        return engine

    with announce(None, "sweep") as listen:
        shared = _Shared(listen, len(runs))
        resolved = [resolve(run.config, folder, served) for run in runs]
        with ThreadPoolExecutor(len(runs)) as pool:
            waiting = [
                pool.submit(run.train, each, shared.listener(run.rank), opened)
                for run, each in zip(runs, resolved, strict=True)
            ]
            try:
                for each in as_completed(waiting):
                    each.result()
            except BaseException:
                is_over.set()
                for engine in engines:
                    engine.cancel()
                raise
    for run, each, done in zip(runs, resolved, waiting, strict=True):
        yield run.described(each, done.result())


class _Shared:
    """Combines the events of several runs into those of one run, with the sum of their steps."""

    def __init__(self, listen: Listener, num_runs: int) -> None:
        self._listen = listen
        self._num_runs = num_runs
        self._lock = threading.Lock()
        self._steps: Counter[int] = Counter()

    def listener(self, rank: int) -> Listener:
        def listen(row: dict[str, Any]) -> None:
            with self._lock:
                if row["kind"] == "begin":
                    row = row | {"steps": row["steps"] * self._num_runs}
                elif row["kind"] == "phase":
                    row = row | {"text": f"rank {rank}: {row['text']}"}
                elif row["kind"] != "note":
                    self._steps[rank] = row["step"]
                    row = row | {"step": self._steps.total()}
                self._listen(row)

        return listen
