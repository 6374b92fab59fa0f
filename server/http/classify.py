"""POST /classify, with vLLM's fields."""

from __future__ import annotations

from typing import Any

from turret.server.api.inference.inference import Inference
from turret.server.api.violations import Violations
from turret.server.http.bodies.answer_fields import head, told_uses
from turret.server.http.bodies.fields import Fields
from turret.server.http.bodies.generation import read_deadline
from turret.server.http.bodies.model_names import mix_of
from turret.server.http.bodies.prompts import read_inputs
from turret.server.http.bodies.slips import refuse_if_wrong
from turret.server.http.exchange.endpoint import Exchange
from turret.v1 import inference_pb2

# Serialising more labels than this takes over a millisecond.
_INLINE_SCORES = 512


class Classify:
    """Labels texts.

    Args:
        inference: What answers.
    """

    def __init__(self, inference: Inference) -> None:
        self._inference = inference

    async def __call__(self, exchange: Exchange) -> None:
        info = self._inference.model()
        violations = Violations()
        fields = Fields(exchange.take_body(), violations)
        message = inference_pb2.ClassifyRequest(adapters=mix_of(fields, info.name, exchange.names))
        exchange.call.about(message.adapters)
        message.inputs.extend(read_inputs(fields, exchange.names))
        message.cache_salt = fields.text("cache_salt") or ""
        deadline = read_deadline(fields)
        model = str(fields.get("model"))
        refuse_if_wrong(fields, exchange.names)
        del fields
        answer = await self._inference.classify(message, exchange.call, exchange.party, deadline)
        begun = head(f"classify-{exchange.call.request_id}", "list", model, info)
        count = sum(len(each.scores) for each in answer.classifications)
        is_long = count > _INLINE_SCORES
        await exchange.reply.made_json(lambda: begun | _body(answer), is_long=is_long)


def _body(answer: inference_pb2.ClassifyResponse) -> dict[str, Any]:
    tokens = answer.usage.prompt_tokens
    return {
        "data": [_item(index, each) for index, each in enumerate(answer.classifications)],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "adapters_used": told_uses(answer.adapters_used),
    }


def _item(index: int, classification: inference_pb2.Classification) -> dict[str, Any]:
    scores = classification.scores
    has_probabilities = all(score.HasField("probability") for score in scores)
    return {
        "index": index,
        "label": classification.label,
        "labels": [score.label for score in scores],
        # Regression heads have no probabilities; vLLM returns their numbers here.
        "probs": [score.probability if has_probabilities else score.logit for score in scores],
        "num_classes": len(scores),
    }
