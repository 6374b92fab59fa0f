"""A real fleet on this machine: the cost of its ingress, of a killed replica and of a change.

    python bench/live_fleet.py overhead [--rounds 5] [--demo]
    python bench/live_fleet.py kill [--adapters 200]
    python bench/live_fleet.py register [--adapters 2000]

``overhead`` queries one server and a fleet in turn, by default with a model so small that the
overhead is visible. ``kill`` ends a replica under load, and prints when each part of its recovery
is done. ``register`` loads adapters with four concurrent calls, on one server and on the fleet.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from common.fleet_process import FleetProcess
from common.machine import cpu_name
from scale.registering import register

from turret.clients.client import TurretClient
from turret.server.server_process import ServerProcess

_EXAMPLES = Path(__file__).parents[1] / "examples" / "adapters"
_FLAGS = ("--threads", "1", "--speculation", "off")
_PROMPT = "Once upon a time"


def write_tiny_model(folder: Path) -> None:
    """Write a model with steps well below a millisecond, and with the demo model's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from turret.server.models.model_source import resolve_model
    from turret.server.models.sources.check import default_cache_dir

    tokenizer = AutoTokenizer.from_pretrained(resolve_model(None, default_cache_dir()).files)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def timed(call: Callable[[], object], count: int) -> float:
    """The median time of a call in milliseconds."""
    taken: list[float] = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        taken.append((time.perf_counter() - start) * 1e3)
    return statistics.median(taken)


def token_ms(client: TurretClient, tokens: int) -> float:
    """The milliseconds per token of one stream, after its first token."""
    chunks = client.generate_stream(_PROMPT, max_tokens=tokens, temperature=0, ignore_eos=True)
    next(chunks)
    start = time.perf_counter()
    count = sum(1 for _ in chunks)
    assert count > tokens * 0.9, "more than a token in a chunk"
    return (time.perf_counter() - start) * 1e3 / count


def overhead(args: argparse.Namespace) -> None:
    """Measure a request and a token, through the fleet and directly."""
    with tempfile.TemporaryDirectory() as scratch:
        flags = list(_FLAGS)
        if not args.demo:
            model = Path(scratch) / "model"
            write_tiny_model(model)
            flags += ["--model", str(model)]
        with (
            ServerProcess(flags) as server,
            FleetProcess(Path(scratch), ["--replicas", "1", *flags]) as fleet,
        ):
            server.wait()
            with TurretClient(server.address) as direct, TurretClient(fleet.address) as through:
                _alternate(args, direct, through)


def _alternate(args: argparse.Namespace, direct: TurretClient, through: TurretClient) -> None:
    kinds: dict[str, Callable[[TurretClient], float]] = {
        "ms of Tokenize": lambda client: timed(lambda: client.tokenize(_PROMPT), 2 * args.calls),
        "ms of Generate, one token": lambda client: timed(
            lambda: client.generate(_PROMPT, max_tokens=1, temperature=0), args.calls
        ),
        "ms of GenerateStream, one token": lambda client: timed(
            lambda: list(client.generate_stream(_PROMPT, max_tokens=1, temperature=0)), args.calls
        ),
        "ms a token of one stream": lambda client: token_ms(client, args.tokens),
    }
    for kind, measure in kinds.items():
        found: list[tuple[float, float]] = []
        for number in range(args.rounds + 1):
            pair = (direct, through) if number % 2 else (through, direct)
            one, other = measure(pair[0]), measure(pair[1])
            # The first round warms both up.
            if number:
                found.append((one, other) if number % 2 else (other, one))
        alone, ours = (statistics.median(each) for each in zip(*found, strict=True))
        more = statistics.median(b - a for a, b in found)
        print(f"{kind}: direct {alone:.3f}, through {ours:.3f}, more by {more:.3f}", flush=True)


class Load(threading.Thread):
    """Sends short requests for one mix until it is stopped.

    Attributes:
        answers: The start of each request, and its duration in seconds.
        failures: The failed requests.
    """

    def __init__(self, address: str, name: str) -> None:
        super().__init__(daemon=True)
        self._address, self._name = address, name
        self.is_over = threading.Event()
        self.answers: list[tuple[float, float]] = []
        self.failures: list[Exception] = []

    def run(self) -> None:
        with TurretClient(self._address, max_retries=20, timeout=120.0) as client:
            while not self.is_over.is_set():
                start = time.monotonic()
                try:
                    client.generate(_PROMPT, adapters=[self._name], max_tokens=8, temperature=0)
                    self.answers.append((start, time.monotonic() - start))
                except Exception as error:
                    self.failures.append(error)


def kill(args: argparse.Namespace) -> None:
    """Kill one of two replicas under load."""
    with tempfile.TemporaryDirectory() as scratch:
        flags = ["--adapter-root", str(_EXAMPLES), "--replicas", "2", *_FLAGS]
        started = time.monotonic()
        with FleetProcess(Path(scratch), flags) as fleet:
            print(f"the fleet serves after {time.monotonic() - started:.1f} s", flush=True)
            names = [f"adapter{number}" for number in range(args.adapters)]
            with TurretClient(fleet.address) as client:
                for name in names:
                    client.adapters.load(name, "sql")
            loads = [Load(fleet.address, name) for name in names[: args.streams]]
            for load in loads:
                load.start()
            time.sleep(args.seconds)
            killed = _kill_one(fleet)
            time.sleep(args.seconds)
            for load in loads:
                load.is_over.set()
            for load in loads:
                load.join()
            _tell(loads, killed)


def _kill_one(fleet: FleetProcess) -> float:
    """Kill a replica, wait for a new one, and print the times; returns the time of the kill."""
    before = {replica.pid for replica in fleet.replicas()}
    text = len(fleet.log.read_text())
    victim = fleet.replicas()[0]
    killed = time.monotonic()
    victim.kill()
    marks = {"model loaded": "model loaded", "joined": "replica_server serving"}
    routes = fleet.routes()
    while True:
        time.sleep(0.05)
        since = time.monotonic() - killed
        if before and {replica.pid for replica in fleet.replicas()} - before:
            print(f"  {since:5.1f} s  its process", flush=True)
            before = set()
        for what, mark in list(marks.items()):
            if mark in fleet.log.read_text()[text:]:
                print(f"  {since:5.1f} s  {what}", flush=True)
                del marks[what]
        now = fleet.routes()
        if not marks and len(now) == len(routes) and now != routes:
            print(f"  {since:5.1f} s  the ingress has it", flush=True)
            return killed
        if since > 90.0:
            print(fleet.log.read_text()[text:])
            raise RuntimeError("it did not come back")


def _tell(loads: Sequence[Load], killed: float) -> None:
    for when, begins, ends in (
        ("before", killed - 1e9, killed - 1.0),
        ("killed in it, to 15 s after", killed - 1.0, killed + 15.0),
        ("afterwards", killed + 15.0, killed + 1e9),
    ):
        taken = sorted(s for load in loads for at, s in load.answers if begins <= at < ends)
        if taken:
            p99 = taken[min(int(0.99 * len(taken)), len(taken) - 1)]
            print(
                f"{when}: {len(taken)} answers, median {statistics.median(taken) * 1e3:.0f} ms,"
                f" p99 {p99 * 1e3:.0f}, longest {taken[-1] * 1e3:.0f}"
            )
    print(f"failures: {sum(len(load.failures) for load in loads)}")


def registering(args: argparse.Namespace) -> None:
    """Register the same adapters on one server and on a fleet of two, one after the other."""
    names = [f"adapter{number}" for number in range(args.adapters)]
    paths = ["sql", "json", "pirate", "language-lora"] * (args.adapters // 4 + 1)
    paths = paths[: args.adapters]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        flags = ["--adapter-root", str(_EXAMPLES), *_FLAGS]
        with ServerProcess([*flags, "--state-dir", str(folder / "one")]) as server:
            server.wait()
            alone = register(server.address, names, paths)
        print(f"one server: {alone:.1f} s, {alone / len(names) * 1e3:.2f} ms each", flush=True)
        with FleetProcess(folder, ["--replicas", "2", *flags]) as fleet:
            ours = register(fleet.address, names, paths)
        print(f"two replicas: {ours:.1f} s, {ours / len(names) * 1e3:.2f} ms each")
        print(f"{ours / alone:.2f} times as long")


def main(argv: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    verbs = made.add_subparsers(required=True)
    verb = verbs.add_parser("overhead")
    verb.add_argument("--rounds", type=int, default=5)
    verb.add_argument("--calls", type=int, default=100, help="calls of each kind in a round")
    verb.add_argument("--tokens", type=int, default=500, help="tokens of a stream")
    verb.add_argument("--demo", action="store_true", help="use the demo model, not a tiny one")
    verb.set_defaults(func=overhead)
    verb = verbs.add_parser("kill")
    verb.add_argument("--adapters", type=int, default=200, help="number of registered adapters")
    verb.add_argument(
        "--streams", type=int, default=4, help="number of streams, each with its own mix"
    )
    verb.add_argument(
        "--seconds", type=float, default=20.0, help="seconds before and after the kill"
    )
    verb.set_defaults(func=kill)
    verb = verbs.add_parser("register")
    verb.add_argument("--adapters", type=int, default=2000)
    verb.set_defaults(func=registering)
    args = made.parse_args(argv)
    print(cpu_name())
    args.func(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
