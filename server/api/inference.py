"""The Inference service, independent of the protocol: it takes and returns messages.

It raises TurretErrors. The code of a protocol (gRPC or HTTP) parses its input into a message,
begins a ``Call`` and iterates over the result. That code does not have to count requests, or to
cancel those whose caller has gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import time
from array import array
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import turret
from turret.server.adapters.adapter import REGRESSION, SINGLE_LABEL, Head
from turret.server.api.call import Call
from turret.server.api.gate import Backend, ServingGate
from turret.server.api.inference_requests import (
    check_input,
    check_length,
    format_of,
    generate_request,
    input_token_ids,
    score_request,
    shared_fields,
)
from turret.server.api.limits import (
    MAX_EMBEDDING_NUMBERS,
    MAX_INPUTS,
    MAX_LABEL_SCORES,
    MAX_STREAMED_NUMBERS,
    InputLimits,
)
from turret.server.api.violations import Violations, adapter_refs, message_of
from turret.server.basics.turns import FairPool
from turret.server.engine.scheduling.request import (
    AdapterUse,
    Finish,
    FinishReason,
    Output,
    Pooling,
    PoolingKind,
    Request,
    Timing,
    TokenLogprob,
)
from turret.server.errors import (
    BudgetExceededError,
    DeadlineExceededError,
    InvalidRequestError,
    UnavailableError,
)
from turret.server.models.chat_template import ChatFormat
from turret.server.tracing import CHAT
from turret.server.words import say
from turret.v1 import adapters_pb2, inference_pb2

if TYPE_CHECKING:
    from turret.server.api.vocabularies import Vocabulary
    from turret.server.models.tokenizer import Tokenizer


# The engine's outputs for a request, counted for its call.


async def outputs_of(
    backend: Backend, request: Request, call: Call, *, is_whole: bool = False
) -> AsyncGenerator[Output, None]:
    """Run a request on behalf of a call; however the call ends, the engine drops the request.

    Args:
        backend: The backend that runs the request.
        request: The request to run.
        call: The call on whose behalf it runs.
        is_whole: Whether the call collects the answer; see ``keep``.

    Raises:
        BudgetExceededError: See ``keep``.
        DeadlineExceededError: After the last output, if the deadline ended the request.
    """
    call.rename(request.request_id)
    call.runs_on(request.adapters, backend.registry.find)
    trace, submitted = call.trace, 0
    if trace is not None:
        submitted = trace.submitted(request, backend.model_info.name, is_stream=not is_whole)
    stream = await backend.engine.submit(request)
    # Also cancel the stream if the call dies while nobody iterates over it.
    call.at_end(stream.cancel)
    is_counted = False
    try:
        async for output in stream:
            # A call may consist of several requests, so add to its counts.
            if not is_counted:
                call.prompt_tokens += len(request.prompt_token_ids)
                is_counted = True
            call.generated_tokens += len(output.token_ids)
            if trace is not None:
                trace.output(output, submitted)
            if is_whole:
                keep(backend, call, output.answer_bytes)
            yield output
            if output.finish is not None and output.finish.reason is FinishReason.DEADLINE:
                raise DeadlineExceededError(say("DEADLINE_EXCEEDED"))
    finally:
        stream.cancel()


def keep(backend: Backend, call: Call, num_bytes: int) -> None:
    """Count memory of answers that a call collects, until it ends.

    The memory is limited because a client may take any time to read its answer.

    Raises:
        BudgetExceededError: The call has collected more than ``--max-queued-bytes``, or the
            requests and answers of its token take more than ``most_of_answers``.
    """
    if not num_bytes:
        return
    memory, tenant = backend.engine.memory, call.tenant

    def release() -> None:
        memory.hold(-call.kept_bytes, tenant)

    if not call.kept_bytes:
        call.at_end(release)
    call.kept_bytes += num_bytes
    memory.hold(num_bytes, tenant)
    most = memory.most_of_answers(tenant)
    if call.kept_bytes > most:
        text = say("ANSWERS_NEED_MEMORY", bytes=call.kept_bytes, max_queued_bytes=most)
        raise BudgetExceededError(text)
    held = memory.held_of(tenant)
    if held > most:
        text = say("QUEUE_MEMORY_SHARE_FULL", held=held - num_bytes, max_queued_bytes=most)
        raise BudgetExceededError(text)


# Concurrent execution of the parts of one call.

_T = TypeVar("_T")
# Converting more tokens than this takes over a millisecond.
_INLINE_TOKENS = 128
# Large answers share one thread, in turn. Several threads would contend with the event loop and the
# engine for the interpreter's lock.
_converting = FairPool(ThreadPoolExecutor(1, "turret-answer"))


async def converted(tenant: bytes, size: int, convert: Callable[[], _T]) -> _T:
    """The result of ``convert``, which runs off the event loop for more than a few tokens.

    Args:
        tenant: The tenant, at whose turn a large answer is converted.
        size: Number of tokens, including alternatives.
        convert: Converts them.
    """
    if size <= _INLINE_TOKENS:
        return convert()
    return await _converting.run(tenant, convert)


async def together(work: Sequence[Coroutine[Any, Any, _T]], at_a_time: int) -> list[_T]:
    """The results in order, with at most ``at_a_time`` coroutines running.

    If one of them fails, its error is raised once all others are cancelled and have ended.
    """
    results: dict[int, _T] = {}
    waiting = iter(enumerate(work))

    async def run_some() -> None:
        for index, one in waiting:
            results[index] = await one

    # Do not make a task for each coroutine: if many clients disconnected at once, cancelling all
    # these tasks would block the event loop for seconds.
    tasks = [asyncio.ensure_future(run_some()) for _ in range(min(at_a_time, len(work)))]
    try:
        await asyncio.gather(*tasks)
        return [results[index] for index in range(len(work))]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for one in work:
            one.close()


# Conversion of outputs from domain to proto.

FINISH_REASONS = {
    FinishReason.STOP: inference_pb2.GenerateResponse.STOP,
    FinishReason.LENGTH: inference_pb2.GenerateResponse.LENGTH,
    FinishReason.CANCELLED: inference_pb2.GenerateResponse.CANCELLED,
    FinishReason.DEADLINE: inference_pb2.GenerateResponse.DEADLINE,
}


def token_logprobs(tokens: Iterable[TokenLogprob]) -> list[inference_pb2.TokenLogprob]:
    """The log probabilities as messages; the first prompt token has none."""
    return [
        inference_pb2.TokenLogprob(
            token_id=token.token_id,
            text=token.text,
            logprob=token.logprob,
            top=[
                inference_pb2.TopLogprob(token_id=t.token_id, text=t.text, logprob=t.logprob)
                for t in token.top
            ],
        )
        for token in tokens
    ]


def _duration(seconds: float) -> timedelta:
    return timedelta(seconds=max(seconds, 0.0))


def timing(spans: Timing) -> inference_pb2.Timing:
    return inference_pb2.Timing(
        queue=_duration(spans.queue_seconds),
        ttft=_duration(spans.time_to_first_token_seconds),
        total=_duration(spans.total_seconds),
    )


def adapter_uses(uses: Iterable[AdapterUse]) -> list[inference_pb2.AdapterUse]:
    return [message_of(inference_pb2.AdapterUse, use) for use in uses]


def usage_fields(finish: Finish) -> dict[str, Any]:
    """The fields that every finished answer has, by name."""
    return {
        "usage": message_of(inference_pb2.Usage, finish.usage),
        "adapters_used": adapter_uses(finish.adapters_used),
        "timing": timing(finish.timing),
    }


def finish_fields(finish: Finish, stop_token_ids: frozenset[int]) -> dict[str, Any]:
    """``usage_fields`` and why the answer ended.

    The API reports only a stop that the request itself named, not the model's own end token.
    """
    fields = usage_fields(finish) | {"finish_reason": FINISH_REASONS[finish.reason]}
    if isinstance(finish.stop, str):
        fields["stop_string"] = finish.stop
    elif finish.stop is not None and finish.stop in stop_token_ids:
        fields["stop_token_id"] = finish.stop
    return fields


class JoinedChunks:
    """Joins the chunks of an answer into one message."""

    def __init__(self) -> None:
        self._response = inference_pb2.GenerateResponse()
        self._texts: list[str] = []

    def add(self, chunk: inference_pb2.GenerateChunk) -> None:
        """Add the next chunk, which this modifies."""
        self._texts.append(chunk.text)
        chunk.ClearField("text")
        if not chunk.HasField("usage"):
            # Only the first and the last chunk report the adapters: keep those of the last.
            chunk.ClearField("adapters_used")
        # Both messages have the same field numbers, so merging in the wire format joins the chunks.
        self._response.MergeFromString(chunk.SerializeToString())

    def response(self) -> inference_pb2.GenerateResponse:
        """All chunks as one message."""
        self._response.text = "".join(self._texts)
        return self._response


# Calls with several inputs.

# Violations of these fields concern the whole call, not one of its inputs.
_SHARED = ("adapters", "inputs")


def check_inputs(
    inputs: Sequence[inference_pb2.Input], limits: InputLimits, violations: Violations
) -> None:
    """Check everything in the inputs that can be checked before they are tokenised.

    Raises:
        PromptTooLongError: An input exceeds the limit, however it is tokenised.
    """
    violations.check(len(inputs) > 0, "inputs", "EMPTY")
    if not violations.check_count(len(inputs), MAX_INPUTS, "inputs"):
        return
    for index, each in enumerate(inputs):
        found = Violations()
        with blamed_on(index):
            check_input(each, limits, found)
        for path, why in found.found:
            violations.add(_path(index, path), why)
        if violations.is_full:
            return


@contextlib.contextmanager
def blamed_on(index: int) -> Iterator[None]:
    """Report errors in an input with that input's path."""
    try:
        yield
    except InvalidRequestError as error:
        if any(path.startswith(_SHARED) for path, _ in error.violations):
            raise
        found = error.violations or [("", error.message)]
        raise type(error).of_all([(_path(index, path), why) for path, why in found]) from None


def _path(index: int, path: str) -> str:
    within = path.removeprefix("input").removeprefix(".")
    return f"inputs[{index}].{within}" if within else f"inputs[{index}]"


async def _vocabulary(
    backend: Backend,
    adapters: Sequence[adapters_pb2.AdapterWeight],
    chat: inference_pb2.Chat,
    call: Call,
) -> tuple[Vocabulary, InputLimits]:
    """The vocabulary that a request uses, and the limits that the vocabulary sets."""
    vocabulary = await backend.vocabularies.of(
        adapters, chat.chat_template, draw=call.draw, tenant=call.tenant
    )
    return vocabulary, InputLimits.of(backend, vocabulary)


async def pooled(
    message: inference_pb2.ClassifyRequest | inference_pb2.EmbedRequest,
    backend: Backend,
    call: Call,
    *,
    pooling_of: Callable[[Violations], Pooling],
    convert: Callable[[Output], _T],
) -> tuple[list[_T], dict[str, Any]]:
    """Run a request for each input of a message, a limited number at a time.

    Args:
        message: The message from the client.
        backend: The backend that runs the requests.
        call: The call on whose behalf the requests run; each is counted as one of its party.
        pooling_of: Returns how to pool the hidden states, and reports invalid fields.
        convert: Converts a request's last output to its result.

    Returns:
        The results in the order of the inputs, and the other fields of the answer by name.

    Raises:
        InvalidRequestError: Lists every invalid field.
        TurretError: The error of the first input that failed; see ``Engine.submit``. The other
            inputs' requests end.
    """
    call.about(message.adapters)
    _, limits = await _vocabulary(backend, message.adapters, inference_pb2.Chat(), call)
    violations = Violations()
    check_inputs(message.inputs, limits, violations)
    shared = shared_fields(message, call, violations)
    pooling = pooling_of(violations)
    violations.raise_if_any()
    count, start = len(message.inputs), time.monotonic()
    # Divide the size of the message among its inputs.
    shared["message_bytes"] //= count

    async def one(index: int) -> tuple[_T, Finish]:
        each = message.inputs[index]
        with call.party.hold(), blamed_on(index):
            await backend.turns.wait(call.turn)
            vocabulary, _ = await _vocabulary(backend, message.adapters, each.chat, call)
            request = Request(
                prompt_token_ids=tuple(
                    await input_token_ids(each, vocabulary.tokenizer, limits, call.tenant)
                ),
                pooling=pooling,
                own_tokenizer=vocabulary.own,
                **shared,
            )
            # The engine does not know how long the input has waited for other inputs of its call.
            waited = time.monotonic() - start
            outputs = outputs_of(backend, request, call, is_whole=True)
            result, finish = await _last(outputs, convert)
            return result, replace(finish, timing=_later(finish.timing, waited))

    found = await together([one(index) for index in range(count)], call.party.most_at_once)
    fields = summed_fields([finish for _, finish in found])
    return [result for result, _ in found], {"request_id": shared["request_id"], **fields}


def _later(spans: Timing, seconds: float) -> Timing:
    return Timing(
        queue_seconds=spans.queue_seconds + seconds,
        time_to_first_token_seconds=spans.time_to_first_token_seconds + seconds,
        total_seconds=spans.total_seconds + seconds,
    )


async def _last(
    outputs: AsyncGenerator[Output, None], convert: Callable[[Output], _T]
) -> tuple[_T, Finish]:
    async with contextlib.aclosing(outputs):
        async for output in outputs:
            if output.finish is None:
                continue
            if output.finish.reason is FinishReason.CANCELLED:
                raise UnavailableError(say("SHUTTING_DOWN"))
            if output.finish.reason is not FinishReason.DEADLINE:
                return convert(output), output.finish
    raise AssertionError("a request ends with a finish, or raises")


def summed_fields(finishes: Sequence[Finish]) -> dict[str, Any]:
    """The fields of an answer that are computed from all inputs of a call, by name."""
    usages = [finish.usage for finish in finishes]
    spans = [finish.timing for finish in finishes]
    total = max(span.total_seconds for span in spans)
    return {
        "usage": inference_pb2.Usage(
            prompt_tokens=sum(usage.prompt_tokens for usage in usages),
            cached_tokens=sum(usage.cached_tokens for usage in usages),
        ),
        "adapters_used": adapter_uses(_distinct(finishes)),
        "timing": timing(
            Timing(
                queue_seconds=min(span.queue_seconds for span in spans),
                time_to_first_token_seconds=total,
                total_seconds=total,
            )
        ),
    }


def _distinct(finishes: Iterable[Finish]) -> list[AdapterUse]:
    """The adapters that answered, each once; a cold start for any input counts as one."""
    places: dict[tuple[int, int], AdapterUse] = {}
    for finish in finishes:
        for place, use in enumerate(finish.adapters_used):
            known = places.setdefault((place, use.generation), use)
            if use.cold_start and not known.cold_start:
                places[place, use.generation] = use
    return [places[key] for key in sorted(places)]


# The methods Classify and Embed: labels or a vector for each input.


def _classification(head: Head, logits: array[float]) -> inference_pb2.Classification:
    scores = [
        inference_pb2.LabelScore(label=label, probability=probability, logit=logit)
        for label, probability, logit in zip(
            head.labels, probabilities(head, logits), logits, strict=True
        )
    ]
    best = max(range(len(logits)), key=logits.__getitem__)
    return inference_pb2.Classification(label=head.labels[best], scores=scores)


def probabilities(head: Head, logits: array[float]) -> list[float] | list[None]:
    """The probability of each label; None if the numbers are not those of labels."""
    if head.problem_type == REGRESSION:
        return [None] * len(logits)
    if head.problem_type == SINGLE_LABEL:
        largest = max(logits)
        shares = [math.exp(logit - largest) for logit in logits]
        total = math.fsum(shares)
        return [share / total for share in shares]
    return [_sigmoid(logit) for logit in logits]


def _sigmoid(logit: float) -> float:
    # Avoid exp() of a large positive number, which overflows.
    if logit >= 0:
        return 1 / (1 + math.exp(-logit))
    return math.exp(logit) / (1 + math.exp(logit))


_Embed = inference_pb2.EmbedRequest
_KINDS = {
    _Embed.POOLING_UNSPECIFIED: PoolingKind.LAST,
    _Embed.LAST: PoolingKind.LAST,
    _Embed.MEAN: PoolingKind.MEAN,
}


def _pooling_of(
    message: inference_pb2.EmbedRequest, hidden_size: int, violations: Violations
) -> Pooling:
    """How to pool the hidden states. An invalid value is reported, and its default is used."""
    values: dict[str, Any] = {}
    violations.check_enum(message, "pooling")
    if message.pooling in _KINDS:
        values["kind"] = _KINDS[message.pooling]
    if message.HasField("normalize"):
        values["normalize"] = message.normalize
    dimensions = hidden_size
    if message.HasField("dimensions"):
        fits = 1 <= message.dimensions <= hidden_size
        violations.check(
            fits, "dimensions", "NOT_IN_RANGE", least=1, most=hidden_size, value=message.dimensions
        )
        dimensions = values["dimensions"] = message.dimensions if fits else hidden_size
    most = MAX_EMBEDDING_NUMBERS // dimensions
    violations.check(
        len(message.inputs) <= most,
        "inputs",
        "TOO_MANY_NUMBERS",
        most=most,
        found=len(message.inputs),
        numbers=dimensions,
        most_numbers=MAX_EMBEDDING_NUMBERS,
    )
    return Pooling(**values)


def _vector(output: Output) -> inference_pb2.Embedding:
    assert output.pooled is not None
    return inference_pb2.Embedding(values=output.pooled)


# The service itself.


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
        vocabulary, limits = await _vocabulary(backend, adapters, chat, call)
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
        # A call may begin 64 answers, and thousands of calls may arrive at once, so answers begin
        # one at a time.
        await backend.turns.wait(call.turn)
        vocabulary, limits = await _vocabulary(backend, message.adapters, message.chat, call)
        request = await generate_request(message, vocabulary, limits, call)
        counts = message.options.running_usage and not is_whole
        # Drop the last reference, so that the message is freed while the request waits and runs.
        del message
        is_echoed = not request.options.echo
        # Log probabilities of the prompt may wait for the client after the request has ended, so
        # count their memory as that of a whole answer.
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
        vocabulary, limits = await _vocabulary(backend, message.adapters, message.chat, call)
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
        backend = self._gate.enter()
        hidden_size = backend.model_info.hidden_size
        embeddings, fields = await pooled(
            message,
            backend,
            call,
            pooling_of=lambda violations: _pooling_of(message, hidden_size, violations),
            convert=_vector,
        )
        return inference_pb2.EmbedResponse(embeddings=embeddings, **fields)

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
        count = len(message.inputs)

        def convert(output: Output) -> inference_pb2.Classification:
            head, logits = output.head, output.pooled
            assert head is not None
            assert logits is not None
            # This cannot be checked earlier, because the adapter may be replaced until the engine
            # holds it.
            most = MAX_LABEL_SCORES // len(logits)
            if count > most:
                numbers = {"numbers": len(logits), "most_numbers": MAX_LABEL_SCORES}
                why = say("TOO_MANY_NUMBERS", most=most, found=count, **numbers)
                raise InvalidRequestError.of("inputs", why)
            return _classification(head, logits)

        classifications, fields = await pooled(
            message,
            self._gate.enter(),
            call,
            pooling_of=lambda _: Pooling(classifies=True),
            convert=convert,
        )
        return inference_pb2.ClassifyResponse(classifications=classifications, **fields)

    async def tokenize(
        self, message: inference_pb2.TokenizeRequest, call: Call
    ) -> inference_pb2.TokenizeResponse:
        """The tokens of a prompt, a chat or token ids, and their text."""
        backend = self._gate.enter()
        vocabulary, limits = await _vocabulary(backend, message.adapters, message.chat, call)
        tokenizer, limits = vocabulary.tokenizer, limits.for_tokenize()
        violations = Violations()
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
