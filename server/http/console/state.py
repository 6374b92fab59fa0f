"""GET /console/state: what the console shows, as far as the visitor's roles reach."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from turret.server.api.admin.adapters import Adapters
from turret.server.api.faults import Failures
from turret.server.api.inference.inference import Inference
from turret.server.http.console.figures import figures
from turret.server.http.endpoint import Exchange
from turret.server.metrics import Metrics
from turret.v1 import adapters_pb2

# Maximum number of table rows; a search finds other adapters.
MAX_ADAPTERS = 200
MAX_SEARCH_CHARS = 128


class State:
    """Reports to each role, in one answer, what it can also read from other paths.

    Args:
        inference: Knows the base model.
        adapters: Knows the adapters.
        metrics: What is counted.
        failures: The last calls that failed.
        has_admin: Whether adapters can be managed here.
    """

    def __init__(
        self,
        inference: Inference,
        adapters: Adapters,
        *,
        metrics: Metrics,
        failures: Failures,
        has_admin: bool,
    ) -> None:
        self._inference = inference
        self._adapters = adapters
        self._metrics = metrics
        self._failures = failures
        self._has_admin = has_admin

    async def __call__(self, exchange: Exchange) -> None:
        """Everything; ``find`` in the query narrows the adapters to those whose name holds it.

        Raises:
            UnauthenticatedError: There are tokens, and the client sent none of them.
            UnavailableError: The server is starting, draining or dead.
        """
        roles = exchange.roles()
        is_admin = "admin" in roles and self._has_admin
        state: dict[str, Any] = {
            "time": time.time(),
            # The page computes rates from this clock, because the wall clock may be set.
            "clock": time.monotonic(),
            "roles": sorted(roles),
            "manages_adapters": self._has_admin,
            "model": None,
            "adapters": None,
            "figures": None,
            "failures": None,
            "merged": None,
        }
        info = self._inference.model()
        if "inference" in roles:
            state["model"] = {
                "name": info.name,
                "dtype": info.dtype,
                "quantization": info.quantization,
                "max_model_len": info.max_model_len,
                "server_version": info.server_version,
            }
        if is_admin or "inference" in roles:
            text = exchange.query.get("find", "")[:MAX_SEARCH_CHARS]
            found = await self._adapters.find(text.strip().lower(), MAX_ADAPTERS)
            state["adapters"] = {
                "shown": [_row(adapter, is_admin) for adapter in found.shown],
                "matching": found.num_matching,
                "total": found.num_all,
            }
        if "metrics" in roles:
            state["figures"] = await asyncio.to_thread(figures, self._metrics)
        if is_admin:
            state["merged"] = _merged(self._adapters.merge_state())
            state["failures"] = [
                {
                    "time": failure.time,
                    "method": failure.method,
                    "protocol": failure.protocol,
                    "request_id": failure.request_id,
                    "code": failure.code,
                    "reason": failure.reason,
                    "message": failure.message,
                    "adapters": list(failure.adapters),
                }
                for failure in self._failures.newest()
            ]
        await exchange.reply.json(state, headers={"cache-control": "no-store"})


def _merged(state: adapters_pb2.MergeState) -> dict[str, Any] | None:
    """The parts of GetMergeState to show; None if nothing is merged."""
    if not state.active:
        return None
    precision = adapters_pb2.MergeAdaptersRequest.Precision.Name(state.precision)
    return {
        "mix": ", ".join(f"{a.name}@{a.generation}={a.weight:g}" for a in state.adapters),
        "precision": precision.lower(),
        "base_generation": state.base_generation,
    }


def _row(adapter: adapters_pb2.Adapter, is_admin: bool) -> dict[str, Any]:
    """An adapter as in /v1/models, or for an administrator as in ListAdapters."""
    row = {
        "name": adapter.name,
        "method": adapter.method,
        "generation": adapter.generation,
        "residency": adapters_pb2.Adapter.Residency.Name(adapter.residency).lower(),
    }
    if not is_admin:
        return row
    return row | {
        "ranks": list(adapter.ranks),
        # The size of the adapter's files wherever it is loaded, as in `turret adapters list`.
        "bytes": adapter.bytes_disk,
        "pinned": adapter.pinned,
        "in_flight": adapter.in_flight,
        "warnings": list(adapter.warnings),
        "last_used": adapter.last_used_time.seconds if adapter.HasField("last_used_time") else None,
    }
