"""POST /classify, with vLLM's fields."""

from __future__ import annotations

from typing import Any

from turret.server.api.inference import Inference
from turret.server.api.violations import Violations
from turret.server.http.bodies.answer_fields import head, told_uses
from turret.server.http.bodies.fields import Fields
from turret.server.http.bodies.generation import read_deadline
from turret.server.http.bodies.model_names import mix_of
from turret.server.http.bodies.prompts import read_inputs
from turret.server.http.exchange.endpoint import Exchange
from turret.v1 import inference_pb2


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
        message = inference_pb2.ClassifyRequest(adapters=mix_of(fields, info.name))
        message.inputs.extend(read_inputs(fields, exchange.names))
        deadline = read_deadline(fields)
        model = str(fields.get("model"))
        violations.raise_if_any()
        del fields
        answer = await self._inference.classify(message, exchange.call, exchange.party, deadline)
        tokens = answer.usage.prompt_tokens
        body = head(f"classify-{exchange.call.request_id}", "list", model, info)
        body["data"] = [
            _item(index, classification)
            for index, classification in enumerate(answer.classifications)
        ]
        body["usage"] = {"prompt_tokens": tokens, "total_tokens": tokens}
        body["adapters_used"] = told_uses(answer.adapters_used)
        await exchange.reply.json(body)


def _item(index: int, classification: inference_pb2.Classification) -> dict[str, Any]:
    scores = classification.scores
    has_probabilities = all(score.HasField("probability") for score in scores)
    return {
        "index": index,
        "label": classification.label,
        "labels": [score.label for score in scores],
        # Of a head for numbers, vLLM gives the numbers here.
        "probs": [score.probability if has_probabilities else score.logit for score in scores],
        "num_classes": len(scores),
    }
