"""A server and a trainer on one machine, each against itself alone.

    python bench/beside_training.py [--repeats 3] [--seconds 30] [--config FILE]

`turret train` runs all the time, and is stopped (SIGSTOP) while the server is measured alone; the
server is asked nothing while the trainer is measured alone. Windows take turns. The client runs on
the same processors.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common.machine import ROOT, describe, require_idle
from common.random_lora import write_random_loras
from common.report import append_rows, make_console, print_rows
from common.served import Served
from transformers import AutoConfig

from turret.server.models.families import read_arch
from turret.server.models.model_source import resolve_model
from turret.server.models.sources.cache import default_cache_dir

_BATCH = 16
_RANK = 16
_STEPS = 1_000_000
_START_SECONDS = 300.0


class Trainer:
    """`turret train run` that does not end by itself.

    Args:
        folder: For its output.
        config: As `turret train run` takes it.
    """

    def __init__(self, folder: Path, config: Path) -> None:
        turret = shutil.which("turret", path=str(Path(sys.executable).parent)) or "turret"
        command = [turret, "train", "run", str(config), "--output", str(folder / "run")]
        command += ["--steps", str(_STEPS), "--set", f"run.validate_every={_STEPS}"]
        self._log = folder / "run" / "metrics.jsonl"
        with (folder / "trainer.log").open("w") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + _START_SECONDS
        while not self._steps():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise SystemExit((folder / "trainer.log").read_text()[-2000:])
            time.sleep(0.5)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def mark(self) -> int:
        """The current position, for ``rate``."""
        return len(self._steps())

    def rate(self, mark: int) -> float:
        """Steps per second since ``mark``, from its first step that began after it."""
        steps = self._steps()[mark:]
        if len(steps) < 2:
            raise SystemExit("too few steps of training in a window: a larger --seconds")
        return (len(steps) - 1) / (steps[-1] - steps[0])

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _steps(self) -> list[float]:
        """When each step ended, in seconds."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        return [row["seconds"] for row in rows if row["kind"] == "step"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the median counts")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each window")
    parser.add_argument(
        "--config", type=Path, default=ROOT / "examples" / "train" / "language-lora.toml"
    )
    parser.add_argument("--force", action="store_true", help="measure on a busy machine too")
    parser.add_argument("--no-save", action="store_true", help="keep no results")
    args = parser.parse_args(argv)
    console = make_console()
    load = require_idle(console, args.force)
    model = resolve_model(None, default_cache_dir())
    arch = read_arch(AutoConfig.from_pretrained(model.files))
    rates: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="turret-bench-") as text:
        folder = Path(text)
        loras = write_random_loras(folder, _BATCH, rank=_RANK, arch=arch, base_model=model.name)
        cases: dict[str, list[str | None]] = {
            "one adapter, 1 request": [loras[0]],
            f"{_BATCH} adapters, {_BATCH} requests": list(loras),
        }
        served = Served(folder, loras)
        with contextlib.ExitStack() as stack:
            stack.callback(served.stop)
            for adapters in cases.values():
                served.rate(adapters, 8)
            trainer = Trainer(folder, args.config)
            stack.callback(trainer.kill)
            for _ in range(args.repeats):
                for name, rate in one_round(served, trainer, cases, args.seconds).items():
                    found = rates.setdefault(name, {"alone": [], "together": []})
                    for setting, value in rate.items():
                        found[setting].append(value)
    rows = [row_of(name, found["alone"], found["together"]) for name, found in rates.items()]
    print_rows(console, "Server (tokens/s) and trainer (steps/s), alone and together", rows)
    if not args.no_save:
        common = describe() | {"bench": "beside_training", "forced": args.force}
        common |= {"load_before": load}
        saved = [
            common
            | {
                "scenario": {"name": name, "config": args.config.name, "rank": _RANK},
                "values": {k: [round(v, 3) for v in values] for k, values in found.items()},
            }
            for name, found in rates.items()
        ]
        console.print(f"results added to {append_rows(saved)}", soft_wrap=True)
    return 0


def row_of(name: str, alone: list[float], together: list[float]) -> dict[str, str]:
    """A row of what is printed."""
    medians = statistics.median(alone), statistics.median(together)
    return {
        "what": name,
        "alone": f"{medians[0]:.3g}",
        "together": f"{medians[1]:.3g}",
        "share": f"{medians[1] / medians[0]:.2f}",
        "all": "; ".join(", ".join(f"{v:.3g}" for v in values) for values in (alone, together)),
    }


def one_round(
    served: Served, trainer: Trainer, cases: dict[str, list[str | None]], seconds: float
) -> dict[str, dict[str, float]]:
    """Rates by what is measured and by setting."""
    found: dict[str, dict[str, float]] = {}
    mark = trainer.mark()
    time.sleep(seconds)
    alone = trainer.rate(mark)
    for name, adapters in cases.items():
        trainer.stop()
        try:
            quiet = server_rate(served, adapters, seconds / 2)
        finally:
            trainer.go_on()
        time.sleep(1.0)
        mark = trainer.mark()
        found[name] = {"alone": quiet, "together": server_rate(served, adapters, seconds)}
        found[f"training beside {name}"] = {"alone": alone, "together": trainer.rate(mark)}
    return found


def server_rate(served: Served, adapters: list[str | None], seconds: float) -> float:
    """Median rate in tokens per second of the batches that begin within this many seconds."""
    end = time.monotonic() + seconds
    batches: list[float] = []
    while time.monotonic() < end:
        batches.append(served.rate(adapters))
    return statistics.median(batches)


if __name__ == "__main__":
    sys.exit(main())
