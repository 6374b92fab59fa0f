"""Checks that the example adapters, loaded from disk with PEFT, answer ``prompts.jsonl``.

Decodes greedily on the NF4-rounded base, in fp32 and in bf16, and prints the base model's own
answer next to each::

    python examples/check_examples.py

Exits with 1 if an answer is not the expected one, or if the base model gives the same answer.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import torch
from nf4_base import answer, load_model, load_tokenizer
from peft import PeftModel

HERE = Path(__file__).resolve().parent


def read_prompts() -> list[dict[str, str]]:
    """Returns the rows of ``prompts.jsonl``: ``adapter``, ``prompt``, ``expected``, ``check``."""
    text = (HERE / "prompts.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def is_expected(row: dict[str, str], text: str) -> bool:
    """Returns whether an answer matches the row's ``expected``, by the row's ``check``.

    Raises:
        ValueError: The row names an unknown check.
    """
    if row["check"] == "equals":
        return text.strip() == row["expected"]
    if row["check"] == "startswith":
        return text.startswith(row["expected"])
    raise ValueError(f"unknown check {row['check']!r}")


def main() -> int:
    rows = read_prompts()
    names = list(dict.fromkeys(row["adapter"] for row in rows))
    tokenizer = load_tokenizer()
    failures = 0
    for dtype in (torch.float32, torch.bfloat16):
        base = load_model(dtype)
        for name in names:
            mine = [row for row in rows if row["adapter"] == name]
            prompts = [row["prompt"] for row in mine]
            # Copy the base, because PEFT allows adapters of only one method on a model.
            folder = str(HERE / "adapters" / name)
            model = PeftModel.from_pretrained(copy.deepcopy(base), folder).to(dtype).eval()
            answers = answer(model, tokenizer, prompts)
            with model.disable_adapter():
                of_base = answer(model, tokenizer, prompts)
            for row, text, base_text in zip(mine, answers, of_base, strict=True):
                # An adapter that only repeats the base model would prove nothing.
                good = is_expected(row, text) and not is_expected(row, base_text)
                failures += not good
                verdict = "ok" if good else f"EXPECTED {row['expected']!r}"
                print(f"{str(dtype)[6:]} {name}: {row['prompt']}\n  {text!r} {verdict}")
                print(f"  base: {base_text[:80]!r}", flush=True)
    print(f"{failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
