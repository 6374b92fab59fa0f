"""The shapes, the device, the clock and the report that all parts of the GPU benchmark share."""

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
from cuda.kernel_launches import MODELS, Model

ROOT = Path(__file__).resolve().parents[2]
# Larger than any L2 cache, so that the timed code reads its weights from memory, as a decode step
# does.
_FLUSH_BYTES = 256 << 20
_REPEATS = 30
# Maximum ratio of the error's RMS to that of the exact result. It allows for one rounding, and for
# sums in another order.
MAX_ERROR = {torch.bfloat16: 4e-3, torch.float16: 6e-4}
# Memory bandwidth in 10⁹ bytes per second, from NVIDIA's data sheets. The keys are words of
# torch.cuda.get_device_name; the first entry whose words are all in the name applies.
BANDWIDTHS = {
    ("B200",): 8000,
    ("GH200",): 4000,
    ("H200",): 4800,
    ("H100", "PCIe"): 2000,
    ("H100", "NVL"): 3900,
    ("H100",): 3350,
    ("A100", "40GB"): 1555,
    ("A100",): 2039,
    ("A10",): 600,
    ("L40",): 864,
    ("L4",): 300,
    ("PRO", "6000"): 1792,
    ("5090",): 1792,
    ("4090",): 1008,
    ("3090",): 936,
}


def bandwidth_of(name: str) -> int | None:
    """The bandwidth of the card with a device's name, or None if it is unknown."""
    found = (rate for words, rate in BANDWIDTHS.items() if all(word in name for word in words))
    return next(found, None)


def milliseconds(run: Callable[[], object], *, cold: bool = True) -> float:
    """The median time of a function on the GPU; on the CPU (a dry run), that of one call.

    Args:
        run: The function, which launches kernels and does not synchronise.
        cold: Whether to empty the L2 cache before each call.
    """
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    flush = torch.empty(_FLUSH_BYTES if cold else 0, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    pairs = []
    for _ in range(_REPEATS):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) for begin, end in pairs)[_REPEATS // 2]


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """The function as a CUDA graph, or unchanged on the CPU."""
    if not torch.cuda.is_available():
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


def _where(name: str) -> dict[str, str]:
    return {
        "commit": _command("git", "rev-parse", "--short", "HEAD"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpu": name,
        "driver": _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


@dataclass(slots=True)
class Report:
    """Prints rows, and immediately appends each one to the file of this device.

    Attributes:
        name: The name of the device.
        gb_s: The bandwidth of the device, or None if it is unknown.
        folder: The folder of the file.
        num_rows: The number of rows so far.
    """

    name: str
    gb_s: int | None
    folder: Path
    num_rows: int = 0
    _where: dict[str, str] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The file of this device."""
        return self.folder / f"{re.sub(r'[^a-z0-9]+', '-', self.name.lower()).strip('-')}.jsonl"

    def add(self, scenario: str, shape: str, ms: float, num_bytes: float, **found: Any) -> None:
        """Store and print one measurement.

        Args:
            scenario: The measured scenario.
            shape: The size of the scenario.
            ms: The measured time.
            num_bytes: The bytes that must be read and written, from which the floor is computed.
            found: Ratios, rates and errors.
        """
        if self.gb_s is not None:
            floor = num_bytes / self.gb_s / 1e6
            found = {"floor_ms": floor, "over_floor": ms / floor, **found}
        self._store({"scenario": scenario, "shape": shape, "ms": ms, **found})
        text = "  ".join(f"{k} {_shown(v)}" for k, v in found.items())
        print(f"{scenario:<34}{shape:<26}{ms:>9.4f} ms  {text}", flush=True)

    def skip(self, scenario: str, shape: str) -> None:
        """Note that a scenario does not fit into the memory of this device."""
        self._store({"scenario": scenario, "shape": shape, "skipped": True})
        print(f"{scenario:<34}{shape:<26}skipped, it does not fit", flush=True)

    def _store(self, row: dict[str, Any]) -> None:
        self._where = self._where or _where(self.name)
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self._where | row, sort_keys=True) + "\n")
        self.num_rows += 1


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, slots=True)
class Setting:
    """Shapes, device and report of a run.

    Attributes:
        model: The shapes of the model.
        num_layers: The number of layers of the decode step.
        rows: The number of sequences of the decode step.
        context: The number of tokens before the step.
        dtype: The dtype of activations and adapters.
        adapters: The numbers of distinct adapters in the scenarios.
        rank: The rank of uniform scenarios.
        mixed_ranks: The ranks of the mixed scenario, in turn.
        row_counts: The numbers of rows for which the product with the base's weights is measured.
        device: The device.
        report: Collects rows.
        contexts: The contexts for which attention is measured.
        prompt: The length of the prompt, which takes two steps.
    """

    model: Model
    num_layers: int
    rows: int
    context: int
    dtype: torch.dtype
    adapters: tuple[int, ...]
    rank: int
    mixed_ranks: tuple[int, ...]
    row_counts: tuple[int, ...]
    device: torch.device
    report: Report
    contexts: tuple[int, ...]
    prompt: int

    @classmethod
    def full(cls, folder: Path) -> Setting:
        """Llama-3.1-8B on the GPU."""
        device = torch.device("cuda", torch.cuda.current_device())
        name = torch.cuda.get_device_name(device)
        return cls(
            model=MODELS["Llama-3.1-8B"],
            num_layers=32,
            rows=64,
            context=512,
            dtype=torch.bfloat16,
            adapters=(1, 8, 32, 64),
            rank=16,
            mixed_ranks=(8, 16, 32, 64, 128),
            row_counts=(1, 4, 16, 32, 64),
            device=device,
            report=Report(name, bandwidth_of(name), folder),
            contexts=(512, 4096, 32768),
            prompt=4096,
        )

    @classmethod
    def tiny(cls, folder: Path) -> Setting:
        """A toy model in the interpreter, which has no bf16 products."""
        return cls(
            model=Model(hidden=64, heads=4, kv_heads=2, head_dim=16, inner=128, vocab=100),
            num_layers=1,
            rows=4,
            context=20,
            dtype=torch.float16,
            adapters=(1, 4),
            rank=8,
            mixed_ranks=(8, 16),
            row_counts=(1, 4),
            device=torch.device("cpu"),
            # Any known card, so that the floors are printed too.
            report=Report("interpreter", bandwidth_of("H100"), folder),
            contexts=(20, 300),
            prompt=24,
        )

    def random(self, *shape: int) -> torch.Tensor:
        """Normally distributed values in the setting's dtype, on its device."""
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def check(self, actual: torch.Tensor, exact: torch.Tensor) -> float:
        """The error ratio of a result.

        Raises:
            AssertionError: The ratio exceeds the bound, or a value is not finite.
        """
        difference = actual.double() - exact.double()
        ratio = float(difference.norm() / exact.double().norm())
        assert ratio < MAX_ERROR[self.dtype], f"error ratio {ratio:.3g}"
        return ratio
