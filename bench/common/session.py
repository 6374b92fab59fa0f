"""The parts that all benchmarks of the CPU path share: flags, a server and stored results."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.adapters import Writer
from common.machine import describe, require_idle
from common.report import append_rows, make_console
from common.shapes import SHAPES, write_model
from rich.console import Console

from turret.clients.client import TurretClient
from turret.server.server_process import ServerProcess
from turret.training.base_model import TrainingBase, find_base


def make_parser(doc: str | None, repeats: int) -> argparse.ArgumentParser:
    """A parser with the flags that all benchmarks have."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", type=Path, metavar="DIR", help="default: the bundled model")
    model.add_argument(
        "--shape", choices=SHAPES, help="a model of this shape with random weights, in build/shapes"
    )
    parser.add_argument(
        "--repeats", type=int, default=repeats, help=f"rounds; results are medians ({repeats})"
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="run only cases with TEXT in their names"
    )
    parser.add_argument("--force", action="store_true", help="measure on a busy machine too")
    parser.add_argument("--no-save", action="store_true", help="do not store the results")
    return parser


@dataclass(frozen=True, slots=True)
class Session:
    """One run of a benchmark.

    Attributes:
        args: The flags of :func:`make_parser`, and others.
        console: The output.
        base: The model.
        write: Writes adapters, in the folder that servers read them from.
    """

    name: str
    args: argparse.Namespace
    console: Console
    base: TrainingBase
    write: Writer
    _common: Mapping[str, Any]

    @contextlib.contextmanager
    def serving(self, adapters: Sequence[str | None], *flags: str) -> Iterator[ServerProcess]:
        """Run a server that has loaded adapters."""
        # Measure the cost of a step; speculation would change the number of steps.
        common = ["--adapter-root", str(self.write.root), "--speculation", "off"]
        common += ["--max-num-seqs", "64", "--max-rank", "128"]
        if self.args.model is not None:
            common += ["--model", str(self.args.model)]
        with ServerProcess([*common, *flags]) as server:
            server.wait()
            with TurretClient(server.address) as client:
                for name in dict.fromkeys(name for name in adapters if name is not None):
                    client.adapters.load(name, name)
            yield server

    def save(self, rows: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> None:
        """Store the scenario and the values of each row, unless ``--no-save`` is set."""
        if self.args.no_save:
            return
        model = {"model": self.base.source.name}
        saved = [
            {**self._common, "scenario": {**model, **scenario}, "values": values}
            for scenario, values in rows
        ]
        self.console.print(f"results added to {append_rows(saved)}", soft_wrap=True)


@contextlib.contextmanager
def session(name: str, args: argparse.Namespace) -> Iterator[Session]:
    """Check that the machine is idle, and load the model for writing adapters.

    Raises:
        SystemExit: The machine is busy, and --force was not passed.
    """
    console = make_console()
    load = require_idle(console, args.force)
    common = describe() | {"bench": name, "forced": args.force, "load_before": round(load, 3)}
    if args.shape is not None:
        args.model = write_model(args.shape)
    base = find_base(args.model)
    with tempfile.TemporaryDirectory(prefix="turret-bench-") as folder:
        yield Session(name, args, console, base, Writer(Path(folder), base), common)
