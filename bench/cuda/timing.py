"""Measures functions on the device, and stores the results. Needs only torch."""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from cuda.estimate import Card, Expected, facts

ROOT = Path(__file__).resolve().parents[2]
# Larger than any L2 cache, so that the timed code reads its weights from memory, as a decode step
# does.
_FLUSH_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Timing:
    """Percentiles of one function's time, in milliseconds."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        ordered = sorted(samples)
        last = len(ordered) - 1
        return cls(*(ordered[round(last * share)] for share in (0.2, 0.5, 0.8)))


class Stopwatch:
    """Measures functions on one device; on the CPU (a dry run) once, by the clock."""

    def __init__(self, device: torch.device, repeats: int = 30) -> None:
        self.device = device
        self._repeats = repeats
        self._flush: torch.Tensor | None = None
        if device.type == "cuda":
            self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def time(self, run: Callable[[], object], *, cold: bool = True) -> Timing:
        """Measure a function.

        Args:
            run: The function, which launches kernels and does not synchronise.
            cold: Empty the L2 cache before each call.
        """
        if self._flush is None:
            start = time.perf_counter()
            run()
            return Timing.of([(time.perf_counter() - start) * 1e3])
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        pairs = []
        for _ in range(self._repeats):
            if cold:
                self._flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        return Timing.of([begin.elapsed_time(end) for begin, end in pairs])

    def capture(self, run: Callable[[], object]) -> Callable[[], object]:
        """The function as a CUDA graph, or unchanged on the CPU."""
        if self.device.type != "cuda":
            return run
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay


def _command(*args: str) -> str:
    try:
        done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


@dataclass(slots=True)
class Report:
    """Prints rows, and appends each of them at once to the file of this device.

    Attributes:
        device: The measured device.
        card: The specification of the device, or None if it is unknown.
        folder: The folder of the file; None keeps the rows only in memory.
        rows: The measurements.
    """

    device: torch.device
    card: Card | None = None
    folder: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    _where: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        cuda = self.device.type == "cuda"
        return torch.cuda.get_device_name(self.device) if cuda else "interpreter"

    def add(
        self, scenario: str, shape: str, timing: Timing, expected: Expected, **found: Any
    ) -> None:
        """Store and print one measurement.

        Args:
            scenario: The measured scenario.
            shape: The size of the scenario.
            timing: The measured time.
            expected: Returns the expected work, from which the expected time is printed for a known
                card.
            found: Ratios, rates and errors.
        """
        shown = found | facts(expected, self.card, timing.p50)
        row = {"scenario": scenario, "shape": shape}
        row |= {"p20_ms": timing.p20, "p50_ms": timing.p50, "p80_ms": timing.p80, **shown}
        self.rows.append(row)
        if self.folder is not None:
            self._write(self.folder, row)
        text = "  ".join(f"{k} {_shown(v)}" for k, v in shown.items())
        print(f"{scenario:<34}{shape:<26}{timing.p50:>9.4f} ms  {text}", flush=True)

    def path(self, folder: Path) -> Path:
        """The file of this device."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        return folder / f"{slug}.jsonl"

    def _write(self, folder: Path, row: dict[str, Any]) -> None:
        if not self._where:
            query = ("--query-gpu=driver_version", "--format=csv,noheader")
            self._where = {
                "commit": _command("git", "rev-parse", "--short", "HEAD"),
                "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "gpu": self.name,
                "driver": _command("nvidia-smi", *query),
                "torch": torch.__version__,
                "triton": triton.__version__,
            }
        folder.mkdir(parents=True, exist_ok=True)
        with self.path(folder).open("a", encoding="utf-8") as file:
            file.write(json.dumps(self._where | row, sort_keys=True) + "\n")


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
