"""Handlers of the calls that train: models, passes, steps, and the weights that they save."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Any

from turret.closest import closest
from turret.server.api.checkpoints import Checkpoint
from turret.server.api.futures import Future, Result
from turret.server.api.tenants import SavedSampler, TenantModel, Tenants
from turret.server.errors import InvalidRequestError
from turret.server.http.endpoint import Exchange, Json
from turret.server.http.fields import Body, Sent, wrong_type
from turret.server.http.refusals import HttpRefusal
from turret.server.http.tinker import schemas, sessions, wire
from turret.server.http.tinker.sessions import (
    check_base,
    gone,
    number_of,
    owner_of,
    session_of,
    tenants_of,
)
from turret.server.training import AdamParams, LearnerConfig
from turret.server.words import say

# The entry of ``user_metadata`` that chooses the method of an adapter. Other entries must not begin
# with the prefix.
METHOD_NOTE, _OWN_NOTES = "turret.method", "turret."
_SHOWN_CHARS = 40

Work = Callable[[Tenants, TenantModel, Any], Awaitable[Result]]


def _promise(future: Future, model_id: str) -> Json:
    """The answer to a call whose result the client retrieves later, by the id in the answer."""
    return {"request_id": future.request_id, "model_id": model_id}


async def command(work: Work, kind: type[Body], exchange: Exchange) -> Json:
    """Put a command with a JSON body into its model's log.

    Args:
        work: Runs the command when its turn comes.
        kind: The model of the body, with ``model_id`` and ``seq_id``.
        exchange: The request.
    """
    return _commanded(exchange, exchange.take_body(), kind, work)


def _commanded(exchange: Exchange, sent: Sent[Any], kind: type[Body], work: Work) -> Json:
    tenants = tenants_of(exchange)
    model_id = sent.raw.get("model_id")
    if not isinstance(model_id, str):
        raise InvalidRequestError.of("model_id", wrong_type("a string", model_id))
    number = number_of(sent.raw.get("seq_id"))
    model = tenants.sessions.model(owner_of(exchange), model_id)
    # While the command waits, keep only the model and its errors, not the parsed object.
    kept = Sent(sent.body, sent.wrong)

    async def run() -> Result:
        # Report errors in the body only now: a command that fails uses its number too, so that
        # later ones do not wait for it.
        return await work(tenants, model, kept.checked(kind))

    return _promise(sessions.command(tenants, model, number, run), model.model_id)


# Models.


async def create_model(exchange: Exchange) -> Json:
    """Begin to train an adapter."""
    body = exchange.take_body().checked(schemas.CreateModel)
    check_base(exchange, body.base_model)
    lora = body.lora_config
    for name in body.user_metadata:
        if name.startswith(_OWN_NOTES) and name != METHOD_NOTE:
            shown = name[:_SHOWN_CHARS]
            text = say("UNKNOWN_FIELD", closest=closest(name, [METHOD_NOTE]))
            raise InvalidRequestError.of(f"user_metadata.{shown}", text)
    config = LearnerConfig(
        method=body.user_metadata.get(METHOD_NOTE, "lora"),
        rank=lora.rank,
        seed=lora.seed,
        attention=lora.train_attn,
        mlp=lora.train_mlp,
        unembed=lora.train_unembed,
    )

    async def begin(model: TenantModel) -> Result:
        return Result.of(model_id=model.model_id, type="create_model")

    return _create(exchange, body, config, begin)


def _create(
    exchange: Exchange,
    body: schemas.CreateModel | schemas.LoadWeights,
    config: LearnerConfig,
    begin: Callable[[TenantModel], Awaitable[Result]],
) -> Json:
    """Add a model to a session; the model's first command creates its adapter.

    Args:
        exchange: The request.
        body: Names the session and the number of the model in it.
        config: The config of the adapter.
        begin: Finishes the first command once the adapter exists.
    """
    assert body.session_id is not None
    assert body.model_seq_id is not None
    tenants, number = tenants_of(exchange), body.model_seq_id
    session = session_of(exchange, body.session_id)
    model_id = f"{body.session_id}:train:{number}"
    future = tenants.futures.find(session.owner, f"{model_id}:0")
    if future is None:
        if model_id in session.models:
            raise gone()
        training = tenants.sessions.training()
        model = tenants.sessions.add_model(session, number, config, body.user_metadata)

        async def run() -> Result:
            try:
                model.learner = await training.create(model.config, model.owner)
                return await begin(model)
            except BaseException:
                tenants.sessions.drop_model(model)
                raise

        future = sessions.command(tenants, model, 0, run)
    return _promise(future, model_id)


async def get_info(exchange: Exchange) -> Json:
    """Describe a model in training."""
    body, tenants = exchange.take_body().checked(schemas.OfModel), tenants_of(exchange)
    model, info = tenants.sessions.model(owner_of(exchange), body.model_id), tenants.info()
    data = {"arch": info.model_type, "model_name": info.name, "tokenizer_id": info.name}
    return {
        "type": "get_info",
        "model_data": data,
        "model_id": model.model_id,
        "is_lora": True,
        "lora_rank": model.config.rank,
        "model_name": info.name,
        "optimizer_config": {"type": "adamw"},
    }


async def unload_model(exchange: Exchange) -> Json:
    """Forget a model in training."""
    body, tenants = exchange.take_body().checked(schemas.OfModel), tenants_of(exchange)
    owner = owner_of(exchange)
    future = tenants.futures.find(owner, f"{body.model_id}:unload")
    if future is None:
        model = tenants.sessions.model(owner, body.model_id)
        future = tenants.futures.begin(owner, f"{body.model_id}:unload")
        tenants.sessions.drop_model(model)
        result = Result.of(model_id=model.model_id, type="unload_model")
        tenants.futures.settle(future, result)
    return _promise(future, body.model_id)


# Passes and steps.


async def forward_backward(exchange: Exchange) -> Json:
    """Compute losses and, unless told otherwise, their gradients."""
    if exchange.media_type != wire.PROTOBUF:
        raise HttpRefusal(415, say("NOT_A_MESSAGE_TYPE", wanted=wire.PROTOBUF))
    body = await exchange.read_body()
    tenants, tenant = tenants_of(exchange), exchange.call.tenant
    info, training = tenants.info(), tenants.sessions.training()
    model_id, seq_id = await tenants.read(tenant, lambda: wire.read_address(body))
    number = number_of(seq_id)
    model = tenants.sessions.model(owner_of(exchange), model_id)

    async def run() -> Result:
        # Until its turn comes, a pass is kept as bytes, because its sequences may take 30 times as
        # much memory.
        asked = await tenants.read(tenant, lambda: wire.read_pass(body, info))
        losses = await training.pass_over(
            model.learner_number,
            asked.data,
            asked.loss,
            asked.settings,
            is_forward_only=asked.is_forward_only,
        )
        result = await tenants.read(tenant, lambda: wire.result_of_pass(losses))
        return Result(result, wire.PROTOBUF)

    future = sessions.command(tenants, model, number, run, len(body))
    return _promise(future, model.model_id)


async def optim_step(tenants: Tenants, model: TenantModel, body: schemas.OptimStep) -> Result:
    """Change a model's weights by the gradients since the last step."""
    adam = AdamParams(**body.adam_params.model_dump())
    metrics = await tenants.sessions.training().step(model.learner_number, adam)
    # Leave out metrics that are infinite or NaN, because JSON cannot represent them.
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    return Result.of(metrics=finite)


# Weights.


async def _save(
    tenants: Tenants,
    model: TenantModel,
    kind: str,
    body: schemas.Save,
    *,
    overwrite: bool = False,
) -> Checkpoint:
    return await tenants.save(
        model,
        kind,
        body.path or f"step-{body.seq_id:06d}",
        metadata=body.user_metadata,
        ttl_seconds=body.ttl_seconds,
        overwrite=overwrite,
    )


async def save_weights(tenants: Tenants, model: TenantModel, body: schemas.SaveWeights) -> Result:
    """Save a model with its optimizer, to continue from later."""
    saved = await _save(tenants, model, "weights", body, overwrite=body.overwrite)
    return Result.of(path=saved.path, type="save_weights")


async def save_external(tenants: Tenants, model: TenantModel, body: schemas.SaveExternal) -> Result:
    """Save a model's weights for download."""
    saved = await _save(tenants, model, "external_weights", body)
    return Result.of(path=saved.path, size_bytes=saved.size, type="save_weights_external")


async def save_for_sampler(
    tenants: Tenants, model: TenantModel, body: schemas.SaveForSampler
) -> Result:
    """Save a model's weights for sampling, or make a sampler of them without saving."""
    if body.sampling_session_seq_id is None:
        path, sampler_id = (await _save(tenants, model, "sampler_weights", body)).path, None
    else:
        path, sampler_id = None, (await _snapshot(tenants, model, body)).sampler_id
    kind = "save_weights_for_sampler"
    return Result.of(path=path, sampling_session_id=sampler_id, type=kind)


async def _snapshot(
    tenants: Tenants, model: TenantModel, body: schemas.SaveForSampler
) -> SavedSampler:
    """A sampler with a model's present weights, or one that always uses its newest ones."""
    session_id = model.model_id.partition(":")[0]
    session = tenants.sessions.find(model.owner, session_id)
    sampler = SavedSampler(
        sampler_id=f"{session_id}:sample:{body.sampling_session_seq_id}",
        owner=model.owner,
        adapter=model.adapter,
    )
    if body.kind == "inflight":
        await tenants.publish(model)
    else:
        sampler.adapter = f"{model.adapter}/{body.sampling_session_seq_id}"
        sampler.is_own = True
        async with tenants.writing(model.owner):
            training = tenants.sessions.training()
            published = await training.publish(model.learner_number, sampler.adapter)
        sampler.generation, sampler.size = published.generation, published.size
    tenants.sessions.add_sampler(session, sampler)
    return sampler


async def load_weights(exchange: Exchange) -> Json:
    """Continue from a checkpoint, in a model or in a new one."""
    sent = exchange.take_body()
    if sent.raw.get("model_id") is not None:
        return _commanded(exchange, sent, schemas.LoadWeights, _load)
    body = sent.checked(schemas.LoadWeights)
    if body.session_id is None or body.model_seq_id is None:
        choices = "model_id, session_id"
        raise InvalidRequestError.of("model_id", say("ONE_REQUIRED", choices=choices))
    if body.base_model is not None:
        check_base(exchange, body.base_model)
    tenants = tenants_of(exchange)
    config = tenants.checkpoints.find(owner_of(exchange), body.path).config

    async def begin(model: TenantModel) -> Result:
        return await _load(tenants, model, body)

    return _create(exchange, body, config, begin)


async def _load(tenants: Tenants, model: TenantModel, body: schemas.LoadWeights) -> Result:
    checkpoint = await tenants.load(model, body.path, with_optimizer=body.optimizer)
    return Result.of(path=checkpoint.path, model_id=model.model_id, type="load_weights")
