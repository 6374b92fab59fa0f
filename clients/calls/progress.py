"""The progress of an answer, and the request for its rest when it is interrupted."""

from __future__ import annotations

from dataclasses import replace

from turret.clients.calls.retries import Retries
from turret.clients.errors import AnswerCutError, TurretRpcError, UnavailableError
from turret.clients.messages.results import Chunk
from turret.v1 import inference_pb2


class AnswerProgress:
    """The part of a streamed answer that has arrived.

    Args:
        request: The request. This class keeps and changes a copy.
        retries: The remaining attempts. Each new token restores all of them.
        resume: Whether an interrupted answer continues where it stopped. The server continues as if
            nothing had happened, so no text is repeated or missing. With a seed or greedily, the
            text is also the same.

    Attributes:
        is_whole: The last part has arrived; only the call's status is missing.
        cut: The last part of an answer that a stopping server ended early, unless it was continued.
    """

    def __init__(
        self, request: inference_pb2.GenerateRequest, retries: Retries, *, resume: bool
    ) -> None:
        self._request = inference_pb2.GenerateRequest()
        self._request.CopyFrom(request)
        self._retries = retries
        self._resume = resume
        self._wants_token_ids = request.options.token_ids
        self._has_begun = False
        self.is_whole = False
        self.cut: Chunk | None = None
        if resume:
            self._request.options.token_ids = True

    def request(self) -> inference_pb2.GenerateRequest:
        """The request to send, with the answer so far."""
        return self._request

    @property
    def seconds(self) -> float | None:
        """The seconds that the whole answer may take; None means no limit."""
        return self._retries.seconds

    def timeout(self) -> float | None:
        """The rest of the deadline, in seconds, for the next attempt."""
        return self._retries.timeout()

    def take(self, proto: inference_pb2.GenerateChunk) -> Chunk:
        """Record a part of the answer; returns it in the form that the caller asked for.

        Raises:
            AnswerCutError: The server is stopping; another server may continue the answer.
        """
        chunk = Chunk.from_proto(proto)
        if not self._wants_token_ids:
            chunk = replace(chunk, token_ids=())
        if proto.finish_reason == inference_pb2.GenerateResponse.CANCELLED:
            self.cut = chunk
            raise AnswerCutError.of(None)
        self._note(proto)
        self.is_whole = chunk.finish_reason is not None
        return chunk

    def delay_after(self, failure: TurretRpcError) -> float | None:
        """Seconds until the request is sent again; None if the failure is final."""
        if self._has_begun and not self._resume:
            return None
        return self._retries.delay_after(failure, is_broken=self._has_begun)

    def end_of_cut(self, failure: TurretRpcError) -> TurretRpcError:
        """The error to raise after the last part of an answer that a server ended.

        The error does not mention that no other server was reachable.
        """
        is_gone = isinstance(failure, UnavailableError)
        return AnswerCutError.of(None) if is_gone else failure

    def _note(self, proto: inference_pb2.GenerateChunk) -> None:
        request = self._request
        self.cut = None
        is_prompt = request.options.echo and not self._has_begun
        self._has_begun = True
        if is_prompt:
            # The prompt has arrived; do not echo it again.
            request.options.echo = False
            return
        # Pin the generations, so that only the same weights continue the answer.
        for member, use in zip(request.adapters, proto.adapters_used, strict=False):
            member.generation = use.generation
        if proto.text and not (proto.token_ids or request.answer_so_far):
            # A server that reports no token ids cannot resume the answer either.
            self._resume = False
        if self._resume and proto.token_ids:
            request.answer_so_far.extend(proto.token_ids)
            self._retries.renew()
