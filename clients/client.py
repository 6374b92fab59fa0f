"""The client of a turret server.

    with TurretClient("127.0.0.1:50051") as client:
        client.adapters.load("sql", "sql-lora")
        answer = client.chat("How many?", adapters=["sql", ("json", -0.5)], temperature=0)
        print(answer.text)
        for chunk in client.generate_stream("Once upon a time", max_tokens=64):
            print(chunk.text, end="")

Every failed call raises :class:`~turret.clients.errors.TurretRpcError`. The methods are those of
the asyncio client, run over a blocking connection.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from turret.clients.aio import (
    AdaptersBase,
    AsyncAdaptersClient,
    AsyncTrainingClient,
    AsyncTurretClient,
    InferenceBase,
    TrainingBase,
)
from turret.clients.calls import AsyncGenerationStream, BlockingConnection, completed
from turret.clients.channel import Tls
from turret.clients.errors import TurretRpcError
from turret.clients.requests import AdapterWeight
from turret.clients.results import Chunk

__all__ = [
    "AdapterWeight",
    "AdaptersClient",
    "GenerationStream",
    "Tls",
    "TurretClient",
    "TurretRpcError",
]

_P = ParamSpec("_P")
_T = TypeVar("_T")
_Made = TypeVar("_Made")


def _then(
    finish: Callable[[_Made], _T], method: Callable[Concatenate[Any, _P], _Made]
) -> Callable[Concatenate[Any, _P], _T]:
    """The method, with ``finish`` applied to its result."""

    @functools.wraps(method)
    def run(self: Any, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return finish(method(self, *args, **kwargs))

    return run


def _blocking(
    method: Callable[Concatenate[Any, _P], Coroutine[Any, Any, _T]],
) -> Callable[Concatenate[Any, _P], _T]:
    return _then(completed, method)


def _iterated(values: AsyncIterator[_T]) -> Iterator[_T]:
    """The values of an iterator that never suspends."""
    with contextlib.suppress(StopAsyncIteration):
        while True:
            yield completed(anext(values))


class GenerationStream(Iterator[Chunk]):
    """An answer as it grows: an iterator of ``Chunk``, which ``generate_stream`` returns.

    Closing the stream, or leaving its ``with`` block, stops the request. A program that
    iterates to the end need not close it; the last chunk has a ``finish_reason``. If the request
    fails and a retry may help, the stream continues where it stopped. If a stopping server ended
    the answer and no other server continues it, the ``finish_reason`` of the last chunk is
    ``CANCELLED``, and the next iteration raises ``AnswerCutError``.
    """

    def __init__(self, stream: AsyncGenerationStream) -> None:
        self._stream = stream

    def __next__(self) -> Chunk:
        try:
            return completed(self._stream.__anext__())
        except StopAsyncIteration:
            raise StopIteration from None

    def close(self) -> None:
        """Stop the request, which ends the iteration. It may be called repeatedly, at any time."""
        completed(self._stream.aclose())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class AdaptersClient(AdaptersBase):
    """Manages a server's adapters. Use it as ``client.adapters`` of a ``TurretClient``.

    Calls go to the client's ``admin_address``. Every method raises
    :class:`~turret.clients.errors.TurretRpcError` if the server rejects the call or fails.
    ``timeout`` is a deadline in seconds.
    """

    _pages = AsyncAdaptersClient._pages
    load = _blocking(AsyncAdaptersClient.load)
    upload = _blocking(AsyncAdaptersClient.upload)
    replace = _blocking(AsyncAdaptersClient.replace)
    rollback = _blocking(AsyncAdaptersClient.rollback)
    get = _blocking(AsyncAdaptersClient.get)
    list = _then(_iterated, AsyncAdaptersClient.list)
    unload = _blocking(AsyncAdaptersClient.unload)
    pin = _blocking(AsyncAdaptersClient.pin)
    unpin = _blocking(AsyncAdaptersClient.unpin)
    set_alias = _blocking(AsyncAdaptersClient.set_alias)
    delete_alias = _blocking(AsyncAdaptersClient.delete_alias)
    list_aliases = _blocking(AsyncAdaptersClient.list_aliases)
    fuse = _blocking(AsyncAdaptersClient.fuse)
    merge = _blocking(AsyncAdaptersClient.merge)
    unmerge = _blocking(AsyncAdaptersClient.unmerge)
    get_merge_state = _blocking(AsyncAdaptersClient.get_merge_state)
    export = _blocking(AsyncAdaptersClient.export)


class TrainingClient(TrainingBase):
    """Trains adapters on a server with ``--training``; use it as ``client.training``.

    Methods and errors are those of :class:`~turret.clients.aio.AsyncTrainingClient`.
    """

    create_model = _blocking(AsyncTrainingClient.create_model)
    list_models = _blocking(AsyncTrainingClient.list_models)
    delete_model = _blocking(AsyncTrainingClient.delete_model)
    forward_backward = _blocking(AsyncTrainingClient.forward_backward)
    optim_step = _blocking(AsyncTrainingClient.optim_step)
    save_checkpoint = _blocking(AsyncTrainingClient.save_checkpoint)
    load_checkpoint = _blocking(AsyncTrainingClient.load_checkpoint)
    list_checkpoints = _blocking(AsyncTrainingClient.list_checkpoints)
    export_checkpoint = _blocking(AsyncTrainingClient.export_checkpoint)
    delete_checkpoint = _blocking(AsyncTrainingClient.delete_checkpoint)
    publish_model = _blocking(AsyncTrainingClient.publish_model)


class TurretClient(InferenceBase):
    """Calls a turret server. It is thread-safe.

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
            brings another token. If False, a stream that is interrupted after its first text raises
            an error. Unless ``max_retries`` is 0, the client waits up to a minute for a server to
            return, or until the call's deadline. With a seed or greedy decoding, the answer is the
            same as without an interruption. If the weights that the answer began with are gone,
            NotFoundError is raised.

    Every method's ``timeout`` is a deadline in seconds. ``math.inf``, or a value too large for a
    clock, means no deadline. None means the client's default; streams and exports have none.
    """

    _connection_class = BlockingConnection

    @functools.cached_property
    def adapters(self) -> AdaptersClient:
        """The client of the ``Adapters`` service."""
        return AdaptersClient(self._connection, self._settings)

    @functools.cached_property
    def training(self) -> TrainingClient:
        """The client of the ``Training`` service."""
        return TrainingClient(self._connection, self._settings)

    def close(self) -> None:
        """Close the client. Running calls raise CallCancelledError, later ones RuntimeError."""
        completed(self._close())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    generate = _blocking(AsyncTurretClient.generate)
    generate_stream = _then(GenerationStream, AsyncTurretClient.generate_stream)
    chat = _blocking(AsyncTurretClient.chat)
    chat_stream = _then(GenerationStream, AsyncTurretClient.chat_stream)
    score = _blocking(AsyncTurretClient.score)
    embed = _blocking(AsyncTurretClient.embed)
    classify = _blocking(AsyncTurretClient.classify)
    tokenize = _blocking(AsyncTurretClient.tokenize)
    get_model = _blocking(AsyncTurretClient.get_model)
