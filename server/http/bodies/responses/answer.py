"""The object that answers /v1/responses."""

from __future__ import annotations

import time
from typing import Any

from turret.server.http.bodies.answer_fields import Ended, adapters_of, chat_logprobs, usage_of
from turret.server.http.bodies.generation import Asked
from turret.server.http.bodies.responses.fields import Sent
from turret.server.http.bodies.responses.items import Event, Items
from turret.v1 import inference_pb2


class Response:
    """The object that answers, in each of its states.

    Args:
        request_id: Of the call; the answer's id is made of it.
        asked: What was asked for.
        sent: What is repeated.
    """

    def __init__(self, request_id: str, asked: Asked, sent: Sent) -> None:
        self._id = f"resp_{request_id}"
        self._asked = asked
        self._sent = sent
        self._created = int(time.time())

    def begun(self) -> dict[str, Any]:
        """The answer before its first token."""
        sent = self._sent
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": None,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": sent.instructions,
            "max_output_tokens": sent.max_output_tokens,
            "max_tool_calls": None,
            "model": self._asked.model,
            "output": [],
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "text": {"format": sent.text_format},
            "truncation": "disabled",
            "usage": None,
            "metadata": sent.metadata,
            **sent.echoed,
        }

    def ended(self, answer: Ended, items: Items) -> tuple[list[Event], dict[str, Any]]:
        """The last events of the items, and the answer as a whole.

        One that was cut at its limit is incomplete, as is the item that was cut.
        """
        is_cut = answer.finish_reason == inference_pb2.GenerateResponse.LENGTH
        status = "incomplete" if is_cut else "completed"
        events = items.finish(status)
        used = usage_of([answer], 1)
        whole = self.begun() | {
            "status": status,
            "completed_at": int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": items.output,
            "usage": {
                "input_tokens": used["prompt_tokens"],
                "input_tokens_details": used["prompt_tokens_details"],
                "output_tokens": used["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": used["total_tokens"],
            },
            "adapters_used": adapters_of([answer]),
        }
        return events, whole

    def failed(self, message: str, status: int) -> dict[str, Any]:
        """The response after an error."""
        code = "rate_limit_exceeded" if status == 429 else "server_error"
        error = {"code": code, "message": message}
        return self.begun() | {"status": "failed", "error": error}

    def logprobs_of(self, answer: Ended) -> list[dict[str, Any]]:
        """The log probabilities of an answer or of a part of it, if the client asked for them."""
        if not self._sent.has_logprobs:
            return []
        # In the Responses API ``bytes`` is always a list.
        found = chat_logprobs(answer.logprobs)["content"]
        for token in found:
            for one in (token, *token["top_logprobs"]):
                one["bytes"] = one["bytes"] or []
        return found
