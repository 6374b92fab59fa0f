"""The asyncio client; its methods mirror those of ``TurretClient``.

    async with AsyncTurretClient("127.0.0.1:50051") as client:
        answer = await client.chat("How many users?", adapters=["sql"], temperature=0)
        async with client.generate_stream("Once upon a time", max_tokens=64) as stream:
            async for chunk in stream:
                print(chunk.text, end="")

Every failed call raises :class:`~turret.clients.errors.TurretRpcError`. Cancelling the task that
awaits a call stops the request on the server.
"""
# `timeout` is the call's deadline, which travels to the server; asyncio.timeout would not.
# ruff: noqa: ASYNC109

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self, Unpack

import grpc.aio

from turret.clients.aio_adapters import AsyncAdaptersClient
from turret.clients.calls.progress import AnswerProgress
from turret.clients.calls.retries import RetryPolicy
from turret.clients.calls.settings import CallSettings, stream_timeout
from turret.clients.calls.streams import AsyncGenerationStream
from turret.clients.calls.unary import call_async
from turret.clients.channel import (
    DEFAULT_ADDRESS,
    ClosedStub,
    CutCalls,
    LoopStub,
    Tls,
    open_aio_channel,
)
from turret.clients.errors import TurretRpcError
from turret.clients.messages.fields import ArgumentTypeError
from turret.clients.messages.head_results import Classifications, Embeddings
from turret.clients.messages.mix import AdaptersLike, AdapterWeight
from turret.clients.messages.requests import (
    GenerateOptions,
    Prompt,
    classify_request,
    embed_request,
    generate_request,
    score_request,
    tokenize_request,
)
from turret.clients.messages.results import (
    Completion,
    Model,
    Score,
    Tokens,
)
from turret.clients.messages.turns import MessageLike, chat_messages
from turret.v1 import inference_pb2, inference_pb2_grpc

__all__ = ["AdapterWeight", "AsyncGenerationStream", "AsyncTurretClient", "Tls", "TurretRpcError"]


class AsyncTurretClient:
    """Calls a turret server from asyncio. Arguments are those of ``TurretClient``.

    Make it where the event loop runs, and use it there: without one, or in another, it raises
    RuntimeError.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        token: str | None = None,
        tls: Tls | None = None,
        admin_address: str | None = None,
        timeout: float | None = 600.0,
        max_retries: int | RetryPolicy = 2,
        resume: bool = True,
    ) -> None:
        if not isinstance(resume, bool):
            raise ArgumentTypeError("resume", f"True or False, not {resume!r}")
        self._resume = resume
        self._settings = CallSettings.of(token, timeout, RetryPolicy.of(max_retries), tls)
        self._channel = open_aio_channel(address, tls)
        self._admin_channel = (
            self._channel
            if admin_address is None
            else open_aio_channel(admin_address, tls, "admin_address")
        )
        self._cuts = CutCalls()
        stub = inference_pb2_grpc.InferenceStub(self._channel)
        self._stub: Any = LoopStub(stub, self._cuts)
        self.adapters = AsyncAdaptersClient(self._admin_channel, self._settings, self._cuts)

    async def close(self) -> None:
        """Close the connections, as ``TurretClient.close``.

        Where a call was cut short just before, it takes up to 50 ms, so that gRPC is done with it
        before the event loop may end.
        """
        self._settings.closed.set()
        self._stub = ClosedStub()
        self.adapters.close()
        await self._channel.close()
        await self._admin_channel.close()
        await self._cuts.settle()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Completion:
        """Complete a prompt, as ``TurretClient.generate``."""
        request = generate_request(prompt, options)
        settings = self._settings.routed(request.adapters)
        answer = await call_async(self._stub.Generate, lambda: request, settings, timeout)
        return Completion.from_proto(answer)

    def generate_stream(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerationStream:
        """Complete a prompt, chunk by chunk, as ``TurretClient.generate_stream``."""
        request = generate_request(prompt, options)
        settings = self._settings.routed(request.adapters)

        def start(message: Any, seconds: float | None) -> grpc.aio.UnaryStreamCall:
            return self._stub.GenerateStream(message, timeout=seconds, metadata=settings.metadata)

        retries = settings.policy.begin(stream_timeout(timeout))
        progress = AnswerProgress(request, retries, resume=self._resume)
        return AsyncGenerationStream(start, progress, settings)

    async def chat(
        self,
        messages: str | Sequence[MessageLike],
        *,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Completion:
        """Answer a conversation, as ``TurretClient.chat``."""
        return await self.generate(chat_messages(messages), timeout=timeout, **options)

    def chat_stream(
        self,
        messages: str | Sequence[MessageLike],
        *,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerationStream:
        """As :meth:`chat`, chunk by chunk."""
        return self.generate_stream(chat_messages(messages), timeout=timeout, **options)

    async def score(
        self,
        prompt: Prompt,
        *,
        adapters: AdaptersLike = (),
        top_n: int = 0,
        request_id: str = "",
        timeout: float | None = None,
    ) -> Score:
        """Compute the log probability of every token of a prompt, as ``TurretClient.score``."""
        request = score_request(prompt, adapters=adapters, top_n=top_n, request_id=request_id)
        settings = self._settings.routed(request.adapters)
        scored = await call_async(self._stub.Score, lambda: request, settings, timeout)
        return Score.from_proto(scored)

    async def embed(
        self,
        inputs: str | Sequence[Prompt],
        *,
        adapters: AdaptersLike = (),
        pooling: str | None = None,
        normalize: bool | None = None,
        dimensions: int | None = None,
        request_id: str = "",
        timeout: float | None = None,
    ) -> Embeddings:
        """Turn each input into a vector, as ``TurretClient.embed``."""
        request = embed_request(
            inputs,
            adapters=adapters,
            pooling=pooling,
            normalize=normalize,
            dimensions=dimensions,
            request_id=request_id,
        )
        settings = self._settings.routed(request.adapters)
        found = await call_async(self._stub.Embed, lambda: request, settings, timeout)
        return Embeddings.from_proto(found)

    async def classify(
        self,
        inputs: str | Sequence[Prompt],
        *,
        adapters: AdaptersLike,
        request_id: str = "",
        timeout: float | None = None,
    ) -> Classifications:
        """Label each input by an adapter with a head, as ``TurretClient.classify``."""
        request = classify_request(inputs, adapters=adapters, request_id=request_id)
        settings = self._settings.routed(request.adapters)
        found = await call_async(self._stub.Classify, lambda: request, settings, timeout)
        return Classifications.from_proto(found)

    async def tokenize(
        self,
        prompt: Prompt,
        *,
        adapters: AdaptersLike = (),
        timeout: float | None = None,
    ) -> Tokens:
        """Convert text or a conversation to token ids, or back, as ``TurretClient.tokenize``."""
        request = tokenize_request(prompt, adapters)
        return Tokens.from_proto(await self._unary(self._stub.Tokenize, request, timeout))

    async def get_model(self, *, timeout: float | None = None) -> Model:
        """Describe the base model and the server."""
        request = inference_pb2.GetModelRequest()
        return Model.from_proto(await self._unary(self._stub.GetModel, request, timeout))

    async def _unary(self, method: Any, request: object, timeout: float | None) -> Any:
        return await call_async(method, lambda: request, self._settings, timeout)
