"""``turret train sweep``: trains at several ranks, and reports the loss and cost of each."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from turret.server.models.decoding.arch import Projections
from turret.training.base_model import find_base
from turret.training.errors import RunError
from turret.training.methods import method_named
from turret.training.report import write_report
from turret.training.run.folder import RunFolder, rank_folder, what_next
from turret.training.serving_cost import serving_cost
from turret.training.settings.checks import base_place, check_fit, check_method, with_ranks
from turret.training.settings.config import TrainConfig
from turret.training.settings.resolve import resolve
from turret.training.trainer import FinishedRun, Listener, Trainer
from turret.training.words import say


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
    config: TrainConfig, folder: Path, ranks: Sequence[int], announce: Announce
) -> Iterator[RankResult]:
    """Train every rank into ``OUTPUT/rank-N`` and write ``OUTPUT/sweep.json`` at the end.

    Ranks that are already finished are not trained again, so a sweep that was stopped continues.
    All ranks are checked at once; each is trained when its result is requested.

    Args:
        config: The config of the runs; its rank is replaced. It must have validation examples.
        folder: The directory to which the config's paths are relative.
        ranks: At least one rank.
        announce: Shows the progress of each run.

    Raises:
        ConfigError: The method has no rank, or cannot have one of these.
        TrainingError: See ``Trainer.run``.
    """
    _check_ranks(config, folder, ranks)
    return _results(config, folder, ranks, announce)


def _results(
    config: TrainConfig, folder: Path, ranks: Sequence[int], announce: Announce
) -> Iterator[RankResult]:
    results = []
    for rank in ranks:
        result = _run_rank(config, folder, rank, announce)
        results.append(result)
        yield result
    text = json.dumps([result.figures() for result in results], indent=2) + "\n"
    (folder / config.run.output / "sweep.json").write_text(text, encoding="utf-8")


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


def _run_rank(config: TrainConfig, folder: Path, rank: int, announce: Announce) -> RankResult:
    output = str(rank_folder(Path(config.run.output), rank))
    (config,) = with_ranks(config, [rank])
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, output=output))
    with announce(None, f"rank {rank}") as listen:
        if RunFolder(folder / output).is_finished:
            listen({"kind": "note", "text": f"rank {rank} is already trained"})
        resolved = resolve(config, folder)
        result = _train(Trainer(resolved, listen), RunFolder(Path(resolved.config.run.output)))
    if result.validation_loss is None:
        raise RunError(say("NO_VALIDATION_LOSS", path=result.folder.path))
    cost = serving_cost(resolved)
    return RankResult(
        rank=rank,
        validation_loss=result.validation_loss,
        num_parameters=result.folder.read_facts()["num_parameters"],
        file_bytes=cost.file_bytes,
        relative_multiply_adds=cost.relative_multiply_adds,
        seconds=result.seconds,
        what_next=what_next(resolved, result.folder),
    )
