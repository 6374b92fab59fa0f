"""The models that requests may name: GET /v1/models, and the paths that manage adapters."""

from __future__ import annotations

import time
from typing import Any, TypeVar

from turret.server.api.admin.adapter_message import MAX_PAGE_SIZE
from turret.server.api.admin.adapters import Adapters
from turret.server.api.inference.inference import Inference
from turret.server.api.violations import Violations
from turret.server.basics.hub_id import BASE
from turret.server.errors import AdapterNotFoundError
from turret.server.http.endpoint import Exchange
from turret.server.http.model_names import parse_model
from turret.server.http.schemas.fields import Sent
from turret.server.http.schemas.requests import AdapterName, LoadAdapter
from turret.server.words import say
from turret.v1 import adapters_pb2

OWNER = "turret"
# Field paths of turret.v1, as the paths that manage adapters name them.
ADAPTER_NAMES = {"name": "lora_name", "path": "lora_path"}
_TEXT = {"content-type": "text/plain; charset=utf-8"}

_B = TypeVar("_B", bound=AdapterName)


class Models:
    """Lists the possible values of ``model``, except mixes.

    Args:
        inference: Knows the base model.
        adapters: Knows the adapters.
    """

    def __init__(self, inference: Inference, adapters: Adapters) -> None:
        self._inference = inference
        self._adapters = adapters
        # OpenAI's API requires a creation time. Adapters have none that survives a restart.
        self._created = int(time.time())

    async def list(self, exchange: Exchange) -> None:
        """All of them, the base model first and the adapters by name."""
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
        await exchange.reply.json({"object": "list", "data": found})

    async def get(self, exchange: Exchange) -> None:
        """One of them, by any name that a request may call it by.

        Raises:
            AdapterNotFoundError: There is none, or the name is a mix's.
        """
        name = exchange.path["model"]
        members = parse_model(name, self._inference.model().name)
        if not members:
            await exchange.reply.json(self._base())
            return
        # A mix has no card: it has no digest, method or generation, and there is no end of mixes.
        if len(members) > 1 or members[0].HasField("weight"):
            text = say("MODEL_IS_A_MIX", model=name[:200], step=members[0].name)
            raise AdapterNotFoundError(text, metadata={"adapter": name[:200]})
        question = adapters_pb2.GetAdapterRequest(name=members[0].name)
        adapter = await self._adapters.get(question, exchange.call)
        await exchange.reply.json(self._adapter(adapter))

    def _base(self) -> dict[str, Any]:
        info = self._inference.model()
        card = self._card(info.name, info.name, None)
        return card | {"max_model_len": info.max_model_len, "aliases": [BASE]}

    def _adapter(self, adapter: adapters_pb2.Adapter) -> dict[str, Any]:
        card = self._card(adapter.name, adapter.digest, self._inference.model().name)
        residency = adapters_pb2.Adapter.Residency.Name(adapter.residency).lower()
        return card | {
            "method": adapter.method,
            "generation": adapter.generation,
            "residency": residency,
        }

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
    """Loads and unloads adapters of every method, with vLLM's fields, and pins them.

    Args:
        adapters: What does it.
    """

    def __init__(self, adapters: Adapters) -> None:
        self._adapters = adapters

    async def load(self, exchange: Exchange) -> None:
        """Register ``lora_path``, below the adapter root, as ``lora_name``."""
        body = _read(exchange, LoadAdapter)
        name, path = body.lora_name, body.lora_path
        if body.load_inplace:
            new = adapters_pb2.ReplaceAdapterRequest(
                name=name, path=path, task=body.task, chat_template=body.chat_template
            )
            await self._adapters.replace(new, exchange.call)
        else:
            first = adapters_pb2.LoadAdapterRequest(
                name=name,
                path=path,
                pinned=body.pinned,
                task=body.task,
                chat_template=body.chat_template,
            )
            await self._adapters.load(first, exchange.call)
        await _succeed(exchange, name, "added successfully")

    async def unload(self, exchange: Exchange) -> None:
        """Remove ``lora_name`` once no request holds it."""
        name = _read(exchange, AdapterName).lora_name
        question = adapters_pb2.UnloadAdapterRequest(name=name)
        await self._adapters.unload(question, exchange.call)
        await _succeed(exchange, name, "removed successfully")

    async def pin(self, exchange: Exchange) -> None:
        """Keep ``lora_name`` in memory."""
        name = _read(exchange, AdapterName).lora_name
        await self._adapters.pin(adapters_pb2.PinAdapterRequest(name=name), exchange.call)
        await _succeed(exchange, name, "pinned")

    async def unpin(self, exchange: Exchange) -> None:
        """Let ``lora_name`` leave memory again."""
        name = _read(exchange, AdapterName).lora_name
        await self._adapters.unpin(adapters_pb2.UnpinAdapterRequest(name=name), exchange.call)
        await _succeed(exchange, name, "unpinned")


def _read(exchange: Exchange, kind: type[_B]) -> _B:
    sent: Sent[_B] = exchange.take_body()
    Violations(list(sent.wrong)).raise_if_any()
    assert isinstance(sent.body, kind)
    return sent.body


async def _succeed(exchange: Exchange, name: str, what: str) -> None:
    # vLLM's words.
    text = f"Success: LoRA adapter '{name}' {what}."
    await exchange.reply.whole(text.encode(), 200, _TEXT)
