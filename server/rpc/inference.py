"""The data plane: answers Generate, GenerateStream, Score, Tokenize and GetModel."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc

import turret
from turret.server.api.answers import finish_fields, token_logprobs, usage_fields
from turret.server.api.backend import Backend
from turret.server.api.call import current_call
from turret.server.api.gate import Gate
from turret.server.api.requests import check_input, generate_request, input_token_ids, score_request
from turret.server.api.violations import Violations
from turret.server.engine.request import FinishReason, Output, Request
from turret.server.errors import DeadlineExceededError
from turret.v1 import inference_pb2, inference_pb2_grpc

_Context = grpc.aio.ServicerContext[Any, Any]


# gRPC allows a time-out of 11,000 years; no request runs for as long as this.
_MAX_DEADLINE_SECONDS = 30 * 86400.0


def _deadline(context: _Context) -> float | None:
    """The call's deadline on the ``time.monotonic()`` clock; None if there is none to speak of."""
    remaining = context.time_remaining()
    if remaining is None or remaining > _MAX_DEADLINE_SECONDS:
        return None
    return time.monotonic() + remaining


async def _outputs(
    backend: Backend, request: Request, context: _Context
) -> AsyncGenerator[Output, None]:
    """Run a request; however the call ends, the engine lets go of it.

    Raises:
        DeadlineExceededError: After the last output, if the deadline ended the request.
    """
    call = current_call()
    stream = await backend.engine.submit(request)
    # Also covers a call that dies while nobody iterates.
    context.add_done_callback(lambda _: stream.cancel())  # type: ignore[arg-type]
    try:
        async for output in stream:
            call.prompt_tokens = len(request.prompt_token_ids)
            call.generated_tokens += len(output.token_ids)
            yield output
            if output.finish is not None and output.finish.reason is FinishReason.DEADLINE:
                raise DeadlineExceededError("the deadline passed before the request finished")
    finally:
        stream.cancel()


def _echo(request: Request, backend: Backend, first: Output) -> dict[str, Any]:
    """The prompt's part of the answer; its logprobs come with the first output."""
    ids = request.prompt_token_ids
    return {
        "text": backend.tokenizer.decode(ids, special=True),
        "token_ids": ids if request.options.token_ids else (),
        "logprobs": token_logprobs(first.prompt_logprobs) if request.options.logprobs else [],
    }


def _grown(request: Request, output: Output) -> dict[str, Any]:
    return {
        "text": output.text,
        "token_ids": output.token_ids if request.options.token_ids else (),
        "logprobs": token_logprobs(output.logprobs) if request.options.logprobs else [],
    }


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Answers on behalf of the backend behind the gate."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def _generate(
        self, message: inference_pb2.GenerateRequest, context: _Context
    ) -> AsyncIterator[inference_pb2.GenerateChunk]:
        """The chunks of an answer; both Generate RPCs are made of these."""
        backend = self._gate.enter()
        call = current_call()
        request = await generate_request(
            message,
            backend.tokenizer,
            vocab_size=backend.model_info.vocab_size,
            request_id=call.request_id,
            deadline=_deadline(context),
        )
        call.rename(request.request_id)
        call.adapters = tuple(ref.name for ref in request.adapters)
        is_echo_due = request.options.echo
        async with contextlib.aclosing(_outputs(backend, request, context)) as outputs:
            async for output in outputs:
                fields = _grown(request, output)
                if is_echo_due:
                    is_echo_due = False
                    prompt = _echo(request, backend, output)
                    fields = {key: _joined(prompt[key], fields[key]) for key in fields}
                if output.finish is not None:
                    fields |= finish_fields(output.finish, request.stop.stop_token_ids)
                yield inference_pb2.GenerateChunk(request_id=request.request_id, **fields)

    def GenerateStream(
        self, request: inference_pb2.GenerateRequest, context: _Context
    ) -> AsyncIterator[inference_pb2.GenerateChunk]:
        return self._generate(request, context)

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: _Context
    ) -> inference_pb2.GenerateResponse:
        response = inference_pb2.GenerateResponse()
        texts: list[str] = []
        async for chunk in self._generate(request, context):
            texts.append(chunk.text)
            chunk.ClearField("text")
            # Both messages have the same fields under the same numbers: joining the chunks is
            # what the wire format calls a merge.
            response.MergeFromString(chunk.SerializeToString())
        response.text = "".join(texts)
        return response

    async def Score(
        self, request: inference_pb2.ScoreRequest, context: _Context
    ) -> inference_pb2.ScoreResponse:
        backend = self._gate.enter()
        call = current_call()
        asked = await score_request(
            request,
            backend.tokenizer,
            vocab_size=backend.model_info.vocab_size,
            request_id=call.request_id,
            deadline=_deadline(context),
        )
        call.rename(asked.request_id)
        call.adapters = tuple(ref.name for ref in asked.adapters)
        response = inference_pb2.ScoreResponse(request_id=asked.request_id)
        async for output in _outputs(backend, asked, context):
            response.tokens.extend(token_logprobs(output.prompt_logprobs))
            if output.finish is not None:
                response.MergeFrom(inference_pb2.ScoreResponse(**usage_fields(output.finish)))
        return response

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: _Context
    ) -> inference_pb2.TokenizeResponse:
        backend = self._gate.enter()
        violations = Violations()
        check_input(request, backend.model_info.vocab_size, violations)
        violations.raise_if_any()
        ids = await input_token_ids(request, backend.tokenizer)
        return inference_pb2.TokenizeResponse(
            token_ids=ids,
            token_texts=[backend.tokenizer.token_text(token_id) for token_id in ids],
            text=backend.tokenizer.decode(ids, special=True),
        )

    async def GetModel(
        self, request: inference_pb2.GetModelRequest, context: _Context
    ) -> inference_pb2.GetModelResponse:
        backend = self._gate.enter()
        info = backend.model_info
        return inference_pb2.GetModelResponse(
            name=info.name,
            model_type=info.model_type,
            digest=info.digest,
            dtype=info.dtype,
            quantization=info.quantization,
            vocab_size=info.vocab_size,
            max_model_len=info.max_model_len,
            num_layers=info.num_layers,
            hidden_size=info.hidden_size,
            server_version=turret.__version__,
            methods=backend.methods,
        )


def _joined(first: Any, second: Any) -> Any:
    return first + second if isinstance(first, str) else [*first, *second]
