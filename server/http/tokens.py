"""POST /tokenize and /detokenize, with vLLM's fields."""

from __future__ import annotations

from turret.server.api.inference.inference import Inference
from turret.server.api.violations import Violations
from turret.server.http.bodies.fields import Fields, are_token_ids
from turret.server.http.bodies.messages import read_messages
from turret.server.http.bodies.model_names import mix_of
from turret.server.http.bodies.slips import refuse_if_wrong
from turret.server.http.bodies.tool_fields import read_tools
from turret.server.http.bodies.unsupported import refuse_unsupported
from turret.server.http.exchange.endpoint import Exchange
from turret.v1 import adapters_pb2, inference_pb2

NAMES = {
    "input": "prompt",
    "token_ids.ids": "tokens",
    "chat": "messages",
    "chat.messages": "messages",
    "chat.tools": "tools",
}


class Tokens:
    """Turns text into tokens and back.

    Args:
        inference: Has the tokenizer.
    """

    def __init__(self, inference: Inference) -> None:
        self._inference = inference

    async def tokenize(self, exchange: Exchange) -> None:
        """The tokens of ``prompt``, or of ``messages`` as the chat template renders them."""
        info = self._inference.model()
        violations = Violations()
        fields = Fields(exchange.take_body(), violations)
        is_chat = fields.get("messages") is not None
        refuse_unsupported(fields, is_chat=is_chat)
        message = inference_pb2.TokenizeRequest(adapters=_mix_of(fields, info.name, exchange.names))
        if is_chat:
            message.chat.CopyFrom(read_messages(fields))
            read_tools(fields, message.chat)
            if fields.get("prompt") is not None:
                fields.refuse("prompt", "send either prompt or messages")
        else:
            if fields.get("prompt") is None:
                fields.refuse("prompt", "must be set, or messages")
            message.prompt = fields.text("prompt") or ""
        wants_texts = fields.flag("return_token_strs")
        refuse_if_wrong(fields, exchange.names)
        answer = await self._inference.tokenize(message)
        await exchange.reply.json(
            {
                "count": len(answer.token_ids),
                "max_model_len": info.max_model_len,
                "tokens": list(answer.token_ids),
                "token_strs": list(answer.token_texts) if wants_texts else None,
            }
        )

    async def detokenize(self, exchange: Exchange) -> None:
        """The text of ``tokens``, special tokens included."""
        info = self._inference.model()
        violations = Violations()
        fields = Fields(exchange.take_body(), violations)
        adapters = _mix_of(fields, info.name, exchange.names)
        ids = fields.get("tokens")
        if not isinstance(ids, list) or not are_token_ids(ids):
            fields.refuse("tokens", "must be a list of token ids")
        refuse_if_wrong(fields, exchange.names)
        if not ids:
            await exchange.reply.json({"prompt": ""})
            return
        message = inference_pb2.TokenizeRequest(
            token_ids=inference_pb2.TokenIds(ids=ids), adapters=adapters
        )
        answer = await self._inference.tokenize(message)
        await exchange.reply.json({"prompt": answer.text})


def _mix_of(
    fields: Fields, base_name: str, names: dict[str, str]
) -> list[adapters_pb2.AdapterWeight]:
    """As in other requests, but without a model the tokenizer is that of the base."""
    if fields.get("model") is None and fields.get("adapters") is None:
        return []
    return mix_of(fields, base_name, names)
