"""Shows what NF4 changes for an adapter: PEFT's answers on the plain and on the rounded base.

python examples/compare_base.py examples/adapters/label examples/data/label.test.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from nf4_base import chat, load_model, load_tokenizer
from peft import PeftModel


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter", help="directory of a PEFT adapter of the demo model")
    parser.add_argument("data", type=Path, help='lines of {"prompt": ..., "completion": ...}')
    parser.add_argument("--limit", type=int, default=24)
    args = parser.parse_args()
    tokenizer = load_tokenizer()
    rows = [json.loads(line) for line in args.data.read_text().splitlines()[: args.limit]]
    for name, is_rounded in (("plain base", False), ("NF4 base", True)):
        model = PeftModel.from_pretrained(load_model(torch.float32, is_rounded), args.adapter)
        model.eval()
        total, count, right = 0.0, 0, 0
        for row in rows:
            prompt = tokenizer(chat(tokenizer, row["prompt"]), add_special_tokens=False).input_ids
            answer = tokenizer(row["completion"], add_special_tokens=False).input_ids
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            wanted = torch.tensor(answer)
            total -= torch.log_softmax(logits, -1).gather(1, wanted[:, None]).sum().item()
            count += len(answer)
            right += bool((logits.argmax(-1) == wanted).all())
        print(f"{name:<11} perplexity {math.exp(total / count):.3f}, right {right} of {len(rows)}")


if __name__ == "__main__":
    main()
