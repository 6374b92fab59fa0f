"""The client of the verified server. It uses the OpenAI API, which all adapter servers support."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from turret.training.words import RunError, say

_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Continuation:
    """A greedy continuation.

    Attributes:
        text: The text.
        tokens: The id of each token, or its text if the server reports no ids. The last one may be
            the token that ended the answer.
        logprobs: The natural log probability of each token.
    """

    text: str
    tokens: tuple[int | str, ...]
    logprobs: tuple[float, ...]


class VerifiedServer:
    """A client of a server's OpenAI API, to be used as a context manager.

    Args:
        url: The address, with or without ``http://`` and ``/v1``.
        token: The bearer token, if the server needs one.

    Raises:
        RunError: The server cannot be reached or has no list of models.
    """

    def __init__(self, url: str, token: str | None) -> None:
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        url = re.sub(r"(/v1)?/*$", "", url if "://" in url else f"http://{url}")
        self._url = url
        with contextlib.ExitStack() as stack:
            self._client = stack.enter_context(
                httpx2.Client(base_url=url, headers=headers, timeout=_SECONDS)
            )
            listed = self._call("GET", "/v1/models")
            if not isinstance(listed, dict) or "data" not in listed:
                raise RunError(say("NO_MODEL_LIST", url=url))
            self.models: list[dict[str, Any]] = listed["data"]
            # llama.cpp's server selects adapters by number, not by the model's name.
            self._numbers: dict[str, int] | None = None
            with contextlib.suppress(RunError):
                if isinstance(found := self._call("GET", "/lora-adapters"), list):
                    self._numbers = {Path(each["path"]).stem: each["id"] for each in found}
            stack.pop_all()

    def __enter__(self) -> VerifiedServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    @property
    def digest(self) -> str | None:
        """The digest of the base's weights, if the server is turret."""
        return next((card["digest"] for card in self.models if "digest" in card), None)

    @property
    def names(self) -> set[str]:
        """The adapters that the server has."""
        if self._numbers is not None:
            return set(self._numbers)
        return {card["id"] for card in self.models if card.get("parent")}

    def ask(self, adapter: str | None, prompt: Sequence[int], max_tokens: int) -> Continuation:
        """Continue a prompt greedily.

        Args:
            adapter: The name of an adapter; None is the base alone.
            prompt: The tokens of the prompt.
            max_tokens: Maximum number of tokens of the answer.

        Raises:
            RunError: The server does not answer or lists no base model, or its answer has no log
                probabilities.
        """
        base = next((card["id"] for card in self.models if not card.get("parent")), None)
        if base is None:
            raise RunError(say("NO_BASE_LISTED", url=self._url))
        body: dict[str, Any] = {"model": adapter or base, "prompt": list(prompt)}
        body |= {"max_tokens": max_tokens, "temperature": 0, "logprobs": 1}
        body["return_tokens_as_token_ids"] = True
        if self._numbers is not None:
            body["lora"] = [
                {"id": number, "scale": float(name == adapter)}
                for name, number in self._numbers.items()
            ]
        choice = self._call("POST", "/v1/completions", body)["choices"][0]
        found = choice.get("logprobs") or {}
        if "content" in found:  # llama.cpp
            tokens = [each.get("id", each["token"]) for each in found["content"]]
            logprobs = [each["logprob"] for each in found["content"]]
        elif "tokens" in found:
            tokens = [_token(name) for name in found["tokens"]]
            logprobs = found["token_logprobs"]
        else:
            raise RunError(say("NO_LOGPROBS", url=self._url))
        return Continuation(choice["text"], tuple(tokens), tuple(logprobs))

    def load(self, name: str, path: Path) -> None:
        """Register an adapter by vLLM's API.

        Raises:
            RunError: The server rejects the adapter, or lacks this API.
        """
        body = {"lora_name": name, "lora_path": str(path.resolve())}
        self._call("POST", "/v1/load_lora_adapter", body)

    def unload(self, name: str) -> None:
        """Remove an adapter that :meth:`load` registered."""
        self._call("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        try:
            answer = self._client.request(method, path, json=body)
        except httpx2.HTTPError as error:
            raise RunError(say("SERVER_UNREACHED", url=self._url, problem=str(error))) from None
        if not answer.is_success:
            text = _message(answer)[:300]
            raise RunError(
                say(
                    "SERVER_REFUSED", url=f"{self._url}{path}", status=answer.status_code, text=text
                )
            )
        is_json = answer.headers.get("content-type", "").startswith("application/json")
        return answer.json() if is_json else None


def _message(answer: httpx2.Response) -> str:
    """The message of OpenAI's error object, or the whole body if there is none."""
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer.text


def _token(name: str) -> int | str:
    """The id in vLLM's name of a token, ``token_id:17``; for any other name, the name itself."""
    found = re.fullmatch(r"token_id:(\d+)", name)
    return int(found[1]) if found else name
