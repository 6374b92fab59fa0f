"""Reads an untrusted tokenizer, or encodes texts with it; runs in a confined child process."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

PARTS = ("normalizer", "pre_tokenizer", "model", "decoder")


def answers(job: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """The answer to a job, which consists of the name of its task and the task's arguments."""
    task, *arguments = job
    yield {"describe": _description, "encode": _encoded}[task](*arguments)


@functools.cache
def _tokenizer(path: str) -> Tokenizer:
    return Tokenizer.from_str(Path(path).read_text())


def _encoded(path: str, texts: Sequence[str], add_special_tokens: bool) -> dict[str, Any]:
    """The token ids of each text."""
    found = _tokenizer(path).encode_batch_fast(texts, add_special_tokens=add_special_tokens)
    return {"ids": [one.ids for one in found]}


def _description(path: str) -> dict[str, Any]:
    """A digest of each of ``PARTS``, and the file without its vocabulary."""
    said = json.loads(Path(path).read_bytes())
    model = said["model"]
    vocab, merges = model["vocab"], model.get("merges", [])
    if isinstance(vocab, dict):
        model["vocab"] = {}
        vocab = sorted(vocab.items(), key=lambda item: item[1])
    else:
        # Unigram rejects a vocabulary without the unknown token.
        model["vocab"] = vocab[: (model.get("unk_id") or 0) + 1]
    if "merges" in model:
        model["merges"] = []
    added, said["added_tokens"] = said["added_tokens"], []
    said["padding"] = said["truncation"] = None
    # The library writes every setting in its latest form, even if the file has an older version.
    small = json.loads(Tokenizer.from_str(json.dumps(said)).to_str())
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
    content = {**small, "model": [small["model"], vocab, pairs]}
    digests = {
        part: hashlib.sha256(json.dumps(content[part], sort_keys=True).encode()).hexdigest()
        for part in PARTS
    }
    return {"digests": digests, "file": {**small, "added_tokens": added}}
