"""Exports turret's histograms of requests by OTLP, under the names of OpenTelemetry's conventions.

The values are those of ``Metrics``, read at each export, so nothing is counted twice. Requires the
packages of ``turret[otel]``.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricsData,
    ResourceMetrics,
    ScopeMetrics,
)
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from prometheus_client import CollectorRegistry

from turret.server.basics.codes import Code
from turret.server.tracing import PROVIDER, operation_of, route_of

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import MetricExporter
    from opentelemetry.sdk.resources import Resource

_log = logging.getLogger(__name__)

_INTERVAL_VARIABLE, _INTERVAL_MILLISECONDS = "OTEL_METRIC_EXPORT_INTERVAL", 60_000.0
# turret's series → their names in OpenTelemetry's conventions.
_NAMES = {
    "turret_request_duration_seconds": "gen_ai.server.request.duration",
    "turret_time_to_first_token_seconds": "gen_ai.server.time_to_first_token",
    "turret_inter_token_seconds": "gen_ai.server.time_per_output_token",
}


class MetricsExport:
    """A thread that exports at an interval.

    Args:
        registry: The registry of ``Metrics``.
        exporter: Sends the values.
        resource: Describes the server.
    """

    def __init__(
        self, registry: CollectorRegistry, exporter: MetricExporter, resource: Resource
    ) -> None:
        self._registry, self._exporter, self._resource = registry, exporter, resource
        self._ended = threading.Event()
        self._started = time.time_ns()
        milliseconds = float(os.environ.get(_INTERVAL_VARIABLE) or _INTERVAL_MILLISECONDS)
        self._seconds = milliseconds / 1000
        self._thread = threading.Thread(target=self._run, name="otlp-metrics", daemon=True)
        self._thread.start()

    def close(self, seconds: float) -> None:
        """Export once more and end the thread; blocks for at most ``seconds``."""
        self._ended.set()
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._exporter.shutdown()

    def _run(self) -> None:
        while not self._ended.is_set():
            self._ended.wait(self._seconds)
            try:
                self._exporter.export(self._data())
            except Exception:
                _log.exception("cannot export metrics")

    def _data(self) -> MetricsData:
        metrics = [
            Metric(
                name,
                None,
                "s",
                Histogram([*self._points(series)], AggregationTemporality.CUMULATIVE),
            )
            for series, name in _NAMES.items()
        ]
        scope = ScopeMetrics(InstrumentationScope("turret"), metrics, "")
        return MetricsData([ResourceMetrics(self._resource, [scope], "")])

    def _points(self, series: str) -> Iterator[HistogramDataPoint]:
        now = time.time_ns()
        found: defaultdict[tuple[tuple[str, str], ...], dict[str, float]] = defaultdict(dict)
        names = [f"{series}_{end}" for end in ("bucket", "sum", "count")]
        for family in self._registry.restricted_registry(names).collect():
            for sample in family.samples:
                labels = dict(sample.labels)
                key = labels.pop("le", sample.name)
                found[tuple(labels.items())][key] = sample.value
        for labels, values in found.items():
            bounds = [key for key in values if not key.startswith(series)]
            counts = [values[bound] for bound in bounds]
            # Prometheus counts the values below each bound, OTLP the values between two bounds.
            each = [counts[0], *(after - before for before, after in itertools.pairwise(counts))]
            unknown: Any = None
            yield HistogramDataPoint(
                attributes=_attributes(dict(labels)),
                start_time_unix_nano=self._started,
                time_unix_nano=now,
                count=int(values[f"{series}_count"]),
                sum=values[f"{series}_sum"],
                bucket_counts=[int(count) for count in each],
                explicit_bounds=[float(bound) for bound in bounds[:-1]],
                min=unknown,
                max=unknown,
            )


def _attributes(labels: Mapping[str, str]) -> Mapping[str, Any]:
    found = {"gen_ai.provider.name": PROVIDER}
    if "method" in labels:
        method, code = labels["method"], labels["code"]
        found |= {"gen_ai.operation.name": operation_of(method), **route_of(method)}
        found |= {} if code == Code.OK.name else {"error.type": code}
    return found
