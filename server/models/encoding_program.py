"""Encodes texts with a tokenizer whose patterns may be slow; runs in a confined child process."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer


def answers(job: tuple[str, Sequence[str], bool]) -> Iterator[object]:
    """The token ids of each text."""
    path, texts, add_special_tokens = job
    found = _read(path).encode_batch_fast(texts, add_special_tokens=add_special_tokens)
    yield {"ids": [one.ids for one in found]}


@functools.cache
def _read(path: str) -> Tokenizer:
    return Tokenizer.from_str(Path(path).read_text())
