"""The progress of an answer, and the request for its rest when it is interrupted."""

from __future__ import annotations

from turret.clients.calls.retries import Retries
from turret.clients.errors import AnswerCutError, TurretRpcError, UnavailableError
from turret.clients.messages.results import Chunk
from turret.v1 import inference_pb2


class AnswerProgress:
    """The part of a streamed answer that has arrived.

    Args:
        request: What was asked. A copy is kept, and changed.
        retries: The tries that are left; all of them again after each token that comes.
        resume: Whether an answer that breaks off goes on where it broke off. The server computes it
            as if nothing had happened, so no text comes twice and none is missing; with a seed, or
            greedily, it is also the same text.

    Attributes:
        is_whole: The last part has come; only the call's status is missing.
        cut: The last part of an answer that a server ended before its end, if none has gone on.
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
        """The deadline of the whole answer; None means none."""
        return self._retries.seconds

    def timeout(self) -> float | None:
        """The rest of the deadline, in seconds, for the next attempt."""
        return self._retries.timeout()

    def take(self, proto: inference_pb2.GenerateChunk) -> Chunk:
        """Record a part of the answer; returns it in the form that the caller asked for.

        Raises:
            AnswerCutError: It says that the server ends the request; another may go on.
        """
        chunk = Chunk.from_proto(proto)
        if not self._wants_token_ids:
            chunk = chunk.without_token_ids()
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

        That no other was there to go on is no news beside that.
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
