"""Encodes texts in this process, or in a child process if the tokenizer's patterns may be slow."""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from turret.server.basics.confined import Confined
from turret.server.basics.work import return_free_memory
from turret.server.errors import InvalidRequestError
from turret.server.words import say

_PROGRAM = Path(__file__).with_name("tokenizer_program.py")
CPU_SECONDS = 10.0
_MAX_BYTES = 2 << 30
_MAX_ANSWER_BYTES = 64 << 20
# After encoding at least this many characters, free memory is returned to the system. The library
# allocates several small blocks per token, about 500 bytes in all.
_MANY_CHARS = 1 << 16

_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    + _ENGLISH
    + r"?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    + _ENGLISH
    + r"?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The pattern of Llama 3, SmolLM3 and GLM-4.
LLAMA3 = _ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
# Patterns whose time is linear in the text's length; a test encodes long texts with each.
KNOWN = frozenset(
    {
        LLAMA3,
        # Qwen 2 and 3
        _ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST,
        # gpt-oss (o200k)
        _CASED,
        # cl100k: OLMo 2, Phi-4
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    }
)


class Encoder:
    """Encodes texts with a backend of the ``tokenizers`` library. Thread-safe.

    Oniguruma, which matches the patterns of a tokenizer, gives up on a position of a text after ten
    million steps. But it may take as many steps at each position of a long text, and threads of
    this process cannot be killed. So a tokenizer with a pattern that is not among ``KNOWN`` encodes
    in a child process, which is killed when a text takes too much processor time.

    Attributes:
        is_confined: Whether a child process encodes, so that a call may take seconds.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._child: Confined | None = None
        self.is_confined = not KNOWN.issuperset(_patterns(backend))
        if self.is_confined:
            folder = Path(tempfile.mkdtemp(prefix="turret-tokenizer-"))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            self._file = folder / "tokenizer.json"
            self._file.write_text(backend.to_str())
            self._child = Confined(
                _PROGRAM,
                cpu_seconds=CPU_SECONDS,
                max_bytes=_MAX_BYTES,
                max_answer_bytes=_MAX_ANSWER_BYTES,
                packages=("tokenizers",),
            )

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool = False) -> list[list[int]]:
        """The ids of each text.

        Raises:
            InvalidRequestError: The tokenizer takes too long for one of the texts, or fails.
            UnavailableError: The child process is not available.
        """
        if self._child is None:
            # ``encode`` would hold the interpreter's lock. ``encode_batch_fast`` does not, and
            # computes no offsets.
            found = self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
            ids = [one.ids for one in found]
            if sum(map(len, texts)) > _MANY_CHARS:
                del found
                return_free_memory()
            return ids
        job = "encode", str(self._file), texts, add_special_tokens
        try:
            ids = self._child.ask_one(job, "TOKENIZER_UNREAD")["ids"]
        except ValueError as error:
            raise InvalidRequestError(say("TEXT_NOT_ENCODED", problem=error)) from None
        return ids


def _patterns(backend: Any) -> Iterator[str]:
    """The regular expressions with which a tokenizer matches texts."""
    for part in (backend.normalizer, backend.pre_tokenizer):
        if part is not None:
            yield from _expressions(json.loads(part.__getstate__()))


def _expressions(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(found := value.get("Regex"), str):
            yield found
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _expressions(each)
