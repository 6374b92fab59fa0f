"""GET /v1/models: the base model and the adapters on it."""

from __future__ import annotations

import time
from typing import Any

from turret.server.api.admin.adapter_message import MAX_PAGE_SIZE
from turret.server.api.admin.adapters import Adapters
from turret.server.api.inference.inference import Inference
from turret.server.basics.hub_id import BASE
from turret.server.errors import AdapterNotFoundError
from turret.server.http.bodies.model_names import parse_model
from turret.server.http.exchange.endpoint import Exchange
from turret.v1 import adapters_pb2

OWNER = "turret"


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
            adapters = " and ".join(f"GET /v1/models/{member.name}" for member in members)
            raise AdapterNotFoundError(
                f"{name[:200]!r} is a mix, and mixes are neither listed nor looked up; a request"
                f" may name it as its model if its adapters are there: {adapters[:400]}",
                metadata={"adapter": name[:200]},
            )
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
