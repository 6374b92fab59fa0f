"""The verdict about a GPU: what was promised, what was measured, and which checks passed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cuda.setting import bandwidth_of

# A measurement above this multiple of the promise fails.
MOST = 1.5
# Exit statuses of ``bench/gpu.sh`` and of ``timeout``.
_NOT_HERE, _STOPPED = 77, 124


@dataclass(frozen=True, slots=True)
class Promise:
    """A figure that the design aims at, for Llama-3.1-8B on an H100.

    Attributes:
        name: The name in the table.
        scenario: The scenario of the row that measures it.
        shape: The beginning of the row's shape.
        key: The figure in the row.
        limit: The promised figure.
        scales: Whether other cards may take longer, by their memory bandwidth.
    """

    name: str
    scenario: str
    shape: str
    key: str
    limit: float
    scales: bool = True


PROMISES = (
    Promise("decode, 1 row, base (ms)", "step base", "1 rows", "ms", 2.6),
    Promise("decode, 16 rows, 16 adapters (ms)", "step lora 16 distinct", "16 rows", "ms", 3.0),
    Promise("decode, 64 rows, 64 adapters (ms)", "step lora 64 distinct", "64 rows", "ms", 6.5),
    Promise("decode, 256 rows, base (ms)", "step base", "256 rows", "ms", 16.0),
    Promise("host beside 64 rows (ms)", "step base", "64 rows", "host_ms", 0.3, scales=False),
    Promise("prompt of 4,096 tokens (ms)", "prefill", "4096 tokens", "ms", 102.0),
    Promise("memory read, times the floor", "memory read", "", "over_floor", 1.18, scales=False),
)


def verdict(folder: Path, *, is_dry: bool) -> int:
    """Print the table, and write it to ``verdict.txt``.

    Args:
        folder: The results of ``bench/gpu.sh``: rows of measurements in ``*.jsonl``, and each
            command's exit status and time in ``*.exit``.
        is_dry: Whether the rows come from the interpreter, whose times say nothing.

    Returns:
        The exit status: 1 if a command failed, or a figure is missing or too high.
    """
    rows = [
        json.loads(line)
        for file in folder.glob("*.jsonl")
        for line in file.read_text().splitlines()
    ]
    gpu = rows[-1]["gpu"] if rows else "no GPU"
    lines = [gpu, f"{'':<40}{'promised':>8} {'measured':>8} {'ratio':>8}"]
    is_good = True
    for name, columns, passes in (*_measured(folder, rows, gpu, is_dry), *_commands(folder)):
        is_good &= passes
        lines.append(f"{name:<40}{columns:<34}{'ok' if passes else 'FAILED'}")
    text = "\n".join(lines)
    print(text)
    (folder / "verdict.txt").write_text(text + "\n", encoding="utf-8")
    return 0 if is_good else 1


def _measured(
    folder: Path, rows: list[dict[str, Any]], gpu: str, is_dry: bool
) -> Iterator[tuple[str, str, bool]]:
    slower = (bandwidth_of("H100") or 1) / (bandwidth_of(gpu) or bandwidth_of("H100") or 1)
    for promise in PROMISES:
        limit = promise.limit * (slower if promise.scales else 1.0)
        found = [
            row
            for row in rows
            if row["scenario"] == promise.scenario and row["shape"].startswith(promise.shape)
        ]
        if is_dry:
            # Toy shapes have other numbers of rows, and the interpreter's times say nothing.
            yield promise.name, f"{limit:>8.2f} not in a dry run", True
        elif not found:
            # The second call measures what is promised, and may come later.
            is_later = not (folder / "decode.exit").exists()
            yield promise.name, f"{limit:>8.2f} not measured", is_later
        elif "skipped" in found[-1]:
            yield promise.name, f"{limit:>8.2f} does not fit", True
        else:
            measured = found[-1][promise.key]
            ratio = measured / limit
            yield promise.name, f"{limit:>8.2f} {measured:>8.2f} {ratio:>8.2f}", ratio <= MOST


def _commands(folder: Path) -> Iterator[tuple[str, str, bool]]:
    for file in sorted(folder.glob("*.exit")):
        code, seconds = map(int, file.read_text(encoding="utf-8").split())
        shown = {
            0: f"{seconds} s",
            _NOT_HERE: "not installed here",
            _STOPPED: f"stopped after {seconds} s",
        }
        text = shown.get(code, f"exit status {code}; see {file.stem}.txt")
        yield file.stem, text, code in (0, _NOT_HERE)
