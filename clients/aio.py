"""The client of a turret server.

    async with AsyncTurretClient("127.0.0.1:50051") as client:
        await client.adapters.load("sql", "sql-lora")
        answer = await client.chat("How many?", adapters=["sql", ("json", -0.5)], temperature=0)
        print(answer.text)
        async for chunk in client.generate_stream("Once upon a time", max_tokens=64):
            print(chunk.text, end="")

Every failed call raises :class:`~turret.clients.errors.TurretRpcError`.
"""
# `timeout` is the call's deadline, which travels to the server; asyncio.timeout would not.
# ruff: noqa: ASYNC109

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self, Unpack

from turret.clients.aio_adapters import AsyncAdaptersClient
from turret.clients.calls.aio import Connection
from turret.clients.calls.aio_streams import AsyncGenerationStream
from turret.clients.calls.aio_unary import call_async
from turret.clients.calls.progress import AnswerProgress
from turret.clients.calls.retries import RetryPolicy
from turret.clients.calls.settings import CallSettings, stream_timeout
from turret.clients.channel import DEFAULT_ADDRESS, Tls
from turret.clients.errors import TurretRpcError
from turret.clients.messages.fields import ArgumentTypeError
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
    Classifications,
    Completion,
    Embeddings,
    Model,
    Score,
    Tokens,
)
from turret.clients.messages.turns import MessageLike, chat_messages
from turret.clients.words import say
from turret.v1 import inference_pb2

__all__ = ["AdapterWeight", "AsyncGenerationStream", "AsyncTurretClient", "Tls", "TurretRpcError"]


class AsyncTurretClient:
    """Calls a turret server.

    Args:
        address: ``HOST:PORT`` of the server, or ``unix:PATH``.
        token: Bearer token, without the word "Bearer", sent with every call. Without ``tls`` it is
            sent in plain text.
        tls: How to verify the server; None means a connection without TLS.
        admin_address: Address of the ``Adapters`` service; None means ``address``.
        timeout: Default deadline in seconds for calls with a single response; None means no
            deadline. Streams have a deadline only if the call sets one.
        max_retries: How often a call is repeated if the server asks for a retry, if no server can
            be reached, or if a stopping server cuts its answer. The client waits 0.5 s, 1 s and so
            on, or as long as the server asks.
        resume: Whether an interrupted stream continues where it stopped, as long as each attempt
            brings another token. If False, a stream that is interrupted after its first text
            raises. Unless ``max_retries`` is 0, the client waits up to a minute for a server to
            return, or until the call's deadline. With a seed or greedily, the answer is the same
            as without an interruption. If the weights that it began with are gone, NotFoundError
            is raised.

    Every method's ``timeout`` is a deadline in seconds. ``math.inf``, or a value too large for a
    clock, means no deadline. None means the client's default; streams and exports have none.

    Create and use an asyncio client in one running event loop; elsewhere it raises RuntimeError.
    Cancelling the task that awaits a call stops the request on the server. A synchronous client is
    thread-safe.
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
            raise ArgumentTypeError("resume", say("NOT_TRUE_OR_FALSE", value=repr(resume)))
        self._resume = resume
        self._settings = CallSettings.of(token, timeout, RetryPolicy.of(max_retries), tls)
        self._connection = Connection(address, admin_address, tls)
        self.adapters = AsyncAdaptersClient(self._connection, self._settings)

    async def close(self) -> None:
        """Close the client. Running calls raise CallCancelledError, later ones RuntimeError."""
        self._settings.closed.set()
        await self._connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Completion:
        """Complete a prompt.

        Args:
            prompt: Text, used as it is; token ids; or the turns of a conversation.
            timeout: Deadline in seconds.
            **options: See :class:`~turret.clients.messages.requests.GenerateOptions`.

        Raises:
            AnswerCutError: The server stopped during the call, and no other server completed the
                answer. The error contains the partial answer.
            TurretRpcError: The server rejected the call or failed.
            TypeError: An option is unknown or has the wrong type.
            ValueError: A value does not fit its field.
        """
        request = generate_request(prompt, options)
        settings = self._settings.routed(request.adapters)
        answer = await call_async(
            self._connection.inference.Generate, lambda: request, settings, timeout
        )
        return Completion.from_proto(answer)

    def generate_stream(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerationStream:
        """Complete a prompt, chunk by chunk. The request starts at once.

        Arguments and errors are those of :meth:`generate`. If the server rejects the request, the
        first iteration raises; ``AnswerCutError`` is raised after the last chunk.
        """
        request = generate_request(prompt, options)
        settings = self._settings.routed(request.adapters)

        def start(message: Any, seconds: float | None) -> Any:
            return self._connection.inference.GenerateStream(
                message, timeout=seconds, metadata=settings.metadata
            )

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
        """Answer a conversation, or a user's single message, through the chat template.

        Other arguments and errors are those of :meth:`generate`.
        """
        return await self.generate(chat_messages(messages), timeout=timeout, **options)

    def chat_stream(
        self,
        messages: str | Sequence[MessageLike],
        *,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerationStream:
        """Answer as :meth:`chat` does, chunk by chunk."""
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
        """Compute the log probability of every token of a prompt.

        Args:
            prompt: As in :meth:`generate`.
            adapters: The mix; empty means the base model.
            top_n: How many of the likeliest tokens are reported for each position.
            request_id: Identifies the request in the server's log.
            timeout: Deadline in seconds.
        """
        request = score_request(prompt, adapters=adapters, top_n=top_n, request_id=request_id)
        settings = self._settings.routed(request.adapters)
        scored = await call_async(
            self._connection.inference.Score, lambda: request, settings, timeout
        )
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
        """Turn each input into a vector.

        Args:
            inputs: A text, or a list of prompts as in :meth:`generate`.
            adapters: The mix; empty means the base model.
            pooling: ``last`` (the final state of the last token, the server's default) or ``mean``.
            normalize: Whether each vector has length 1; None means yes.
            dimensions: How many of the first numbers of each vector are kept; None means all.
            request_id: Identifies the request in the server's log.
            timeout: Deadline in seconds.
        """
        request = embed_request(
            inputs,
            adapters=adapters,
            pooling=pooling,
            normalize=normalize,
            dimensions=dimensions,
            request_id=request_id,
        )
        settings = self._settings.routed(request.adapters)
        found = await call_async(
            self._connection.inference.Embed, lambda: request, settings, timeout
        )
        return Embeddings.from_proto(found)

    async def classify(
        self,
        inputs: str | Sequence[Prompt],
        *,
        adapters: AdaptersLike,
        request_id: str = "",
        timeout: float | None = None,
    ) -> Classifications:
        """Label each input with an adapter that has a classification head.

        Args:
            inputs: A text, or a list of prompts as in :meth:`generate`.
            adapters: The mix; exactly one member must have a head.
            request_id: Identifies the request in the server's log.
            timeout: Deadline in seconds.
        """
        request = classify_request(inputs, adapters=adapters, request_id=request_id)
        settings = self._settings.routed(request.adapters)
        found = await call_async(
            self._connection.inference.Classify, lambda: request, settings, timeout
        )
        return Classifications.from_proto(found)

    async def tokenize(
        self,
        prompt: Prompt,
        *,
        adapters: AdaptersLike = (),
        timeout: float | None = None,
    ) -> Tokens:
        """Convert text or a conversation to token ids, or token ids to text.

        Args:
            prompt: As in :meth:`generate`.
            adapters: The mix, one of whose adapters may have its own tokenizer.
            timeout: Deadline in seconds.
        """
        request = tokenize_request(prompt, adapters)
        return Tokens.from_proto(await self._unary("Tokenize", request, timeout))

    async def get_model(self, *, timeout: float | None = None) -> Model:
        """Describe the base model and the server."""
        request = inference_pb2.GetModelRequest()
        return Model.from_proto(await self._unary("GetModel", request, timeout))

    async def _on_mix(self, name: str, request: Any, timeout: float | None) -> Any:
        settings = self._settings.routed(request.adapters)
        return await self._unary(name, request, timeout, settings)

    async def _unary(
        self,
        name: str,
        request: object,
        timeout: float | None,
        settings: CallSettings | None = None,
    ) -> Any:
        method = getattr(self._connection.inference, name)
        return await call_async(method, lambda: request, settings or self._settings, timeout)
