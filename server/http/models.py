"""The models that requests may name: GET /v1/models, and the paths that manage adapters."""

from __future__ import annotations

import time
from typing import Any, TypeVar

from turret.server.api.admin import Adapters
from turret.server.api.admin_messages import MAX_PAGE_SIZE
from turret.server.api.inference import Inference
from turret.server.api.violations import Violations
from turret.server.basics.names import BASE, HUB_SCHEME
from turret.server.errors import AdapterNotFoundError
from turret.server.http.endpoint import Exchange
from turret.server.http.model_names import parse_model
from turret.server.http.schemas.fields import Sent
from turret.server.http.schemas.requests import AdapterName, LoadAdapter
from turret.server.words import say
from turret.v1 import adapters_pb2
from turret.v1.adapters_pb2 import (
    LoadAdapterRequest,
    PinAdapterRequest,
    ReplaceAdapterRequest,
    UnloadAdapterRequest,
    UnpinAdapterRequest,
)

OWNER = "turret"
# Other servers' scheme for repositories on the hub.
_HF_SCHEME = "hf://"
_TEXT = {"content-type": "text/plain; charset=utf-8"}

_B = TypeVar("_B", bound=AdapterName)


class Models:
    """Lists the possible values of ``model``, except mixes.

    Args:
        inference: The Inference service.
        adapters: The Adapters service.
    """

    def __init__(self, inference: Inference, adapters: Adapters) -> None:
        self._inference = inference
        self._adapters = adapters
        # OpenAI's API requires a creation time. Adapters have none that survives a restart.
        self._created = int(time.time())

    async def list(self, exchange: Exchange) -> None:
        """List models: the base model first, then the adapters and the aliases by name."""
        found = [self._base()]
        token = ""
        while True:
            page = await self._adapters.list_page(
                adapters_pb2.ListAdaptersRequest(page_size=MAX_PAGE_SIZE, page_token=token)
            )
            found += map(self._adapter, page.adapters)
            token = page.next_page_token
            if not token:
                break
        found += map(self._alias, self._adapters.aliases())
        await exchange.reply.json({"object": "list", "data": found})

    async def get(self, exchange: Exchange) -> None:
        """Get a model by any name that requests may use for it.

        Raises:
            AdapterNotFoundError: No such model exists, or the name is that of a mix.
        """
        name = exchange.path["model"]
        members = parse_model(name, self._inference.model().name)
        if not members:
            await exchange.reply.json(self._base())
            return
        # A mix has no card, because it has no digest, method or generation.
        if len(members) > 1 or members[0].HasField("weight"):
            text = say("MODEL_IS_A_MIX", model=name[:200], step=members[0].name)
            raise AdapterNotFoundError(text, metadata={"adapter": name[:200]})
        question = adapters_pb2.GetAdapterRequest(name=members[0].name)
        if members[0].HasField("generation"):
            question.generation = members[0].generation
        else:
            for alias in self._adapters.aliases():
                if alias.name == question.name:
                    await exchange.reply.json(self._alias(alias))
                    return
        adapter = await self._adapters.get(question, exchange.call)
        await exchange.reply.json(self._adapter(adapter))

    def _base(self) -> dict[str, Any]:
        info = self._inference.model()
        card = self._card(info.name, info.name, None)
        return card | {
            "max_model_len": info.max_model_len,
            "aliases": [BASE],
            "digest": info.digest,
        }

    def _adapter(self, adapter: adapters_pb2.Adapter) -> dict[str, Any]:
        card = self._card(adapter.name, adapter.digest, self._inference.model().name)
        residency = adapters_pb2.Adapter.Residency.Name(adapter.residency).lower()
        return card | {
            "method": adapter.method,
            "generation": adapter.generation,
            "residency": residency,
        }

    def _alias(self, alias: adapters_pb2.Alias) -> dict[str, Any]:
        card = self._card(alias.name, alias.name, self._inference.model().name)
        targets = [
            {"name": target.name, "generation": target.generation, "weight": target.weight}
            for target in alias.targets
        ]
        return card | {"targets": targets}

    def _card(self, name: str, root: str, parent: str | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": OWNER,
            "root": root,
            "parent": parent,
        }


class Lora:
    """Manages adapters of every method, with vLLM's fields.

    Args:
        adapters: The Adapters service.
    """

    def __init__(self, adapters: Adapters) -> None:
        self._adapters = adapters

    async def load(self, exchange: Exchange) -> None:
        """Register an adapter of any method."""
        body = _read(exchange, LoadAdapter)
        path = body.lora_path
        if path.startswith(_HF_SCHEME):
            path = HUB_SCHEME + path.removeprefix(_HF_SCHEME)
        fields: dict[str, Any] = {"name": body.lora_name, "path": path}
        fields |= {"task": body.task, "chat_template": body.chat_template}
        if body.load_inplace:
            await self._adapters.replace(ReplaceAdapterRequest(**fields), exchange.call)
        else:
            question = LoadAdapterRequest(pinned=body.pinned, **fields)
            await self._adapters.load(question, exchange.call)
        await succeed(exchange, body.lora_name, "added successfully")

    async def unload(self, exchange: Exchange) -> None:
        """Remove an adapter once no request uses it."""
        body = _read(exchange, AdapterName)
        question = UnloadAdapterRequest(name=body.lora_name)
        await self._adapters.unload(question, exchange.call)
        await succeed(exchange, body.lora_name, "removed successfully")

    async def pin(self, exchange: Exchange) -> None:
        """Keep an adapter in memory."""
        body = _read(exchange, AdapterName)
        await self._adapters.pin(PinAdapterRequest(name=body.lora_name), exchange.call)
        await succeed(exchange, body.lora_name, "pinned")

    async def unpin(self, exchange: Exchange) -> None:
        """Let an adapter leave memory again."""
        body = _read(exchange, AdapterName)
        await self._adapters.unpin(UnpinAdapterRequest(name=body.lora_name), exchange.call)
        await succeed(exchange, body.lora_name, "unpinned")


def _read(exchange: Exchange, kind: type[_B]) -> _B:
    sent: Sent[_B] = exchange.take_body()
    Violations(list(sent.wrong)).raise_if_any()
    assert isinstance(sent.body, kind)
    return sent.body


async def succeed(exchange: Exchange, name: str, what: str) -> None:
    """Answer that an adapter was added, or otherwise changed."""
    # The text is the same as vLLM's.
    text = f"Success: LoRA adapter '{name}' {what}."
    await exchange.reply.whole(text.encode(), 200, _TEXT)
