"""The Inference service, independent of the protocol: it takes and returns messages.

It raises TurretErrors. The code of a protocol (gRPC or HTTP) parses its input into a message,
begins a ``Call`` and iterates over the result. That code does not have to count requests, or to
cancel those whose caller has gone.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

import turret
from turret.server.api.call import Call
from turret.server.api.gate import ServingGate
from turret.server.api.inference_answers import (
    JoinedChunks,
    adapter_uses,
    converted,
    finish_fields,
    outputs_of,
    token_logprobs,
    usage_fields,
)
from turret.server.api.inference_requests import (
    check_input,
    check_length,
    format_of,
    generate_request,
    input_token_ids,
    score_request,
)
from turret.server.api.inputs import classify, embed
from turret.server.api.limits import MAX_STREAMED_NUMBERS, InputLimits
from turret.server.api.violations import Violations, adapter_refs, message_of
from turret.server.engine.scheduling.request import Output, Request
from turret.server.models.chat_template import ChatFormat
from turret.server.tracing import CHAT
from turret.v1 import adapters_pb2, inference_pb2

if TYPE_CHECKING:
    from turret.server.models.tokenizer import Tokenizer


class Inference:
    """Answers on behalf of the backend behind the gate.

    Every method raises UnavailableError while the gate is closed, and InvalidRequestError, which
    lists all invalid fields of a message. Other errors are those of ``Engine.submit``.
    """

    def __init__(self, gate: ServingGate) -> None:
        self._gate = gate

    async def chat_format(
        self,
        adapters: Sequence[adapters_pb2.AdapterWeight],
        chat: inference_pb2.Chat,
        call: Call,
    ) -> ChatFormat:
        """The format of answers to a conversation with these adapters; see ``format_of``."""
        backend = self._gate.enter()
        vocabulary = await backend.vocabularies.of(
            adapters, chat.chat_template, draw=call.draw, tenant=call.tenant
        )
        limits = InputLimits.of(backend, vocabulary)
        return await format_of(chat, vocabulary.tokenizer, limits, call.tenant)

    async def generate(
        self,
        message: inference_pb2.GenerateRequest,
        call: Call,
        *,
        is_whole: bool = False,
    ) -> AsyncGenerator[inference_pb2.GenerateChunk, None]:
        """The answer, chunk by chunk; the last one carries ``finish_reason``.

        Close the generator if you leave it early, or cancel the task that iterates over it.
        Set ``is_whole`` if the chunks are collected (see ``outputs_of``).

        Raises:
            DeadlineExceededError: After the last chunk, if the deadline ended the request.
        """
        backend = self._gate.enter()
        call.about(message.adapters)
        if call.trace is not None and message.HasField("chat"):
            call.trace.operation = CHAT
        # A call may begin 64 answers, and thousands of calls may arrive at once.
        await backend.turns.wait(call.turn)
        vocabulary = await backend.vocabularies.of(
            message.adapters, message.chat.chat_template, draw=call.draw, tenant=call.tenant
        )
        limits = InputLimits.of(backend, vocabulary)
        request = await generate_request(message, vocabulary, limits, call)
        counts = message.options.running_usage and not is_whole
        # Drop the last reference, so that the message is freed while the request waits and runs.
        del message
        is_echoed = not request.options.echo
        # Log probabilities of the prompt may wait for the client after the request has ended.
        is_whole = is_whole or request.wants_prompt_logprobs
        outputs = outputs_of(backend, request, call, is_whole=is_whole)
        num_tokens = 0
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                if not is_echoed:
                    is_echoed = True
                    size = len(request.prompt_token_ids) * (1 + request.options.top_n)
                    prompt = functools.partial(_prompt_chunk, request, output, vocabulary.tokenizer)
                    yield await converted(call.tenant, size, prompt)
                chunk = _chunk(request, output)
                if counts and output.finish is None:
                    num_tokens += len(output.token_ids)
                    chunk.usage.prompt_tokens = len(request.prompt_token_ids)
                    chunk.usage.completion_tokens = num_tokens
                yield chunk

    async def generate_whole(
        self, message: inference_pb2.GenerateRequest, call: Call
    ) -> inference_pb2.GenerateResponse:
        """The chunks of ``generate`` in one message."""
        whole = JoinedChunks()
        answer = self.generate(message, call, is_whole=True)
        del message
        async with contextlib.aclosing(answer) as chunks:
            async for chunk in chunks:
                whole.add(chunk)
        return whole.response()

    async def score(
        self, message: inference_pb2.ScoreRequest, call: Call
    ) -> inference_pb2.ScoreResponse:
        """The logprobs of a prompt.

        Raises:
            DeadlineExceededError: The deadline passed first.
        """
        backend = self._gate.enter()
        call.about(message.adapters)
        vocabulary = await backend.vocabularies.of(
            message.adapters, message.chat.chat_template, draw=call.draw, tenant=call.tenant
        )
        limits = InputLimits.of(backend, vocabulary)
        request = await score_request(message, vocabulary, limits, call)
        del message
        response = inference_pb2.ScoreResponse(request_id=request.request_id)
        outputs = outputs_of(backend, request, call, is_whole=True)
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                size = len(output.prompt_logprobs) * (1 + request.options.top_n)
                add = functools.partial(_add_scores, response, output)
                await converted(call.tenant, size, add)
        return response

    async def embed(
        self, message: inference_pb2.EmbedRequest, call: Call
    ) -> inference_pb2.EmbedResponse:
        """A vector for each input. Each input counts as a request of the call's party.

        Raises:
            DeadlineExceededError: The deadline passed first.
            QueueFullError: The party has reached its limit of requests.
        """
        return await embed(message, self._gate.enter(), call)

    async def embed_stream(
        self, message: inference_pb2.EmbedRequest, call: Call
    ) -> AsyncIterator[inference_pb2.EmbedResponse]:
        """The vectors in several messages, of which the last also has the other fields."""
        answer = await self.embed(message, call)
        at_once = max(MAX_STREAMED_NUMBERS // len(answer.embeddings[0].values), 1)
        while len(answer.embeddings) > at_once:
            yield inference_pb2.EmbedResponse(embeddings=answer.embeddings[:at_once])
            del answer.embeddings[:at_once]
        yield answer

    async def classify(
        self, message: inference_pb2.ClassifyRequest, call: Call
    ) -> inference_pb2.ClassifyResponse:
        """Labels for each input; errors are those of ``embed``."""
        return await classify(message, self._gate.enter(), call)

    async def tokenize(
        self, message: inference_pb2.TokenizeRequest, call: Call
    ) -> inference_pb2.TokenizeResponse:
        """The tokens of a prompt, a chat or token ids, and their text."""
        backend = self._gate.enter()
        vocabulary = await backend.vocabularies.of(
            message.adapters, message.chat.chat_template, draw=call.draw, tenant=call.tenant
        )
        tokenizer = vocabulary.tokenizer
        violations = Violations()
        limits = InputLimits.of(backend, vocabulary).for_tokenize()
        check_input(message, limits, violations)
        refs = adapter_refs(message.adapters, violations, call.draw)
        violations.raise_if_any()
        if refs:
            # No step uses these adapters, but they must exist.
            backend.registry.release(backend.registry.acquire(refs))
        adds_special = not message.omit_special_tokens
        ids = await input_token_ids(
            message, tokenizer, limits, call.tenant, adds_special=adds_special
        )
        check_length(len(ids), limits.max_tokens, "tokens")
        return await converted(
            call.tenant,
            len(ids),
            lambda: inference_pb2.TokenizeResponse(
                token_ids=ids,
                token_texts=[tokenizer.token_text(token_id) for token_id in ids],
                text=tokenizer.decode(ids, special=True),
            ),
        )

    def tokenizer(self) -> Tokenizer:
        """The base model's tokenizer."""
        return self._gate.enter().tokenizer

    def model(self) -> inference_pb2.GetModelResponse:
        """The base model, this build, and the adapter methods that it can load."""
        backend = self._gate.enter()
        return message_of(
            inference_pb2.GetModelResponse,
            backend.model_info,
            server_version=turret.__version__,
            methods=backend.methods,
        )


def _prompt_chunk(
    request: Request, first: Output, tokenizer: Tokenizer
) -> inference_pb2.GenerateChunk:
    """The echoed prompt, if requested; its log probabilities come with the first output."""
    options, ids = request.options, request.prompt_token_ids
    return inference_pb2.GenerateChunk(
        request_id=request.request_id,
        text=tokenizer.decode(ids, special=True),
        token_ids=ids if options.token_ids else (),
        logprobs=token_logprobs(first.prompt_logprobs) if options.logprobs else [],
    )


def _chunk(request: Request, output: Output) -> inference_pb2.GenerateChunk:
    """One part of an answer."""
    options = request.options
    fields: dict[str, Any] = {}
    if output.finish is not None:
        fields = finish_fields(output.finish, request.stop.stop_token_ids)
    elif output.adapters_used:
        fields["adapters_used"] = adapter_uses(output.adapters_used)
    return inference_pb2.GenerateChunk(
        request_id=request.request_id,
        text=output.text,
        token_ids=output.token_ids if options.token_ids else (),
        logprobs=token_logprobs(output.logprobs) if options.logprobs else [],
        **fields,
    )


def _add_scores(response: inference_pb2.ScoreResponse, output: Output) -> None:
    response.tokens.extend(token_logprobs(output.prompt_logprobs))
    if output.finish is not None:
        response.MergeFrom(inference_pb2.ScoreResponse(**usage_fields(output.finish)))
