"""POST /v1/embeddings, /classify, /tokenize and /detokenize: requests about texts."""

from __future__ import annotations

import base64
import struct
from typing import Any

from turret.server.http.answers import head, uses_json
from turret.server.http.asked import chat_of, inputs_of, read_request, tools_in
from turret.server.http.endpoint import Exchange, Json
from turret.server.http.request_models import (
    ClassifyRequest,
    DetokenizeRequest,
    EmbeddingsRequest,
    TokenizeRequest,
)
from turret.v1 import inference_pb2

_Embed = inference_pb2.EmbedRequest
_POOLINGS = {"last": _Embed.LAST, "mean": _Embed.MEAN, None: _Embed.POOLING_UNSPECIFIED}
# This many numbers, or labels, take as long to serialise as one token with its logprob.
_NUMBERS_PER_TOKEN, _SCORES_PER_TOKEN = 16, 4


async def embed(exchange: Exchange) -> None:
    """Embed texts."""
    _, body, mix = read_request(exchange, EmbeddingsRequest)
    message = _Embed(
        adapters=mix,
        inputs=inputs_of(body, exchange.names),
        cache_salt=body.cache_salt,
        pooling=_POOLINGS[body.pooling],
        dimensions=body.dimensions,
    )
    if body.normalize is not None:
        message.normalize = body.normalize
    model, is_base64 = body.model, body.encoding_format == "base64"
    del body
    answer = await exchange.services.inference.embed(message, exchange.call)
    count = sum(len(each.values) for each in answer.embeddings)
    await exchange.reply.made_json(
        lambda: _embeddings(answer, model, is_base64), count // _NUMBERS_PER_TOKEN
    )


def _embeddings(answer: inference_pb2.EmbedResponse, model: str, is_base64: bool) -> dict[str, Any]:
    tokens = answer.usage.prompt_tokens
    encode = _base64 if is_base64 else _numbers
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": encode(each)}
            for index, each in enumerate(answer.embeddings)
        ],
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "adapters_used": uses_json(answer.adapters_used),
    }


def _numbers(embedding: inference_pb2.Embedding) -> list[float]:
    # Nine significant digits identify every single-precision number.
    return [float(f"{value:.9g}") for value in embedding.values]


def _base64(embedding: inference_pb2.Embedding) -> str:
    """The numbers in little-endian single precision, as base64."""
    values = embedding.values
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


async def classify(exchange: Exchange) -> None:
    """Label texts, with vLLM's fields."""
    info, body, mix = read_request(exchange, ClassifyRequest)
    message = inference_pb2.ClassifyRequest(
        adapters=mix, inputs=inputs_of(body, exchange.names), cache_salt=body.cache_salt
    )
    model = body.model
    del body
    answer = await exchange.services.inference.classify(message, exchange.call)
    begun = head(f"classify-{exchange.call.request_id}", "list", model, info)
    count = sum(len(each.scores) for each in answer.classifications)
    await exchange.reply.made_json(
        lambda: begun | _classifications(answer), count // _SCORES_PER_TOKEN
    )


def _classifications(answer: inference_pb2.ClassifyResponse) -> dict[str, Any]:
    tokens = answer.usage.prompt_tokens
    return {
        "data": [_labels(index, each) for index, each in enumerate(answer.classifications)],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "adapters_used": uses_json(answer.adapters_used),
    }


def _labels(index: int, classification: inference_pb2.Classification) -> dict[str, Any]:
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


async def tokenize(exchange: Exchange) -> Json:
    """Convert a text or a conversation to tokens, with vLLM's fields."""
    info, body, mix = read_request(exchange, TokenizeRequest)
    message = inference_pb2.TokenizeRequest(adapters=mix)
    if body.messages is None:
        message.prompt = body.prompt or ""
        message.omit_special_tokens = body.add_special_tokens is False
    else:
        message.chat.CopyFrom(chat_of(body.messages, body))
        tools_in(body, message.chat)
    wants_texts = body.return_token_strs
    answer = await exchange.services.inference.tokenize(message, exchange.call)
    return {
        "count": len(answer.token_ids),
        "max_model_len": info.max_model_len,
        "tokens": list(answer.token_ids),
        "token_strs": list(answer.token_texts) if wants_texts else None,
    }


async def detokenize(exchange: Exchange) -> Json:
    """Convert tokens to text, including special tokens."""
    _, body, mix = read_request(exchange, DetokenizeRequest)
    if not body.tokens:
        return {"prompt": ""}
    ids = inference_pb2.TokenIds(ids=body.tokens)
    message = inference_pb2.TokenizeRequest(token_ids=ids, adapters=mix)
    answer = await exchange.services.inference.tokenize(message, exchange.call)
    return {"prompt": answer.text}


async def tokenizer_info(exchange: Exchange) -> Json:
    """Get the base model's special tokens and chat template, with vLLM's fields."""
    tokenizer = exchange.services.inference.tokenizer()
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": tokenizer.default_template,
        **tokenizer.template_variables,
    }
