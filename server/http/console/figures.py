"""The counters and gauges that the console draws: it makes rates of what grew between looks."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from turret.server.metrics import Metrics

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
    # Together they count every token: the first of an answer ends a wait, each later one a gap.
    "turret_adapter_time_to_first_token_seconds_count": "tokens",
    "turret_adapter_inter_token_seconds_count": "tokens",
}
_SAMPLES = (
    *(f"{name}_{end}" for name in _SPANS for end in ("sum", "count")),
    *_GAUGES,
    *_BY_ADAPTER,
)


def figures(metrics: Metrics) -> dict[str, Any]:
    """What the metrics hold now; takes milliseconds.

    Returns:
        ``{sum, count}`` in seconds by span (``first_token``, ``inter_token``, ``queue``, ``step``),
        counts by state (``sequences``, ``kv_blocks``), bytes by tier (``adapter_bytes``), and
        ``traffic``: by adapter label the finished ``requests``, those of them that failed
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
