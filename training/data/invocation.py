"""Where an aLoRA begins to act: at the last place of its invocation in a prompt.

So the server has it (``server/engine/scheduling/sequence.py``): it searches what precedes the
answer and not the answer itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from turret.server.basics.token_search import last_occurrence
from turret.training.data.example import Example
from turret.training.errors import ConfigError

_KEY = "method.invocation"


@dataclass(frozen=True, slots=True)
class Invocation:
    """An invocation in a tokenizer's tokens.

    Attributes:
        text: As in ``method.invocation``.
        tokens: Its ids; at least one.
    """

    text: str
    tokens: tuple[int, ...]

    def start_in(self, prompt: Sequence[int], example: Example, tokenizer: Any) -> int:
        """The first position that the adapter acts on.

        Args:
            prompt: Tokens before the last answer.
            example: What they are of.
            tokenizer: What made them.

        Raises:
            DataError: The prompt does not hold these tokens.
        """
        start = last_occurrence(prompt, self.tokens)
        if start is not None:
            return start
        field = "messages" if example.messages is not None else "prompt"
        field = "text" if field == "prompt" and example.prompt is None else field
        problem = f"holds no {self.text!r:.60} before its last answer, where {_KEY} begins to act"
        if self.text in tokenizer.decode(list(prompt)):
            problem = (
                f"holds {self.text!r:.60} in other tokens than {list(self.tokens)!s:.60}: the"
                f" tokenizer joins its ends with what is beside it; choose a {_KEY} that begins"
                " and ends with special tokens, or with line breaks"
            )
        raise example.error(field, problem)


def invocation_of(tokenizer: Any, text: str) -> Invocation:
    """The tokens of a text.

    Raises:
        ConfigError: It has none.
    """
    tokens = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not tokens:
        raise ConfigError.of(_KEY, f"{text!r:.60} has no token")
    return Invocation(text, tokens)


def invocation_before_answers(tokenizer: Any) -> str:
    """What the chat template writes before an answer.

    Raises:
        ConfigError: There is no template, or it writes nothing.
    """
    text = ""
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "a"}]
        asked, opened = (
            tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=is_open)
            for is_open in (False, True)
        )
        text = opened[len(asked) :] if opened.startswith(asked) else ""
    if not text:
        problem = "is required: no chat template of this model writes one before an answer"
        raise ConfigError.of(_KEY, problem)
    return text
