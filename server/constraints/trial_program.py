"""Compiles a grammar to measure its memory; runs in a confined child process.

The tokenizer for this has only single bytes and special tokens. A grammar's lexer does not depend
on other tokens, so the grammar takes as much memory and time as with the model's tokenizer.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import json
import resource
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer


def answers(job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the memory that the compiled grammar takes, or why it cannot be compiled."""
    yield _thread(job["stack_bytes"]).submit(_compiled, job).result()


@functools.cache
def _thread(stack_bytes: int) -> ThreadPoolExecutor:
    """A thread with a large stack, which nested rules need."""
    threading.stack_size(stack_bytes)
    return ThreadPoolExecutor(1)


def _compiled(job: Mapping[str, Any]) -> dict[str, Any]:
    tokenizer = _tokenizer(job["special"], job["ends"], job["vocab_size"])
    before = _resident_bytes()
    limits = LLParserLimits(**job["limits"])
    matcher = LLMatcher(tokenizer, job["grammar"], log_level=0, limits=limits)
    fault = matcher.get_error() if matcher.is_error() else ""
    return {"fault": fault, "bytes": max(0, _resident_bytes() - before)}


def _resident_bytes() -> int:
    # Return freed memory to the system: a grammar that reused it would seem to take less.
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@functools.lru_cache(maxsize=1)
def _tokenizer(special: str, ends: str, vocab_size: int) -> LLTokenizer:
    """A tokenizer of ``vocab_size`` tokens; only the special ones and 256 others have a text."""
    texts = {int(token): text for token, text in json.loads(special).items()}
    free = (token for token in itertools.count() if token not in texts)
    added = [
        {
            "id": token,
            "content": text,
            "special": True,
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        }
        for token, text in texts.items()
    ]
    spelling = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    model = {
        "type": "BPE",
        "vocab": dict(zip(_characters(), free, strict=False)),
        "merges": [],
    }
    data = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {**spelling, "use_regex": False},
        "decoder": {**spelling, "use_regex": False},
        "model": model,
    }
    used = max((*texts, *model["vocab"].values())) + 1
    return LLTokenizer(json.dumps(data), n_vocab=max(vocab_size, used), eos_token=json.loads(ends))


def _characters() -> list[str]:
    """The characters that stand for the 256 bytes in byte-level vocabularies."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = (chr(256 + number) for number in itertools.count())
    return [chr(byte) if byte in plain else next(other) for byte in range(256)]
