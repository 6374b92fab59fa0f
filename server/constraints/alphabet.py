"""What is known of a tokenizer's tokens, whatever the constraint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    # Types only; see ``constraint.py``.
    from llguidance import LLTokenizer

Words = np.ndarray[tuple[int], np.dtype[np.int32]]


class Alphabet:
    """The tokens of one tokenizer.

    Args:
        texts: What each token stands for; empty for special tokens.
        num_drawable: How many of them the model has logits for, from the first on.
    """

    def __init__(self, texts: list[bytes], num_drawable: int) -> None:
        self.num_words = (len(texts) + 31) // 32
        times = Counter(texts)
        self._plain = bytes(bool(t) and times[t] == 1 for t in texts[:num_drawable])
        self._drawable: Words | None = None
        if num_drawable < len(texts):
            self._drawable = words_of(range(num_drawable), self.num_words)

    def is_plain(self, token_id: int) -> bool:
        """Whether a token can be drawn and is a text, and no other token is the same text."""
        return token_id < len(self._plain) and self._plain[token_id] == 1

    def is_drawable(self, token_id: int) -> bool:
        """Whether the model has a logit for a token."""
        return token_id < len(self._plain)

    def keep_drawable(self, words: Words) -> bool:
        """Leave in a mask, in place, the tokens that can be drawn.

        Args:
            words: ``[num_words]`` int32, with a token at least.

        Returns:
            Whether any is left.
        """
        if self._drawable is None:
            return True
        words &= self._drawable
        return bool(words.any())


def alphabet_of(native: LLTokenizer, num_drawable: int) -> Alphabet:
    """Of a tokenizer, which is read token by token: 25 ms for 50,000."""
    texts = [
        b"" if native.is_special_token(token) else native.decode_bytes([token])
        for token in range(native.vocab_size)
    ]
    return Alphabet(texts, num_drawable)


def words_of(token_ids: Iterable[int], num_words: int) -> Words:
    """``[num_words]`` int32 with the bits of some tokens; those beyond have none."""
    bits = np.zeros(32 * num_words, dtype=np.uint8)
    bits[[token for token in token_ids if token < 32 * num_words]] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)
