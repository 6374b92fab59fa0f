"""The data plane over gRPC: answers, scores, vectors, labels, tokens, and what is served."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import grpc

from turret.server.api.inference.inference import Inference
from turret.server.rpc.interceptor import current_call, current_party
from turret.v1 import inference_pb2, inference_pb2_grpc

_Context = grpc.aio.ServicerContext[Any, Any]


# gRPC allows a timeout of 11,000 years; no request runs for as long as this.
_MAX_DEADLINE_SECONDS = 30 * 86400.0


def _deadline(context: _Context) -> float | None:
    """The call's deadline on the ``time.monotonic()`` clock; None for none or one too far off."""
    remaining = context.time_remaining()
    if remaining is None or remaining > _MAX_DEADLINE_SECONDS:
        return None
    return time.monotonic() + remaining


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Hands every call to ``Inference``."""

    def __init__(self, inference: Inference) -> None:
        self._inference = inference

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: _Context
    ) -> inference_pb2.GenerateResponse:
        answer = self._inference.generate_whole(request, current_call(), _deadline(context))
        # Drop our reference so that the message is freed once it is converted.
        del request
        return await answer

    def GenerateStream(
        self, request: inference_pb2.GenerateRequest, context: _Context
    ) -> AsyncIterator[inference_pb2.GenerateChunk]:
        return self._inference.generate(request, current_call(), _deadline(context))

    async def Score(
        self, request: inference_pb2.ScoreRequest, context: _Context
    ) -> inference_pb2.ScoreResponse:
        answer = self._inference.score(request, current_call(), _deadline(context))
        # Drop our reference so that the message is freed once it is converted.
        del request
        return await answer

    async def Embed(
        self, request: inference_pb2.EmbedRequest, context: _Context
    ) -> inference_pb2.EmbedResponse:
        call, party = current_call(), current_party()
        return await self._inference.embed(request, call, party, _deadline(context))

    async def Classify(
        self, request: inference_pb2.ClassifyRequest, context: _Context
    ) -> inference_pb2.ClassifyResponse:
        call, party = current_call(), current_party()
        return await self._inference.classify(request, call, party, _deadline(context))

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: _Context
    ) -> inference_pb2.TokenizeResponse:
        return await self._inference.tokenize(request)

    async def GetModel(
        self, request: inference_pb2.GetModelRequest, context: _Context
    ) -> inference_pb2.GetModelResponse:
        return self._inference.model()
