"""OpenTelemetry: a span for each inference request, and histograms, exported by OTLP.

The standard ``OTEL_…`` variables configure the exporter, the sampler, the resource and the
propagators. Attributes follow the conventions for generative AI. No span contains text of a prompt
or an answer, nor a name that only the client knows.

The packages of ``turret[otel]`` are imported only with ``--otel``. Without it ``begin`` returns
None, and calls do nothing else for tracing.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import turret
from turret.server.basics.codes import Code

if TYPE_CHECKING:
    from opentelemetry.trace import Span
    from prometheus_client import CollectorRegistry

    from turret.server.engine.scheduling.request import AdapterUse, Output, Request

# Returns a call's headers or metadata, which may identify the caller's span.
Headers = Callable[[], Iterable[tuple[str, str | bytes]]]

# The packages that export by each protocol; the first protocol is the default.
_EXPORTERS = {
    "http/protobuf": "opentelemetry.exporter.otlp.proto.http",
    "grpc": "opentelemetry.exporter.otlp.proto.grpc",
}
PROTOCOLS = tuple(_EXPORTERS)
# The variable that chooses the protocol, and those of traces and metrics, which override it.
_PROTOCOL = "OTEL_EXPORTER_OTLP_PROTOCOL"
_TRACES_PROTOCOL = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
_METRICS_PROTOCOL = "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL"
PROTOCOL_VARIABLES = (_PROTOCOL, _TRACES_PROTOCOL, _METRICS_PROTOCOL)
# With the value ``none``, this variable turns the metrics off.
_METRICS_VARIABLE = "OTEL_METRICS_EXPORTER"
# The conventions' name for the system that generates, and the default name of the service.
PROVIDER = "turret"

# The operation that a method performs, by a word in its name. The first match counts.
_OPERATIONS = (
    (re.compile(r"chat|messages|responses"), "chat"),
    (re.compile(r"embed", re.IGNORECASE), "embeddings"),
    (re.compile(r"classify", re.IGNORECASE), "classify"),
    (re.compile(r"Score"), "score"),
)
TEXT_COMPLETION, CHAT = "text_completion", "chat"
# Only these codes are errors of the server. Spans of calls with other codes do not count as errors.
_SERVER_FAULTS = {
    *(Code.UNKNOWN, Code.DEADLINE_EXCEEDED, Code.UNIMPLEMENTED),
    *(Code.INTERNAL, Code.UNAVAILABLE, Code.DATA_LOSS),
}
_SECOND = 10**9  # nanoseconds
# Maximum number of a call's requests that its span lists; a call may have thousands of inputs.
_MOST_LISTED = 128


def missing_packages() -> bool:
    """Whether the packages of ``turret[otel]`` are missing."""
    try:
        return not all(map(importlib.util.find_spec, ("opentelemetry.sdk", *_EXPORTERS.values())))
    except ModuleNotFoundError:
        return True


def operation_of(method: str) -> str:
    """The name of a method's operation in OpenTelemetry's conventions."""
    found = (name for pattern, name in _OPERATIONS if pattern.search(method))
    return next(found, TEXT_COMPLETION)


class CallTrace:
    """The span of one call.

    Attributes:
        operation: The conventions' name for the operation of the call.
    """

    def __init__(self, span: Span, operation: str) -> None:
        self.operation = operation
        self._span = span
        self._base = ""
        self._uses: Sequence[AdapterUse] = ()
        self._has_token = False
        self._finish_reasons: list[str] = []
        self._cached_tokens = 0

    def submitted(self, request: Request, base: str, *, is_stream: bool) -> int:
        """Record a request's parameters, unless those of another request of the call are recorded.

        Returns:
            The time, for ``output``.
        """
        if not self._base:
            self._base = base
            self._span.set_attributes(_parameters(request, is_stream))
        return time.time_ns()

    def output(self, output: Output, submitted: int) -> None:
        """Record the values that the first or the last output of a request reports."""
        finish = output.finish
        if output.adapters_used and not self._uses:
            self._uses = output.adapters_used
        if output.token_ids and not self._has_token:
            self._has_token = True
            self._span.add_event("first_token")
        if finish is None:
            return
        self._uses = self._uses or finish.adapters_used
        self._cached_tokens += finish.usage.cached_tokens
        if len(self._finish_reasons) < _MOST_LISTED:
            self._finish_reasons.append(finish.reason.value)
            queued = round(finish.timing.queue_seconds * _SECOND)
            self._span.add_event("scheduled", timestamp=submitted + queued)

    def end(
        self,
        code: Code,
        *,
        reason: str | None,
        names: Sequence[str],
        request_id: str,
        prompt_tokens: int,
        generated_tokens: int,
    ) -> None:
        """End the span, once.

        Args:
            code: The status of the call.
            reason: The reason of the call's error.
            names: The names of its adapters that are registered; ``?`` for others.
            request_id: The id of the call.
            prompt_tokens: Tokens of all its prompts.
            generated_tokens: Tokens of all its answers.
        """
        from opentelemetry.trace import StatusCode

        span, uses = self._span, self._uses
        model = _mix((use.name, use.weight) for use in uses) or "+".join(names) or self._base
        found: dict[str, Any] = {
            "gen_ai.operation.name": self.operation,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": model,
            "gen_ai.response.id": request_id,
            "gen_ai.usage.input_tokens": prompt_tokens,
            "gen_ai.usage.output_tokens": generated_tokens,
            "turret.code": code.name,
        }
        if self._finish_reasons:
            found["gen_ai.response.finish_reasons"] = self._finish_reasons
            found["gen_ai.usage.cache_read.input_tokens"] = self._cached_tokens
            found["gen_ai.response.model"] = (
                _mix((f"{use.name}@{use.generation}", use.weight) for use in uses) or self._base
            )
        if uses:
            found |= {
                "turret.adapter.names": [use.name for use in uses],
                "turret.adapter.generations": [use.generation for use in uses],
                "turret.adapter.digests": [use.digest for use in uses],
                "turret.adapter.weights": [use.weight for use in uses],
            }
        if reason is not None:
            found["error.type"] = reason
        if code in _SERVER_FAULTS:
            span.set_status(StatusCode.ERROR, reason)
        span.set_attributes({name: value for name, value in found.items() if value != ""})
        span.update_name(f"{self.operation} {model}".rstrip())
        span.end()


def _mix(members: Iterable[tuple[str, float]]) -> str:
    """The members in the form of the field ``model``, with weights other than 1."""
    return "+".join(name if weight == 1 else f"{name}*{weight:g}" for name, weight in members)


def _parameters(request: Request, is_stream: bool) -> Mapping[str, Any]:
    """A request's parameters that are set, without texts such as stop strings."""
    if not request.generates:
        return {}
    sampling = request.sampling
    found = {
        "max_tokens": request.stop.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": float(sampling.top_k) or None,
        "presence_penalty": sampling.presence_penalty or None,
        "frequency_penalty": sampling.frequency_penalty or None,
        # An attribute is a signed integer of 64 bits, so leave out larger seeds.
        "seed": None if (sampling.seed or 0) >> 63 else sampling.seed,
        "stream": is_stream or None,
    }
    return {f"gen_ai.request.{name}": value for name, value in found.items() if value is not None}


def route_of(method: str) -> Mapping[str, str]:
    """The conventions' attributes for ``/package.Service/Method`` or ``VERB /path``."""
    verb, _, path = method.partition(" ")
    if path:
        return {"http.request.method": verb, "http.route": path}
    _, service, name = method.split("/")
    return {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}


class Tracing:
    """The tracer of a process, and the threads that export its spans and metrics.

    Requires the packages of ``turret[otel]``.

    Args:
        registry: The registry of ``Metrics``.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        from opentelemetry import propagate, trace
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        name = OTELResourceDetector().detect().attributes.get("service.name", PROVIDER)
        resource = Resource.create({"service.name": name, "service.version": turret.__version__})
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._exporter = _exporter("trace", _TRACES_PROTOCOL)
        self._processor = BatchSpanProcessor(self._exporter)
        provider.add_span_processor(self._processor)
        self._tracer = provider.get_tracer("turret", turret.__version__)
        self._extract = propagate.extract
        self._kind = trace.SpanKind.SERVER
        self._metrics = None
        if os.environ.get(_METRICS_VARIABLE) != "none":
            from turret.server.otlp_metrics import MetricsExport

            self._metrics = MetricsExport(
                registry, _exporter("metric", _METRICS_PROTOCOL), resource
            )

    def begin(self, method: str, headers: Headers) -> CallTrace | None:
        """Begin the span of a call; None if it is not sampled."""
        carrier = {name: value for name, value in headers() if isinstance(value, str)}
        span = self._tracer.start_span(
            method, self._extract(carrier), kind=self._kind, attributes=route_of(method)
        )
        return CallTrace(span, operation_of(method)) if span.is_recording() else None

    def close(self, seconds: float) -> None:
        """Export the last spans and metrics; blocks for at most ``seconds``."""
        end = time.monotonic() + seconds
        # The processor's shutdown has no time limit and may take longer, so it runs on another
        # thread.
        ending = threading.Thread(target=self._processor.shutdown, daemon=True)
        ending.start()
        if self._metrics is not None:
            self._metrics.close(seconds)
        ending.join(max(end - time.monotonic(), 0))
        if ending.is_alive():
            self._exporter.shutdown()


def _exporter(signal: Literal["trace", "metric"], variable: str) -> Any:
    """The exporter of a signal; ``variable`` may choose another protocol for it."""
    protocol = os.environ.get(variable) or os.environ.get(_PROTOCOL) or PROTOCOLS[0]
    module = importlib.import_module(f"{_EXPORTERS[protocol]}.{signal}_exporter")
    options = {}
    # A program that provides credentials also provides the session.
    if protocol == PROTOCOLS[0] and not any("CREDENTIAL_PROVIDER" in name for name in os.environ):
        import requests

        options["session"] = session = requests.Session()
        # The bodies of answers are not needed, and could be endless.
        session.stream = True
    kind = module.OTLPSpanExporter if signal == "trace" else module.OTLPMetricExporter
    return kind(**options)


# One tracer per process, like OpenTelemetry's own providers.
_tracing: Tracing | None = None


def start(registry: CollectorRegistry) -> None:
    """Trace the calls of this process, and export the metrics of a registry."""
    global _tracing
    _tracing = Tracing(registry)


def begin(method: str, headers: Headers) -> CallTrace | None:
    """Begin the span of a call; None if this process or this call is not traced."""
    return None if _tracing is None else _tracing.begin(method, headers)


def stop(seconds: float) -> None:
    """Export the last spans and metrics, and stop tracing; blocks for at most ``seconds``."""
    global _tracing
    tracing, _tracing = _tracing, None
    if tracing is not None:
        tracing.close(seconds)
