"""The models that requests may name: GET /v1/models, and the paths that manage adapters."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from turret.server.api.admin_messages import adapter_message
from turret.server.api.violations import Violations
from turret.server.basics.names import BASE, HUB_SCHEME
from turret.server.errors import AdapterNotFoundError
from turret.server.http.asked import read_model
from turret.server.http.endpoint import Exchange, Json
from turret.server.http.schemas.requests import AdapterName, LoadAdapter
from turret.server.words import say
from turret.v1 import adapters_pb2
from turret.v1.inference_pb2 import GetModelResponse

OWNER = "turret"
# OpenAI's API requires a creation time. Adapters have none that survives a restart.
_CREATED = int(time.time())
# Other servers' scheme for repositories on the hub.
_HF_SCHEME = "hf://"
# The tokens with log probabilities that take as long to serialise as one adapter.
_TOKENS_PER_CARD = 2
_TEXT = {"content-type": "text/plain; charset=utf-8"}


async def list_models(exchange: Exchange) -> None:
    """List models: the base model first, then the adapters and the aliases by name."""
    adapters, base = exchange.services.adapters, exchange.services.inference.model()
    records = await adapters.records(exchange.call)
    aliases = adapters.aliases()

    def listed() -> Iterator[dict[str, Any]]:
        yield _base(base)
        yield from (_adapter(adapter_message(record), base) for record in records)
        yield from (_alias(alias, base) for alias in aliases)

    size = (len(records) + len(aliases)) * _TOKENS_PER_CARD
    await exchange.reply.made_json(lambda: {"object": "list", "data": listed()}, size)


async def get_model(exchange: Exchange) -> Json:
    """Get a model by any name that requests may use for it.

    Raises:
        AdapterNotFoundError: No such model exists, or the name is that of a mix.
    """
    adapters, base = exchange.services.adapters, exchange.services.inference.model()
    name = exchange.request.path_params["model"]
    members, wrong = read_model(name, base.name)
    Violations([("model", why) for why in wrong]).raise_if_any()
    if not members:
        return _base(base)
    # A mix has no card, because it has no digest, method or generation.
    if len(members) > 1 or members[0].HasField("weight"):
        text = say("MODEL_IS_A_MIX", model=name[:200], step=members[0].name)
        raise AdapterNotFoundError(text, metadata={"adapter": name[:200]})
    question = adapters_pb2.GetAdapterRequest(name=members[0].name)
    if members[0].HasField("generation"):
        question.generation = members[0].generation
    else:
        for alias in adapters.aliases():
            if alias.name == question.name:
                return _alias(alias, base)
    return _adapter(await adapters.get(question, exchange.call), base)


def _base(info: GetModelResponse) -> dict[str, Any]:
    card = _card(info.name, info.name, None)
    return card | {
        "max_model_len": info.max_model_len,
        "aliases": [BASE],
        "digest": info.digest,
    }


def _adapter(adapter: adapters_pb2.Adapter, base: GetModelResponse) -> dict[str, Any]:
    residency = adapters_pb2.Adapter.Residency.Name(adapter.residency).lower()
    return _card(adapter.name, adapter.digest, base.name) | {
        "method": adapter.method,
        "generation": adapter.generation,
        "residency": residency,
    }


def _alias(alias: adapters_pb2.Alias, base: GetModelResponse) -> dict[str, Any]:
    targets = [
        {"name": target.name, "generation": target.generation, "weight": target.weight}
        for target in alias.targets
    ]
    return _card(alias.name, alias.name, base.name) | {"targets": targets}


def _card(name: str, root: str, parent: str | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": _CREATED,
        "owned_by": OWNER,
        "root": root,
        "parent": parent,
    }


# The management of adapters, with vLLM's fields.


async def load_adapter(exchange: Exchange) -> None:
    """Register an adapter of any method."""
    body = exchange.take_body().checked(LoadAdapter)
    path = body.lora_path
    if path.startswith(_HF_SCHEME):
        path = HUB_SCHEME + path.removeprefix(_HF_SCHEME)
    fields: dict[str, Any] = {"name": body.lora_name, "path": path}
    fields |= {"task": body.task, "chat_template": body.chat_template}
    adapters, call = exchange.services.adapters, exchange.call
    if body.load_inplace:
        await adapters.replace(adapters_pb2.ReplaceAdapterRequest(**fields), call)
    else:
        question = adapters_pb2.LoadAdapterRequest(pinned=body.pinned, **fields)
        await adapters.load(question, call)
    await succeed(exchange, body.lora_name, "added successfully")


async def unload_adapter(exchange: Exchange) -> None:
    """Remove an adapter once no request uses it."""
    await _change(exchange, "unload", adapters_pb2.UnloadAdapterRequest, "removed successfully")


async def pin_adapter(exchange: Exchange) -> None:
    """Keep an adapter in memory."""
    await _change(exchange, "pin", adapters_pb2.PinAdapterRequest, "pinned")


async def unpin_adapter(exchange: Exchange) -> None:
    """Let an adapter leave memory again."""
    await _change(exchange, "unpin", adapters_pb2.UnpinAdapterRequest, "unpinned")


async def _change(exchange: Exchange, method: str, kind: type[Any], done: str) -> None:
    name = exchange.take_body().checked(AdapterName).lora_name
    await getattr(exchange.services.adapters, method)(kind(name=name), exchange.call)
    await succeed(exchange, name, done)


async def succeed(exchange: Exchange, name: str, what: str) -> None:
    """Answer that an adapter was added, or otherwise changed."""
    # The text is the same as vLLM's.
    text = f"Success: LoRA adapter '{name}' {what}."
    await exchange.reply.whole(text.encode(), 200, _TEXT)
