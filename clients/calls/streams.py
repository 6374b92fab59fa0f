# Made from clients/calls/aio_streams.py by `make client`; edit that file instead.
"""An answer as it grows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Self

import grpc

from turret.clients.calls.blocking import Flag, StreamClosedError, waiting
from turret.clients.calls.progress import AnswerProgress
from turret.clients.calls.settings import CallSettings, closed_under_a_call
from turret.clients.errors import TurretRpcError, UnavailableError
from turret.clients.messages.results import Chunk


class GenerationStream(Iterator[Chunk]):
    """An answer as it grows: an iterator of ``Chunk``, which ``generate_stream`` returns.

    Closing the stream, or leaving its ``with`` block, stops the request. A program that
    iterates to the end need not close it; the last chunk has a ``finish_reason``. If the request
    fails and a retry may help, the stream continues where it stopped. If a stopping server ended
    the answer and no other server continues it, the ``finish_reason`` of the last chunk is
    ``CANCELLED``, and the next iteration raises ``AnswerCutError``.
    """

    def __init__(
        self,
        start: Callable[[Any, float | None], Any],
        progress: AnswerProgress,
        settings: CallSettings,
    ) -> None:
        """Send the request.

        Args:
            start: Sends a request with the rest of its deadline in seconds. Returns its responses,
                which are also a ``grpc.Call``.
            progress: The part of the answer that has arrived.
            settings: The settings of the call.
        """
        self._start = start
        self._progress = progress
        self._settings = settings
        self._closed = Flag()
        self._waiting = waiting(settings, self._closed)
        self._cut_by: TurretRpcError | None = None
        self._call = start(progress.request(), progress.timeout())
        self._responses = iter(self._call)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        while True:
            if self._cut_by is not None:
                failure, self._cut_by = self._cut_by, None
                raise failure
            if self._closed.is_set():
                raise StopIteration
            try:
                with self._waiting:
                    chunk = next(self._responses)
                return self._progress.take(chunk)
            except StreamClosedError:
                raise StopIteration from None
            except grpc.RpcError as error:
                failure = self._settings.failure(error, self._progress.seconds)
            except UnavailableError as error:
                failure = error
            if self._progress.is_whole and isinstance(failure, UnavailableError):
                raise StopIteration
            delay = self._progress.delay_after(failure)
            if delay is None:
                self.close()
                if self._progress.cut is None:
                    raise failure
                self._cut_by = self._progress.end_of_cut(failure)
                return self._progress.cut
            self._restart(delay)

    def _restart(self, delay: float) -> None:
        if not self._closed.wait(delay):
            if self._settings.closed.is_set():
                raise closed_under_a_call()
            self._call = self._start(self._progress.request(), self._progress.timeout())
            self._responses = iter(self._call)
            if self._closed.is_set():
                self._call.cancel()

    def close(self) -> None:
        """Stop the request, which ends the iteration. It may be called repeatedly, at any time."""
        self._closed.set()
        self._cut_by = None
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
