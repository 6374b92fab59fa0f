"""An OpenTelemetry collector in this process, which keeps what a server exports."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import HistogramDataPoint
from opentelemetry.proto.trace.v1.trace_pb2 import Span


@dataclass(slots=True)
class Collector:
    """A collector, and the spans and histograms that it has received.

    Attributes:
        protocol: ``grpc`` or ``http/protobuf``.
        endpoint: The address for ``OTEL_EXPORTER_OTLP_ENDPOINT``.
    """

    protocol: str
    endpoint: str
    spans: list[Span] = field(default_factory=list)
    resources: list[dict[str, Any]] = field(default_factory=list)
    histograms: dict[str, list[HistogramDataPoint]] = field(default_factory=dict)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    @property
    def environment(self) -> dict[str, str]:
        """The variables for a server that exports to this collector, soon after each span."""
        return {
            "OTEL_EXPORTER_OTLP_PROTOCOL": self.protocol,
            "OTEL_EXPORTER_OTLP_ENDPOINT": self.endpoint,
            "OTEL_BSP_SCHEDULE_DELAY": "20",
            "OTEL_METRIC_EXPORT_INTERVAL": "100",
        }

    def take(self, request: trace_service_pb2.ExportTraceServiceRequest) -> None:
        with self._changed:
            for resource in request.resource_spans:
                self.resources.append(attributes(resource.resource.attributes))
                for scope in resource.scope_spans:
                    self.spans.extend(scope.spans)
            self._changed.notify_all()

    def take_metrics(self, request: metrics_service_pb2.ExportMetricsServiceRequest) -> None:
        with self._changed:
            for resource in request.resource_metrics:
                for scope in resource.scope_metrics:
                    for metric in scope.metrics:
                        self.histograms[metric.name] = list(metric.histogram.data_points)
            self._changed.notify_all()

    def wait_for(self, is_there: Callable[[], Any]) -> Any:
        """Wait until a function of the received data returns a true value, and return that."""
        with self._changed:
            found = self._changed.wait_for(is_there, 30)
        assert found, f"nothing of the kind in {self.histograms}"
        return found

    def span(self, value: str, key: str = "gen_ai.response.id") -> Span:
        """The span with this attribute, once it has arrived; there is only one."""

        def found() -> list[Span]:
            return [span for span in self.spans if attributes(span.attributes).get(key) == value]

        with self._changed:
            assert self._changed.wait_for(found, 30), f"no span has {key} {value}"
            (span,) = found()
            return span


def attributes(pairs: Any) -> dict[str, Any]:
    """Attributes as Python values."""
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    found = getattr(value, kind or "string_value")
    return [_value(each) for each in found.values] if kind == "array_value" else found


@contextlib.contextmanager
def collecting(protocol: str) -> Iterator[Collector]:
    """A collector that listens until the block ends."""
    with _over_grpc() if protocol == "grpc" else _over_http() as collector:
        yield collector


@contextlib.contextmanager
def _over_grpc() -> Iterator[Collector]:
    collector = Collector("grpc", "")

    class Servicer(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(
            self, request: trace_service_pb2.ExportTraceServiceRequest, context: Any
        ) -> trace_service_pb2.ExportTraceServiceResponse:
            collector.take(request)
            return trace_service_pb2.ExportTraceServiceResponse()

    class MetricsServicer(metrics_service_pb2_grpc.MetricsServiceServicer):
        def Export(
            self, request: metrics_service_pb2.ExportMetricsServiceRequest, context: Any
        ) -> metrics_service_pb2.ExportMetricsServiceResponse:
            collector.take_metrics(request)
            return metrics_service_pb2.ExportMetricsServiceResponse()

    server = grpc.server(ThreadPoolExecutor(1))
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(MetricsServicer(), server)
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Servicer(), server)
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(None).wait()


@contextlib.contextmanager
def _over_http() -> Iterator[Collector]:
    collector = Collector("http/protobuf", "")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/v1/traces":
                collector.take(trace_service_pb2.ExportTraceServiceRequest.FromString(body))
            else:
                assert self.path == "/v1/metrics"
                found = metrics_service_pb2.ExportMetricsServiceRequest.FromString(body)
                collector.take_metrics(found)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
