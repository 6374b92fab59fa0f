"""Chat prompts of an exact length in tokens, which all differ from their start on."""

from __future__ import annotations

import itertools

from turret.clients.client import TurretClient

Chat = list[tuple[str, str]]

# In the usual vocabularies each word is one token after a space; the length is checked anyway.
_WORDS = ("time", "people", "way", "water", "day", "part", "place", "work", "year", "name", "line")
_MAX_CORRECTIONS = 8


class PromptSource:
    """Makes prompts for one model.

    The first words differ from prompt to prompt, so that no two share a block of the server's
    prefix cache.

    Args:
        client: The client that measures the length of each prompt.
        num_tokens: The length of every prompt, including the chat template.
    """

    def __init__(self, client: TurretClient, num_tokens: int) -> None:
        self._client = client
        self._num_tokens = num_tokens
        self._numbers = itertools.count(1000)

    def take(self, count: int) -> list[Chat]:
        """The next ``count`` prompts.

        Raises:
            ValueError: No prompt of this length was found, because it is too short for the chat
                template.
        """
        return [self._make(next(self._numbers)) for _ in range(count)]

    def _make(self, number: int) -> Chat:
        num_words = 0
        for _ in range(_MAX_CORRECTIONS):
            words = (_WORDS[(number + i) % len(_WORDS)] for i in range(num_words))
            chat = [("system", f"{number} is your number."), ("user", " ".join(["Tell", *words]))]
            excess = len(self._client.tokenize(chat).token_ids) - self._num_tokens
            if excess == 0:
                return chat
            num_words -= excess
            if num_words < 0:
                break
        raise ValueError(f"no chat prompt of exactly {self._num_tokens} tokens")
