"""Handlers of the calls that sample, through the Inference service like all other requests."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

from turret.server import errors
from turret.server.api.call import Call
from turret.server.api.checkpoints import Checkpoint
from turret.server.api.futures import Future, Futures, Result
from turret.server.api.inference import converted, together
from turret.server.api.services import Services
from turret.server.api.tenants import SavedSampler, Session, Tenants
from turret.server.basics.codes import Code
from turret.server.basics.turns import completed
from turret.server.basics.work import turret_error
from turret.server.http.choices import blamed_on
from turret.server.http.endpoint import Exchange, Json
from turret.server.http.tinker.schemas import CreateSampler, Sample
from turret.server.http.tinker.sessions import (
    check_base,
    owner_of,
    session_gone,
    session_of,
    tenants_of,
)
from turret.server.http.tinker.wire import PROTOBUF, result_of_samples
from turret.server.words import say
from turret.v1 import adapters_pb2, inference_pb2

_SEEDS = 1 << 64
_METHOD = "POST /api/v1/asample"
# The approximate memory of a request without its tokens.
_REQUEST_BYTES = 8 << 10
# While the queue is full, a request is tried this many times, this many seconds apart.
_TRIES, _RETRY_SECONDS = 600, 1.0


async def create_sampler(exchange: Exchange) -> Json:
    """Choose the weights to sample from: the base model's, or those of a checkpoint."""
    body = exchange.take_body().checked(CreateSampler)
    tenants, owner = tenants_of(exchange), owner_of(exchange)
    session = session_of(exchange, body.session_id)
    sampler_id = f"{session.session_id}:sample:{body.sampling_session_seq_id}"
    if sampler_id not in session.samplers:
        sampler = SavedSampler(sampler_id=sampler_id, owner=owner, path=body.model_path)
        if body.model_path is not None:
            checkpoint = tenants.checkpoints.find(owner, body.model_path)
            number = body.sampling_session_seq_id
            sampler.adapter, sampler.is_own = f"training/{session.session_id}/s{number}", True
            async with tenants.writing(owner):
                await completed(_serve(tenants, session, sampler, checkpoint))
        elif body.base_model is not None:
            check_base(exchange, body.base_model)
            _add(tenants, session, sampler)
        else:
            choices = "base_model, model_path"
            raise errors.InvalidRequestError.of("model_path", say("ONE_REQUIRED", choices=choices))
    return {"type": "create_sampling_session", "sampling_session_id": sampler_id}


async def _serve(
    tenants: Tenants, session: Session, sampler: SavedSampler, checkpoint: Checkpoint
) -> None:
    """Register a checkpoint's adapter for a sampler, and add the sampler to its session."""
    with tenants.checkpoints.reading(checkpoint) as folder:
        published = await tenants.sessions.training().serve(folder, sampler.adapter)
    sampler.generation, sampler.size = published.generation, published.size
    _add(tenants, session, sampler)


def _add(tenants: Tenants, session: Session, sampler: SavedSampler) -> None:
    try:
        tenants.sessions.add_sampler(session, sampler)
    except errors.TrainingNotFoundError:
        raise session_gone(session.session_id) from None


async def get_sampler(exchange: Exchange) -> Json:
    """Describe a sampler."""
    tenants, sampler_id = tenants_of(exchange), exchange.request.path_params["sampler"]
    sampler = tenants.sessions.sampler(owner_of(exchange), sampler_id)
    return {
        "sampler_id": sampler.sampler_id,
        "base_model": tenants.info().name,
        "model_path": sampler.path,
    }


async def sample(exchange: Exchange) -> Json:
    """Start sampling. The client retrieves the sequences later, as the result of a future."""
    body, services = exchange.take_body().checked(Sample), exchange.services
    tenants, owner = tenants_of(exchange), owner_of(exchange)
    sampler = tenants.sessions.sampler(owner, body.sampling_session_id)
    request_id = f"{sampler.sampler_id}:{body.seq_id}"
    future = tenants.futures.find(owner, request_id)
    if future is None:
        message = _message(sampler, body)
        call = Call.begin(
            _METHOD,
            [exchange.call.request_id],
            services.metrics,
            protocol="http",
            party=exchange.call.party,
            failures=services.failures,
            is_counted=True,
            is_private=True,
        )
        call.message_bytes = exchange.call.message_bytes // body.num_samples
        work = _Samples(services, tenants.futures, sampler, body, message, call)
        # Count the request before it is accepted, so that errors about limits are sent at once.
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(call.party.hold())
                # The engine's limits do not count a request that waits for a place in the queue.
                call.hold(_REQUEST_BYTES + message.ByteSize() + 4 * len(message.token_ids.ids))
                future = tenants.futures.begin(owner, request_id)
            except Exception as error:
                call.finish(turret_error(error).code)
                raise
            future.sequence_ids = [f"{request_id}:{index}" for index in range(body.num_samples)]
            future.task = asyncio.ensure_future(work.run(future, held.pop_all()))
    return {"request_id": request_id, "sample_sequence_ids": future.sequence_ids}


def _message(sampler: SavedSampler, body: Sample) -> inference_pb2.GenerateRequest:
    """The request for one sequence."""
    params = body.sampling_params
    message = inference_pb2.GenerateRequest()
    for chunk in body.prompt.chunks:
        message.token_ids.ids.extend(chunk.tokens)
    # While the request waits, only the message keeps the tokens.
    body.prompt.chunks.clear()
    if sampler.adapter:
        weight = adapters_pb2.AdapterWeight(name=sampler.adapter)
        if sampler.generation is not None:
            weight.generation = sampler.generation
        message.adapters.append(weight)
    sampling, stop, options = message.sampling, message.stop, message.options
    sampling.temperature = params.temperature
    sampling.top_p = params.top_p
    sampling.top_k = max(params.top_k, 0)
    if params.seed is not None:
        sampling.seed = params.seed % _SEEDS
    if params.max_tokens is not None:
        stop.max_tokens = params.max_tokens
    stop.stop_strings.extend(params.stop.texts)
    stop.stop_token_ids.extend(params.stop.tokens)
    stop.ignore_eos = params.stop.ignores_eos
    options.logprobs = options.token_ids = True
    options.top_n = max(body.topk_prompt_logprobs, body.topk_sample_logprobs)
    length = len(message.token_ids.ids)
    last = body.prompt_logprobs_last_n
    if last is not None and not (body.prompt_logprobs and last < length):
        path, most = "prompt_logprobs_last_n", max(length - 1, 1)
        raise errors.InvalidRequestError.of(
            path, say("NOT_IN_RANGE", least=1, most=most, value=last)
        )
    return message


@dataclass(slots=True)
class _Samples:
    """Samples some sequences for one request."""

    services: Services
    futures: Futures
    sampler: SavedSampler
    body: Sample
    message: inference_pb2.GenerateRequest
    call: Call

    async def run(self, future: Future, held: contextlib.ExitStack) -> None:
        """Settle the future, and release what was held for the request."""
        futures, code = self.futures, Code.OK
        self.sampler.running += 1
        try:
            futures.settle(future, await self._result())
        except asyncio.CancelledError:
            code = Code.CANCELLED
            futures.fail(future, errors.UnavailableError(say("REQUEST_ENDED")))
        except Exception as error:
            found = turret_error(error)
            code = found.code
            self.call.fail(found.reason, found.message, violations=found.violations)
            futures.fail(future, error)
        finally:
            self.sampler.running -= 1
            held.close()
            self.call.finish(code)

    async def _result(self) -> Result:
        body, count = self.body, len(self.message.token_ids.ids)
        wants_prompt = body.prompt_logprobs or body.topk_prompt_logprobs > 0
        # The first sequence fills the prefix cache for the others.
        first = await self._one(0, echo=wants_prompt)
        prompt = list(first.logprobs[:count]) if wants_prompt else []
        if wants_prompt:
            del first.logprobs[:count]
            del first.token_ids[:count]
        # All sequences together count as one request against the client's limits.
        work = [self._one(index) for index in range(1, body.num_samples)]
        others = await together(work, self.call.party.most_at_once)
        answers = [first, *others]
        size = count + sum(len(answer.token_ids) for answer in answers)
        return Result(
            await converted(
                self.call.tenant,
                size * (1 + self.message.options.top_n),
                lambda: result_of_samples(
                    answers,
                    prompt,
                    prompt_top=body.topk_prompt_logprobs,
                    sample_top=body.topk_sample_logprobs,
                    scored=body.prompt_logprobs_last_n,
                    has_scores=body.prompt_logprobs,
                ),
            ),
            PROTOBUF,
        )

    async def _one(self, index: int, *, echo: bool = False) -> inference_pb2.GenerateResponse:
        """One sequence. If the request has a seed, each sequence gets a different one."""
        message = inference_pb2.GenerateRequest()
        message.CopyFrom(self.message)
        message.options.echo = echo
        if index and message.sampling.HasField("seed"):
            message.sampling.seed = (message.sampling.seed + index) % _SEEDS
        answer = await self._answer(message)
        if answer.finish_reason == inference_pb2.GenerateResponse.CANCELLED:
            raise errors.UnavailableError(say("REQUEST_ENDED"))
        return answer

    async def _answer(
        self, message: inference_pb2.GenerateRequest
    ) -> inference_pb2.GenerateResponse:
        """The answer to a request, which waits for a place in the queue."""
        inference, tries = self.services.inference, _TRIES
        while True:
            try:
                with blamed_on("prompt"):
                    return await inference.generate_whole(message, self.call)
            except errors.QueueFullError:
                # The client already waits for the result, so it would not repeat the request.
                tries -= 1
                if not tries:
                    raise
                await asyncio.sleep(_RETRY_SECONDS)
