"""The server's state for the console, probes and metrics."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import defaultdict
from typing import Any

from prometheus_client.exposition import choose_encoder

import turret
from turret.server.http.endpoint import Exchange, Json
from turret.server.metrics import Metrics
from turret.v1 import adapters_pb2

_SPANS = {
    "turret_time_to_first_token_seconds": "first_token",
    "turret_inter_token_seconds": "inter_token",
    "turret_queue_seconds": "queue",
    "turret_step_seconds": "step",
}
_GAUGES = {
    "turret_sequences": ("sequences", "state"),
    "turret_kv_blocks": ("kv_blocks", "state"),
    "turret_adapter_bytes": ("adapter_bytes", "tier"),
}
_BY_ADAPTER = {
    "turret_requests_total": "requests",
    # Together these two count every token: the first one of an answer ends a wait, and each later
    # one ends a gap.
    "turret_adapter_time_to_first_token_seconds_count": "tokens",
    "turret_adapter_inter_token_seconds_count": "tokens",
}
_SAMPLES = (
    *(f"{name}_{end}" for name in _SPANS for end in ("sum", "count")),
    *_GAUGES,
    *_BY_ADAPTER,
)


def figures(metrics: Metrics) -> dict[str, Any]:
    """The current values of the metrics. Computing them takes milliseconds.

    Returns:
        ``{sum, count}`` in seconds by span (``first_token``, ``inter_token``, ``queue``, ``step``),
        counts by state (``sequences``, ``kv_blocks``), bytes by tier (``adapter_bytes``), and
        ``traffic`` by adapter label: the finished ``requests``, the failed ones among them
        (``errors``), and the ``tokens`` generated so far.
    """
    found: dict[str, Any] = {name: {"sum": 0.0, "count": 0} for name in _SPANS.values()}
    found |= {name: {} for name, _ in _GAUGES.values()}
    traffic: defaultdict[str, dict[str, float]] = defaultdict(
        lambda: {"requests": 0, "errors": 0, "tokens": 0}
    )
    families = metrics.registry.restricted_registry(_SAMPLES).collect()
    for sample in (sample for family in families for sample in family.samples):
        name, labels = sample.name, sample.labels
        if name in _GAUGES:
            group, label = _GAUGES[name]
            found[group][labels[label]] = sample.value
        elif name in _BY_ADAPTER:
            entry = traffic[labels["adapter"]]
            entry[_BY_ADAPTER[name]] += sample.value
            if labels.get("code", "OK") not in ("OK", "CANCELLED"):
                entry["errors"] += sample.value
        else:
            span, _, end = name.rpartition("_")
            # Steps have a series for each phase.
            found[_SPANS[span]][end] += sample.value
    return found | {"traffic": traffic}


# Maximum number of table rows; a search finds other adapters.
MAX_ADAPTERS = 200
MAX_SEARCH_CHARS = 128


async def state(exchange: Exchange) -> None:
    """Send the state. Each role gets only what it can also read from other paths.

    ``find`` in the query selects the adapters whose names contain it.

    Raises:
        UnauthenticatedError: The server requires a token, and the client sent none that it
            accepts.
        UnavailableError: The server is starting, is draining or has failed.
    """
    services, roles = exchange.services, exchange.roles()
    is_admin = "admin" in roles and exchange.has_admin
    found: dict[str, Any] = {
        "time": time.time(),
        # The page computes rates from this clock, because the wall clock may be set.
        "clock": time.monotonic(),
        "roles": sorted(roles),
        "manages_adapters": exchange.has_admin,
        "model": None,
        "adapters": None,
        "figures": None,
        "failures": None,
        "merged": None,
    }
    info = services.inference.model()
    if "inference" in roles:
        found["model"] = {
            "name": info.name,
            "dtype": info.dtype,
            "quantization": info.quantization,
            "max_model_len": info.max_model_len,
            "server_version": info.server_version,
        }
    if is_admin or "inference" in roles:
        text = exchange.request.query_params.get("find", "")[:MAX_SEARCH_CHARS]
        some = await services.adapters.find(text.strip().lower(), MAX_ADAPTERS, exchange.call)
        found["adapters"] = {
            "shown": [_row(adapter, is_admin) for adapter in some.shown],
            "matching": some.num_matching,
            "total": some.num_all,
        }
    if "metrics" in roles:
        found["figures"] = await asyncio.to_thread(figures, services.metrics)
    if is_admin:
        found["merged"] = _merged(services.adapters.merge_state())
        found["failures"] = [dataclasses.asdict(each) for each in services.failures][::-1]
    await exchange.reply.json(found, headers={"cache-control": "no-store"})


def _merged(state: adapters_pb2.MergeState) -> dict[str, Any] | None:
    """The fields of GetMergeState that the console shows; None if nothing is merged."""
    if not state.active:
        return None
    precision = adapters_pb2.MergeAdaptersRequest.Precision.Name(state.precision)
    return {
        "mix": ", ".join(f"{a.name}@{a.generation}={a.weight:g}" for a in state.adapters),
        "precision": precision.lower(),
        "base_generation": state.base_generation,
    }


def _row(adapter: adapters_pb2.Adapter, is_admin: bool) -> dict[str, Any]:
    """A table row: fields of /v1/models and, for an administrator, also of ListAdapters."""
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


async def health(exchange: Exchange) -> Json:
    """Whether requests are served.

    Raises:
        UnavailableError: The server is starting, is draining or has failed.
    """
    exchange.services.inference.model()
    return {"status": "ok"}


async def version(exchange: Exchange) -> Json:
    """The version of turret."""
    return {"version": turret.__version__}


async def metrics(exchange: Exchange) -> None:
    """Metrics for Prometheus."""
    encode, content_type = choose_encoder(exchange.request.headers.get("accept", ""))
    body = await asyncio.to_thread(encode, exchange.services.metrics.registry)
    await exchange.reply.whole(body, 200, {"content-type": content_type})
