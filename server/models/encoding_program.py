"""Encodes texts with a tokenizer whose patterns may be slow; runs in a confined child process."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer


def answers(job: tuple[str, Sequence[str], bool]) -> Iterator[object]:
    """The token ids of each text, or the library's error."""
    path, texts, add_special_tokens = job
    try:
        found = _read(path).encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        yield {"ids": [one.ids for one in found]}
    except MemoryError:
        # End the process: it has no memory left.
        raise
    except BaseException as error:
        # This includes panics of the library.
        yield {"error": f"{type(error).__name__}: {error}"[:1000]}


@functools.cache
def _read(path: str) -> Tokenizer:
    return Tokenizer.from_str(Path(path).read_text())
