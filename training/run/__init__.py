"""The directory of a run, and the files in it.

| file | content |
|---|---|
| ``config.toml`` | the config with every choice filled in and absolute paths |
| ``run.json`` | the inputs of the run: digests of base, data and config; versions; counts |
| ``metrics.jsonl`` | one JSON object per line, see below |
| ``tensorboard/`` | the metrics as TensorBoard events, with ``run.report_to = "tensorboard"`` |
| ``checkpoints/step-00000050.pt`` | weights, optimizer and random state after that many steps |
| ``checkpoints/step-00000050/`` | weights and optimizer, if ``InProcessEngine`` trains the run |
| ``checkpoints/step-00000050.json`` | the path of the checkpoint on a server that trains the run |
| ``samples.jsonl`` | answers before and after, once the run is finished (``samples.py``) |
| ``report.html`` | the report of the run, once it is finished or requested (``report.py``) |
| ``adapter/`` | the result, once the run is finished: PEFT's layout and ``provenance.json`` |

A line of ``metrics.jsonl`` is written after every optimizer step (``kind`` is ``step``), and after
every validation (``kind`` is ``validation``; step 0 is the adapter before training). Keys:

| key | value |
|---|---|
| ``kind`` | ``step`` or ``validation`` |
| ``step`` | the number of finished optimizer steps |
| ``loss`` | nats per learned token, or per example of a classification: on the step's batch, |
| | before the step, or on the validation set |
| ``accuracy``, ``macro_f1`` | at a validation of a classification |
| ``micro_f1``, ``label_f1`` | the same, if an example may have any number of labels |
| ``learning_rate`` | of the step (with LoRA+: of A) |
| ``grad_norm`` | of the step, before clipping |
| ``tokens`` | training tokens so far, without padding |
| ``seconds`` | since the start of training, of all attempts together |
| ``memory_bytes`` | peak so far: of the process (CPU) or of the device's allocator (CUDA) |
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turret.server.basics.files import PARTIAL_SUFFIX, replace_file, unwritable
from turret.server.basics.names import ADAPTER_NAME
from turret.training.settings.checks import SERVED_RANK
from turret.training.words import RunError, say

if TYPE_CHECKING:
    # Imported only for types, because the import would load torch.
    from turret.training.settings.resolve import Resolved


class RunFolder:
    """Paths of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.facts = path / "run.json"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"
        self.samples = path / "samples.jsonl"
        self.report = path / "report.html"

    @property
    def newest_checkpoint(self) -> Path | None:
        return next(reversed(checkpoints_in(self.checkpoints)), None)

    @property
    def is_finished(self) -> bool:
        return self.adapter.is_dir()

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Check that a run may begin, or continue, here.

        Args:
            resume: Whether to continue the run in the directory.
            overwrite: Whether to remove an existing run.

        Raises:
            RunError: The run may not start; the error names the flag that allows it, if there is
                one.
        """
        if self.path.exists() and not self.path.is_dir():
            problem = say("FOLDER_IS_A_FILE")
            raise RunError(say("OUTPUT_UNUSABLE", path=self.path, problem=problem))
        has_run = self.facts.exists()
        if overwrite and has_run:
            return
        if self.is_finished:
            if self.report.exists():
                raise RunError(say("RUN_FINISHED", path=self.path))
            command = self._report_command()
            raise RunError(say("RUN_WITHOUT_REPORT", path=self.path, command=command))
        if has_run and not resume:
            raise RunError(say("RUN_UNFINISHED", path=self.path))
        if resume and not has_run:
            raise RunError(say("NO_RUN_TO_RESUME", path=self.path))
        if not resume and self.path.exists() and any(self.path.iterdir()):
            raise RunError(say("OUTPUT_NOT_EMPTY", path=self.path))
        if problem := unwritable(self.path):
            raise RunError(say("OUTPUT_UNUSABLE", path=self.path, problem=problem))

    def check_place(self, *, is_served: bool) -> None:
        """Check that a run continues where it began: on a server, or in a process of its own.

        Raises:
            RunError: The run continues elsewhere; the error names the command that resumes it.
        """
        if not self.is_finished and ("server" in self.read_facts()) != is_served:
            facts = {"path": self.path, "command": self.resume_command()}
            raise RunError(say("RUN_ELSEWHERE", how="without" if is_served else "with", **facts))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Lock the directory within the block, because two runs in it would damage each other.

        The system releases the lock even if the process is killed.

        Raises:
            RunError: Another process holds the lock.
        """
        is_new = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            self._take(descriptor)
            yield
        finally:
            os.close(descriptor)
            if is_new and not any(self.path.iterdir()):
                # The run wrote nothing; do not leave an empty directory that blocks the next run.
                self.path.rmdir()

    def _take(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(say("RUN_IN_USE", path=self.path)) from None
        except OSError:
            # Some network file systems do not support locks. There, only this check is missing.
            pass

    def clear(self) -> None:
        """Remove the files of a run; other runs below the directory and users' files stay."""
        own = (self.config, self.metrics, self.samples, self.report)
        # Remove the facts last: with them, an interrupted removal can be repeated.
        for path in (*own, self.tensorboard, self.checkpoints, self.adapter, self.facts):
            for each in (path, path.with_name(f"{path.name}{PARTIAL_SUFFIX}")):
                if each.is_dir() and not each.is_symlink():
                    shutil.rmtree(each)
                else:
                    each.unlink(missing_ok=True)

    def _is_reported(self) -> bool:
        """Whether the report describes the finished run, not an earlier state of it."""
        if not self.report.exists():
            return False
        return self.report.stat().st_mtime_ns >= self.adapter.stat().st_mtime_ns

    def how_to_go_on(self) -> str:
        """What to do after a run that stops now; empty if there is nothing to do."""
        if self.is_finished and not self._is_reported():
            return f"the adapter is complete, but its report is missing; {self._how_to_report()}"
        if self.is_finished or not self.facts.exists():
            return ""
        newest = self.newest_checkpoint
        command = f"`{self.resume_command()}`"
        if newest is None:
            return f"{self._why_no_checkpoint()}, so {command} starts at step 0"
        return f"{command} continues from step {step_of(newest)}"

    def resume_command(self) -> str:
        """The command that continues the run where it was trained."""
        server = self.read_facts().get("server")
        where = "" if server is None else f" --server {shlex.quote(server)}"
        return f"turret train run {shlex.quote(str(self.config))} --resume{where}"

    def _how_to_report(self) -> str:
        samples = "" if self.samples.exists() else " without samples"
        return f"`{self._report_command()}` writes it{samples}"

    def _report_command(self) -> str:
        return f"turret train report {shlex.quote(str(self.path))}"

    def _why_no_checkpoint(self) -> str:
        run = self.read_facts().get("config", {}).get("run", {})
        every, steps = run.get("checkpoint_every", 0), run.get("steps", 0)
        if not every:
            return "no checkpoint is written (run.checkpoint_every is 0)"
        if every >= steps:
            return f"no checkpoint is written (run.checkpoint_every is {every}, run.steps {steps})"
        return f"the first checkpoint is written after step {every} (run.checkpoint_every)"

    def read_facts(self) -> dict[str, Any]:
        """``run.json``.

        Raises:
            RunError: The file is missing or broken.
        """
        try:
            return json.loads(self.facts.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            text = say("NO_RUN_FACTS", path=self.path, name=self.facts.name)
            raise RunError(text) from None
        except (OSError, ValueError) as error:
            raise RunError(say("NOT_A_RUN", path=self.path, why=error)) from error

    def write_facts(self, facts: dict[str, Any]) -> None:
        replace_file(self.facts, (json.dumps(facts, indent=2, sort_keys=True) + "\n").encode())


# The suffixes of checkpoints that are files or directories, and of references to those on a server.
LOCAL_SUFFIX, FOLDER_SUFFIX, SERVER_SUFFIX = ".pt", "", ".json"


def checkpoint_path(folder: Path, step: int, suffix: str = LOCAL_SUFFIX) -> Path:
    """The path of the checkpoint after a step."""
    return folder / f"step-{step:08d}{suffix}"


def checkpoints_in(folder: Path) -> list[Path]:
    """All checkpoints of a run, oldest first."""
    found = folder.glob("step-*")
    return sorted(
        path for path in found if path.suffix in (LOCAL_SUFFIX, FOLDER_SUFFIX, SERVER_SUFFIX)
    )


def step_of(checkpoint: Path) -> int:
    """The number of steps that were finished when the checkpoint was written."""
    return int(checkpoint.stem.removeprefix("step-"))


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``, without the incomplete one that a killed process leaves."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


class MetricsLog:
    """Appends to ``metrics.jsonl``; each line is in the file when ``write`` returns."""

    def __init__(
        self, path: Path, *, keep_up_to_step: int, tensorboard: Path | None = None
    ) -> None:
        """Open the file.

        Args:
            path: The file; created if missing.
            keep_up_to_step: Lines of later steps, written after the checkpoint, are removed.
            tensorboard: Directory for TensorBoard events of the same numbers, or None.
        """
        kept = []
        if path.exists():
            kept = [row for row in read_metrics(path) if row["step"] <= keep_up_to_step]
        replace_file(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self.seconds: float = kept[-1]["seconds"] if kept else 0.0
        self.tokens: int = kept[-1]["tokens"] if kept else 0
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._events = None
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(tensorboard), purge_step=keep_up_to_step + 1)

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        if self._events is None:
            return
        group = {"step": "train", "validation": "eval"}[row["kind"]]
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                self._events.add_scalar(f"{group}/{name}", value, row["step"])
        self._events.flush()

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


def what_next(resolved: Resolved, folder: RunFolder) -> str:
    """The path of the adapter, and the commands that serve, prompt and update it.

    Args:
        resolved: The finished run.
        folder: The run's directory.
    """
    base = resolved.config.base.model
    model = "" if base is None else f" --model {shlex.quote(base)}"
    root = shlex.quote(str(folder.path))
    name = shlex.quote(adapter_name(folder.path))
    verb = "classify" if resolved.dataset.labels else "generate"
    # Suggest --chat only if the adapter was trained on chats.
    chat = " --chat" if any(each.turns for row in resolved.dataset.train for each in row) else ""
    return (
        f"adapter written: {folder.adapter}\n"
        f"serve it:  turret serve{model} --adapter-root {root} --preload {name}=adapter"
        f"{max_rank_flag(resolved)}\n"
        f"ask it:    turret {verb}{chat} -a {name} 'YOUR PROMPT'\n"
        f"update it: turret adapters replace {name} adapter  (if the server is already running)"
    )


def adapter_name(run: Path) -> str:
    """The default name of a run's adapter: the name of the run's directory if it is valid."""
    return run.name if ADAPTER_NAME.fullmatch(run.name) else "mine"


def max_rank_flag(resolved: Resolved) -> str:
    """`` --max-rank N`` if a server would reject the adapter without it, else an empty text."""
    rank = resolved.method.served_rank(resolved.config.method, resolved.base)
    return f" --max-rank {rank}" if rank > SERVED_RANK else ""
