"""The model's tokenizer and chat template (transformers), as the server uses them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers.decoders import DecodeStream

from turret.server.errors import InvalidRequestError


class Tokenizer:
    """Text to token ids and back. Safe to call from several threads.

    Attributes:
        vocab_size: Token ids below it exist here and in the model: tokenizers may hold added tokens
            that the model has no row for.
    """

    def __init__(self, inner: Any, eos_token_ids: frozenset[int], model_vocab_size: int) -> None:
        self._inner = inner
        backend = inner.backend_tokenizer
        self._backend = backend
        self.vocab_size: int = min(backend.get_vocab_size(), model_vocab_size)
        own = inner.eos_token_id
        ends = eos_token_ids | (frozenset() if own is None else {own})
        self.eos_token_ids = frozenset(token for token in ends if token < model_vocab_size)
        self._special = frozenset(inner.all_special_ids)

    @classmethod
    def load(cls, files: Path, eos_token_ids: frozenset[int], model_vocab_size: int) -> Tokenizer:
        """Load from a model directory.

        Args:
            files: The directory.
            eos_token_ids: Ends of sequence that the model's config names.
            model_vocab_size: Rows of the model's embedding.

        Raises:
            InvalidRequestError: The directory has no tokenizer that converts to a fast one.
        """
        from transformers import AutoTokenizer

        try:
            inner = AutoTokenizer.from_pretrained(files)
            if not inner.is_fast:
                raise ValueError("not a fast tokenizer")
        except (OSError, ValueError) as error:
            raise InvalidRequestError.of(
                "model", f"no usable tokenizer in {files}: {error}"
            ) from error
        return cls(inner, eos_token_ids, model_vocab_size)

    def encode(self, text: str) -> list[int]:
        """Tokenise a raw prompt; the tokenizer's own BOS rule applies."""
        return self._inner(text)["input_ids"]

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Apply the chat template and open the assistant's turn.

        Raises:
            InvalidRequestError: No chat template, or the template refuses the messages.
        """
        if not getattr(self._inner, "chat_template", None):
            raise InvalidRequestError.of("chat", "this model has no chat template; send a prompt")
        try:
            text = self._inner.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=False
            )
        except Exception as error:
            # jinja raises many kinds; all of them are about the messages the client sent.
            raise InvalidRequestError.of("chat.messages", f"chat template: {error}") from error
        return self._inner(text, add_special_tokens=False)["input_ids"]

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """Text of a whole sequence, with special tokens if ``special``."""
        return self._backend.decode(list(token_ids), skip_special_tokens=not special)

    def token_text(self, token_id: int) -> str:
        """Text of one token on its own, special tokens shown."""
        return self._backend.decode([token_id], skip_special_tokens=False)

    def stream(self) -> TokenStream:
        """An incremental decoder for one sequence."""
        return TokenStream(self._backend)


class TokenStream:
    """Decodes one sequence token by token.

    Text appears only when complete: a character that spans several byte tokens comes with its last
    one, and word-initial spaces are right.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._stream = DecodeStream(skip_special_tokens=True)

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that became certain (often one word, sometimes none)."""
        return self._stream.step(self._backend, token_id) or ""
