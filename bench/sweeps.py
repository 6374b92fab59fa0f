"""A sweep over ranks: one run after another in a process of its own, and all at once on a server.

    python bench/sweeps.py [--ranks 2,4,8,16] [--steps 20] [--rounds 1]

Both train LoRAs on all linear modules of the bundled model, with batches of four examples of
``examples/data/headline.train.jsonl``. The table shows the elapsed time and the processor time of
all processes, and the peak of each process's resident memory.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common.report import make_console, print_rows

DATA = Path(__file__).parents[1] / "examples" / "data" / "headline.train.jsonl"
TURRET = [sys.executable, "-m", "turret.server.cli"]
_SERVING = re.compile(r"turret\.server\.app serving .*?address=(\S+)")
CONFIG = """
[data]
train = "{data}"
validation_fraction = 0.02
[run]
steps = {steps}
batch_size = 4
validate_every = 1000
checkpoint_every = 0
samples = 0
"""


def start_server(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A server that trains, and its address."""
    log = folder / "server.log"
    flags = ["--training", "--state-dir", str(folder / "state"), "--address", "127.0.0.1:0"]
    with log.open("wb") as output:
        command = [*TURRET, "serve", *flags, "--metrics-address", "127.0.0.1:0"]
        process = subprocess.Popen(command, stderr=output)
    while not (found := _SERVING.search(log.read_text())):
        assert process.poll() is None, log.read_text()
        time.sleep(0.2)
    return process, found[1]


def usage(process: subprocess.Popen[bytes]) -> tuple[float, float]:
    """The processor time in seconds and the peak memory in MiB of a process, which must end."""
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0, status
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def measure(args: argparse.Namespace, on_server: bool) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "train.toml").write_text(CONFIG.format(data=DATA, steps=args.steps))
        server, flags = None, []
        if on_server:
            server, address = start_server(folder)
            flags = ["--server", address]
        config = str(folder / "train.toml")
        began = time.perf_counter()
        command = [*TURRET, "train", "sweep", config, "--ranks", args.ranks, "-q", *flags]
        seconds, peak = usage(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        elapsed = time.perf_counter() - began
        row = {
            "sweep": "at once on a server" if server else "one after another",
            "elapsed": f"{elapsed:.0f} s",
            "processor": f"{seconds:.0f} s",
            "command": f"{peak:.0f} MiB",
        }
        if server is not None:
            server.terminate()
            more, peak = usage(server)
            row |= {"processor": f"{seconds + more:.0f} s", "server": f"{peak:.0f} MiB"}
        return row


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare sweeps with and without a server.")
    parser.add_argument("--ranks", default="2,4,8,16")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    rows = [measure(args, bool(n % 2)) for n in range(2 * args.rounds)]
    print_rows(make_console(), "sweeps", [{**row, "server": row.get("server", "")} for row in rows])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
