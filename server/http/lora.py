"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, with vLLM's fields, and pins."""

from __future__ import annotations

from turret.server.api.admin.adapters import Adapters
from turret.server.api.violations import Violations
from turret.server.http.bodies.fields import Fields
from turret.server.http.bodies.slips import refuse_if_wrong
from turret.server.http.exchange.endpoint import Exchange
from turret.v1 import adapters_pb2

NAMES = {"name": "lora_name", "path": "lora_path"}
_TEXT = {"content-type": "text/plain; charset=utf-8"}


class Lora:
    """Loads and unloads adapters of every method.

    Args:
        adapters: What does it.
    """

    def __init__(self, adapters: Adapters) -> None:
        self._adapters = adapters

    async def load(self, exchange: Exchange) -> None:
        """Register ``lora_path``, below the adapter root, as ``lora_name``."""
        violations = Violations()
        fields = Fields(exchange.take_body(), violations)
        name, path = _required(fields, "lora_name"), _required(fields, "lora_path")
        replaces, pinned = fields.flag("load_inplace"), fields.flag("pinned")
        task = fields.integer("task")
        if replaces and pinned:
            fields.refuse("pinned", "a new generation is pinned if the one before was")
        refuse_if_wrong(fields, exchange.names)
        if replaces:
            new = adapters_pb2.ReplaceAdapterRequest(name=name, path=path, task=task)
            await self._adapters.replace(new, exchange.call)
        else:
            first = adapters_pb2.LoadAdapterRequest(name=name, path=path, pinned=pinned, task=task)
            await self._adapters.load(first, exchange.call)
        await _say(exchange, f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, exchange: Exchange) -> None:
        """Remove ``lora_name`` once no request holds it."""
        name = _named(exchange)
        question = adapters_pb2.UnloadAdapterRequest(name=name)
        await self._adapters.unload(question, exchange.call)
        await _say(exchange, f"Success: LoRA adapter '{name}' removed successfully.")

    async def pin(self, exchange: Exchange) -> None:
        """Keep ``lora_name`` in memory."""
        name = _named(exchange)
        await self._adapters.pin(adapters_pb2.PinAdapterRequest(name=name), exchange.call)
        await _say(exchange, f"Success: LoRA adapter '{name}' pinned.")

    async def unpin(self, exchange: Exchange) -> None:
        """Let ``lora_name`` leave memory again."""
        name = _named(exchange)
        await self._adapters.unpin(adapters_pb2.UnpinAdapterRequest(name=name), exchange.call)
        await _say(exchange, f"Success: LoRA adapter '{name}' unpinned.")


def _named(exchange: Exchange) -> str:
    """The name in a body that holds nothing else."""
    violations = Violations()
    fields = Fields(exchange.take_body(), violations)
    name = _required(fields, "lora_name")
    refuse_if_wrong(fields, exchange.names)
    return name


def _required(fields: Fields, name: str) -> str:
    """A text that must be there."""
    if fields.is_null(name):
        fields.refuse(name, "must be set")
    return fields.text(name) or ""


async def _say(exchange: Exchange, text: str) -> None:
    await exchange.reply.whole(text.encode(), 200, _TEXT)
