"""Calls with one response, tried again where that may help."""
# `timeout` is the call's deadline, which travels to the server; asyncio.timeout would not.
# ruff: noqa: ASYNC109

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from turret.clients.channel import CallSettings
from turret.clients.errors import TurretRpcError


def call(
    method: Callable[..., Any],
    make_request: Callable[[], object],
    settings: CallSettings,
    timeout: float | None,
    *,
    repeatable: bool = True,
) -> Any:
    """Call a synchronous stub's method.

    Args:
        method: Of a stub, with one response.
        make_request: Makes the message, or the iterator of messages, of each try.
        settings: What every call of the client carries.
        timeout: Deadline in seconds of all tries together; None means the client's.
        repeatable: Whether a second execution of the call does no harm.

    Raises:
        TurretRpcError: The last try failed.
    """
    retries = settings.policy.begin(settings.unary_timeout(timeout), repeatable=repeatable)
    while True:
        try:
            return method(make_request(), timeout=retries.timeout(), metadata=settings.metadata)
        except grpc.RpcError as error:
            failure = TurretRpcError.from_grpc(error)
        delay = retries.delay_after(failure)
        if delay is None:
            raise failure
        time.sleep(delay)


async def call_async(
    method: Callable[..., Awaitable[Any]],
    make_request: Callable[[], object],
    settings: CallSettings,
    timeout: float | None,
    *,
    repeatable: bool = True,
) -> Any:
    """As :func:`call`, of an asyncio stub's method."""
    retries = settings.policy.begin(settings.unary_timeout(timeout), repeatable=repeatable)
    while True:
        try:
            return await method(
                make_request(), timeout=retries.timeout(), metadata=settings.metadata
            )
        except grpc.aio.AioRpcError as error:
            failure = TurretRpcError.from_grpc(error)
        delay = retries.delay_after(failure)
        if delay is None:
            raise failure
        await asyncio.sleep(delay)
