"""Measures whether served adapters compute what they computed at the end of their training.

For each adapter of ``turret train``, it computes the log probabilities of test examples on the base
on which the adapter was trained, as the trainer's validation does, and asks a server for the same::

    python bench/reloading.py http://localhost:8000 examples/data/label.test.jsonl nf4=nf4/adapter

The adapters must be saved in float32 (``--adapter-dtype float32``), so that the files hold exactly
the trained weights.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import httpx2
import torch

from turret.training.base_model import DTYPES, find_base, load_model
from turret.training.verification.checks import adapted

# The first tokens are skipped: they are attention sinks, whose log probabilities change by whole
# nats through rounding.
_SKIPPED = 2


def served(url: str, name: str, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The server's log probabilities of the tokens, and its likeliest token at each position."""
    body = {"model": name, "prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1}
    body["return_tokens_as_token_ids"] = True
    answer = httpx2.post(f"{url}/v1/completions", json=body, timeout=600)
    found = answer.raise_for_status().json()["choices"][0]["logprobs"]
    best = [max(top, key=top.get) for top in found["top_logprobs"][_SKIPPED:]]
    likeliest = [int(re.sub(r"\D", "", text)) for text in best]
    return torch.tensor(found["token_logprobs"][_SKIPPED:]), torch.tensor(likeliest)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("server", help="a server that has loaded the adapters")
    parser.add_argument("data", type=Path, help='lines of {"prompt": ..., "completion": ...}')
    parser.add_argument("adapters", nargs="+", help="NAME=DIRECTORY")
    parser.add_argument("--limit", type=int, default=24)
    args = parser.parse_args()
    base = find_base(None)
    texts = []
    for line in args.data.read_text(encoding="utf-8").splitlines()[: args.limit]:
        row = json.loads(line)
        turns = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
        texts.append(base.tokenizer.apply_chat_template(turns, return_dict=False))
    for entry in args.adapters:
        name, _, folder = entry.partition("=")
        provenance: Any = json.loads((Path(folder) / "provenance.json").read_text())
        config = provenance["config"]["base"]
        model = load_model(base, config["weights"], DTYPES[config["dtype"]], "cpu").eval()
        squares, same, count = 0.0, 0, 0
        with adapted(model, Path(folder)) as made:
            for ids in texts:
                logits = made.model(torch.tensor([ids]), use_cache=False).logits[0]
                rows = logits.float().log_softmax(-1)[_SKIPPED - 1 : -1]
                trained = rows.gather(1, torch.tensor(ids[_SKIPPED:])[:, None])[:, 0]
                logprobs, likeliest = served(args.server, name, ids)
                squares += float((logprobs - trained).square().sum())
                same += int((likeliest == rows.argmax(-1)).sum())
                count += len(trained)
        print(
            f"{name}: trained on {config['weights']} in {config['dtype']}; {count} tokens,"
            f" RMSE {(squares / count) ** 0.5:.4f}, top-1 agreement {same / count:.2%}"
        )


if __name__ == "__main__":
    main()
