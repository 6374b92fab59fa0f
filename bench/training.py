"""Training of many adapters at once on a server's base, compared with PEFT, one after another.

    python bench/training.py [--tenants 1 4 16] [--steps 3] [--rows 4] [--length 44]

Every tenant trains a LoRA of rank 8 on all linear modules of the bundled model in bfloat16; each
of its steps is a batch of ``--rows`` texts of ``--length`` tokens and one step of AdamW. turret
runs the tenants at once in the engine of a server. The reference is transformers, PEFT and
bitsandbytes on the same quantised weights, for one adapter; n adapters take it n times as long. It
is measured in bfloat16 and in float32, because torch is slow in bfloat16 on many processors.

On a machine that also does other work, compare tokens per second of processor time, with
``OMP_NUM_THREADS=1`` in the environment, because threads that wait for each other use time, too.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from common.report import make_console, print_rows
from peft import LoraConfig, get_peft_model

from turret.server.build import build_backend
from turret.server.config import AdapterConfig, CacheConfig, Config, ModelConfig
from turret.server.metrics import Metrics
from turret.server.training import AdamParams, Datum, LearnerConfig
from turret.server.training.service import TrainingService
from turret.training.base_model import _load_nf4, find_base

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RATE = 1e-4


def texts(rows: int, length: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 40000, (rows, length + 1), generator=generator).tolist()


async def train(training: TrainingService, learner: int, data: Sequence[Datum], steps: int) -> None:
    for _ in range(steps):
        await training.pass_over(learner, data, "cross_entropy", {})
        await training.step(learner, AdamParams(learning_rate=RATE))


class Rate(NamedTuple):
    """Tokens per second of elapsed time, and of processor time."""

    wall: float
    processor: float


class Clock:
    """Measures a rate from its creation on."""

    def __init__(self) -> None:
        self._began = time.perf_counter(), time.process_time()

    def rate(self, tokens: int) -> Rate:
        wall, processor = self._began
        return Rate(
            tokens / (time.perf_counter() - wall), tokens / (time.process_time() - processor)
        )


async def measure_turret(args: argparse.Namespace) -> dict[int, Rate]:
    """The rate of all tenants together, by their number."""
    found: dict[int, Rate] = {}
    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            model=ModelConfig(device="cpu"),
            cache=CacheConfig(kv_cache_bytes=256 << 20),
            adapters=AdapterConfig(state_dir=Path(folder) / "state", training=True),
        )
        backend = build_backend(config, Metrics())
        training = backend.training
        assert training is not None
        await backend.engine.start()
        for count in args.tenants:
            learners = [await training.create(LearnerConfig(rank=8, seed=n)) for n in range(count)]
            data = [
                [
                    Datum(
                        text[:-1],
                        {
                            "target_tokens": torch.tensor(text[1:]),
                            "weights": torch.full((args.length,), 1 / args.rows / args.length),
                        },
                    )
                    for text in texts(args.rows, args.length, n)
                ]
                for n in range(count)
            ]
            pairs = list(zip(learners, data, strict=True))
            await asyncio.gather(*(train(training, *pair, 1) for pair in pairs))
            clock = Clock()
            await asyncio.gather(*(train(training, *pair, args.steps) for pair in pairs))
            found[count] = clock.rate(count * args.steps * args.rows * args.length)
            for learner in learners:
                await training.drop(learner)
        await backend.engine.drain(0.0)
        backend.close()
    return found


def measure_peft(args: argparse.Namespace, dtype: torch.dtype) -> Rate:
    """The rate of one adapter."""
    model = _load_nf4(find_base(None), dtype).requires_grad_(False)
    config = LoraConfig(r=8, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=RATE)
    ids = torch.tensor(texts(args.rows, args.length, 0))
    clock = Clock()
    for step in range(args.steps + 1):
        if step == 1:
            clock = Clock()
        logits = adapted(input_ids=ids[:, :-1]).logits.float()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return clock.rate(args.steps * args.rows * args.length)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare training of many adapters with PEFT.")
    parser.add_argument("--tenants", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=44)
    args = parser.parse_args(argv)
    rates = {
        f"PEFT in {name}, one adapter": measure_peft(args, getattr(torch, name))
        for name in ("bfloat16", "float32")
    }
    reference = max(rate.processor for rate in rates.values())
    rates |= {
        f"turret, {count} at once": rate
        for count, rate in asyncio.run(measure_turret(args)).items()
    }
    rows = [
        {
            "": name,
            "tokens/s": f"{rate.wall:.0f}",
            "per second of processor time": f"{rate.processor:.0f}",
            "of PEFT": f"{rate.processor / reference:.2f}",
        }
        for name, rate in rates.items()
    ]
    print_rows(make_console(), "training", rows)
    return 0


if __name__ == "__main__":
    main()
