"""The status of a server that ends an asyncio call before it has received all messages."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import grpc
import grpc.aio

# gRPC's message for a request that it could not send.
_NOT_SENT = "Internal error from Core"
# Limit for the server's status, which explains the failure and arrives within milliseconds.
_STATUS_SECONDS = 2.0


async def answer_of(call: grpc.aio.StreamUnaryCall[Any, Any]) -> Any:
    """Await the response to a stream of messages.

    If the server rejects the call before it has received all messages, gRPC's asyncio client fails
    to send the next one, and may replace the server's status with an INTERNAL of its own
    (https://github.com/grpc/grpc/issues/36066). This function raises the server's status.

    Raises:
        grpc.aio.AioRpcError: The call failed.
    """
    told: asyncio.Future[grpc.aio.AioRpcError] = asyncio.get_running_loop().create_future()

    # gRPC calls this for each status that the call receives, not only for the last one.
    def note(ended: grpc.aio.Call) -> None:
        error = _error_of(ended)
        if not _is_own(error) and not told.done():
            told.set_result(error)

    call.add_done_callback(note)
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        if _is_own(error):
            await asyncio.wait({told}, timeout=_STATUS_SECONDS)
            if told.done():
                raise told.result() from None
        raise


def _is_own(error: grpc.aio.AioRpcError) -> bool:
    return error.code() is grpc.StatusCode.INTERNAL and error.details() == _NOT_SENT


def _error_of(ended: grpc.aio.Call) -> grpc.aio.AioRpcError:
    """The error of a call as it is now; gRPC may replace it a moment later."""
    return grpc.aio.AioRpcError(
        _now(ended.code()),
        _now(ended.initial_metadata()),
        _now(ended.trailing_metadata()),
        details=_now(ended.details()),
    )


def _now(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    coroutine.close()
    raise RuntimeError("the call has not ended")
