"""Spans of a real server, as a collector in this process receives them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
from checkout import ROOT, line_that_hides_extras
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from servers.collector import Collector, attributes, collecting
from servers.server_under_test import ServerUnderTest, start_server

from turret.clients.client import TurretClient
from turret.server import tracing
from turret.v1 import adapters_pb2, inference_pb2, inference_pb2_grpc

EXAMPLES = ROOT / "examples" / "adapters"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
SECRET = "xylophone"
TRAINED = "headline-rslora"
FLAGS = ("--adapter-root", str(EXAMPLES), "--preload", f"trained={TRAINED}")
FLAGS += ("--preload", "sql=sql", "--preload", "json=json")
FLAGS += ("--http-address", "127.0.0.1:0", "--otel")


@pytest.fixture(scope="module", params=["http/protobuf", "grpc"])
def traced(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ServerUnderTest, Collector]]:
    with collecting(request.param) as collector:
        folder = tmp_path_factory.mktemp("traced")
        with start_server(folder, *FLAGS, environment=collector.environment) as server:
            yield server, collector


@pytest.fixture
def server(traced: tuple[ServerUnderTest, Collector]) -> ServerUnderTest:
    return traced[0]


@pytest.fixture
def collector(traced: tuple[ServerUnderTest, Collector]) -> Collector:
    return traced[1]


def post(server: ServerUnderTest, path: str, body: Any, **headers: str) -> dict[str, Any]:
    request = urllib.request.Request(
        f"http://{server.http_address}{path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", **headers},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@contextlib.contextmanager
def stub(server: ServerUnderTest) -> Iterator[inference_pb2_grpc.InferenceStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield inference_pb2_grpc.InferenceStub(channel)


def asked(request_id: str, *names: str) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        request_id=request_id,
        prompt=f"{SECRET} is",
        adapters=[adapters_pb2.AdapterWeight(name=name) for name in names],
        stop=inference_pb2.StopConditions(max_tokens=3, stop_strings=[SECRET], ignore_eos=True),
    )


def events(span: Span) -> dict[str, int]:
    return {event.name: event.time_unix_nano for event in span.events}


def test_a_request_over_grpc_has_a_span(server: ServerUnderTest, collector: Collector) -> None:
    with stub(server) as calls:
        message = asked("a-grpc-call", "sql")
        message.sampling.temperature = 0.5
        list(calls.GenerateStream(message, metadata=[("traceparent", TRACEPARENT)]))
    span = collector.span("a-grpc-call")
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert span.kind == Span.SPAN_KIND_SERVER
    assert span.name == "text_completion sql"
    found = attributes(span.attributes)
    with TurretClient(server.address) as client:
        base, sql = client.get_model().name, client.adapters.get("sql")
    assert found.pop("turret.adapter.weights") == [1.0]
    assert found.pop("gen_ai.usage.cache_read.input_tokens") >= 0
    assert found.pop("gen_ai.usage.input_tokens") > 1
    assert found == {
        "rpc.system": "grpc",
        "rpc.service": "turret.v1.Inference",
        "rpc.method": "GenerateStream",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "turret",
        "gen_ai.request.model": "sql",
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.stream": True,
        "gen_ai.response.id": "a-grpc-call",
        "gen_ai.response.model": "sql@1",
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.output_tokens": 3,
        "turret.adapter.names": ["sql"],
        "turret.adapter.generations": [1],
        "turret.adapter.digests": [sql.digest],
        "turret.code": "OK",
    }
    at = events(span)
    assert span.start_time_unix_nano < at["scheduled"] < at["first_token"] < span.end_time_unix_nano
    assert span.status.code == Status.STATUS_CODE_UNSET
    assert collector.resources[0]["service.name"] == "turret"
    assert base


def test_a_request_over_http_has_a_span(server: ServerUnderTest, collector: Collector) -> None:
    body = {
        "model": "sql+json*-0.5",
        "messages": [{"role": "user", "content": SECRET}],
        "max_tokens": 2,
        "n": 2,
        "user": SECRET,
    }
    answer = post(server, "/v1/chat/completions", body, traceparent=TRACEPARENT)
    span = collector.span(answer["id"].removeprefix("chatcmpl-"))
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert span.name == "chat sql+json*-0.5"
    found = attributes(span.attributes)
    assert found["http.route"] == "/v1/chat/completions"
    assert found["gen_ai.response.model"] == "sql@1+json@1*-0.5"
    assert len(found["gen_ai.response.finish_reasons"]) == 2
    assert found["gen_ai.usage.output_tokens"] == answer["usage"]["completion_tokens"]
    used = [use["digest"] for use in answer["adapters_used"]]
    assert found["turret.adapter.digests"] == used
    assert "gen_ai.request.stream" not in found


def test_the_digest_of_an_adapter_is_the_same_everywhere(
    server: ServerUnderTest, collector: Collector
) -> None:
    """In the files that training writes, the log, ``GetAdapter``, answers and spans."""
    provenance = json.loads((EXAMPLES / TRAINED / "provenance.json").read_text())
    digest = provenance["adapter"]["digest"]
    (line,) = (
        line
        for line in server.log.read_text().splitlines()
        if "adapter read" in line and "adapter=trained " in line
    )
    assert f" digest={digest} " in f"{line} "
    with TurretClient(server.address) as client:
        assert client.adapters.get("trained").digest == digest
        answer = client.generate("a", adapters=["trained"], max_tokens=1)
    assert [use.digest for use in answer.adapters_used] == [digest]
    body = {"model": "trained", "prompt": "a", "max_tokens": 1}
    over_http = post(server, "/v1/completions", body)
    assert [use["digest"] for use in over_http["adapters_used"]] == [digest]
    for request_id in (answer.request_id, over_http["id"].removeprefix("cmpl-")):
        found = attributes(collector.span(request_id).attributes)
        assert found["turret.adapter.digests"] == [digest]


def test_operations_have_the_names_of_the_semantic_conventions(
    server: ServerUnderTest, collector: Collector
) -> None:
    chat = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content="hi")])
    with stub(server) as calls:
        calls.Generate(
            inference_pb2.GenerateRequest(
                request_id="chat", chat=chat, stop=inference_pb2.StopConditions(max_tokens=1)
            )
        )
        calls.Score(inference_pb2.ScoreRequest(request_id="score", prompt="a b"))
        inputs = [inference_pb2.Input(prompt=text) for text in ("a", "b")]
        calls.Embed(inference_pb2.EmbedRequest(request_id="embed", inputs=inputs))
        base = calls.GetModel(inference_pb2.GetModelRequest()).name
    names = {key: collector.span(key).name for key in ("chat", "score")}
    assert names == {"chat": f"chat {base}", "score": f"score {base}"}
    assert collector.span("Embed", "rpc.method").name == f"embeddings {base}"
    # Other calls have no span.
    assert not any("GetModel" in str(span) for span in collector.spans)


def test_otel_histograms_match_the_servers_own(
    server: ServerUnderTest, collector: Collector
) -> None:
    with stub(server) as calls:
        calls.Generate(asked("counted", "sql"))
    method = {"method": "/turret.v1.Inference/Generate", "code": "OK"}
    count = server.metric("turret_request_duration_seconds_count", **method)

    def arrived() -> Any:
        return [
            point
            for point in collector.histograms.get("gen_ai.server.request.duration", ())
            if attributes(point.attributes).get("rpc.method") == "Generate"
            and "error.type" not in attributes(point.attributes)
            and point.count == count
        ]

    (point,) = collector.wait_for(arrived)
    found = attributes(point.attributes)
    assert found["gen_ai.operation.name"] == "text_completion"
    assert point.sum == server.metric("turret_request_duration_seconds_sum", **method)
    assert sum(point.bucket_counts) == count
    assert len(point.bucket_counts) == len(point.explicit_bounds) + 1
    below = sum(
        number
        for number, bound in zip(point.bucket_counts, point.explicit_bounds, strict=False)
        if bound <= 2.56
    )
    assert below == server.metric("turret_request_duration_seconds_bucket", le="2.56", **method)
    names = ("time_to_first_token", "time_per_output_token")
    assert all(collector.histograms[f"gen_ai.server.{name}"][0].count for name in names)


def test_errors_have_a_reason_and_no_text_of_the_client(
    server: ServerUnderTest, collector: Collector
) -> None:
    with stub(server) as calls:
        with pytest.raises(grpc.RpcError):
            calls.Generate(asked("", SECRET), metadata=[("x-request-id", "unknown")])
        late = asked("late", "sql")
        late.stop.max_tokens = 2000
        with pytest.raises(grpc.RpcError):
            calls.Generate(late, timeout=0.3)
    unknown = attributes(collector.span("unknown").attributes)
    assert unknown["error.type"] == "ADAPTER_NOT_FOUND"
    assert unknown["turret.code"] == "NOT_FOUND"
    assert unknown["gen_ai.request.model"] == "?"
    assert collector.span("unknown").status.code == Status.STATUS_CODE_UNSET
    late_span = collector.span("late")
    assert attributes(late_span.attributes)["turret.code"] == "DEADLINE_EXCEEDED"
    assert late_span.status.code == Status.STATUS_CODE_ERROR
    request = urllib.request.Request(
        f"http://{server.http_address}/v1/chat/completions",
        b"{",
        {"Content-Type": "application/json", "x-request-id": "broken"},
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    refused.value.close()
    assert "error.type" in attributes(collector.span("broken").attributes)
    assert SECRET not in str(collector.spans)


def test_a_caller_that_does_not_sample_gets_no_span(
    server: ServerUnderTest, collector: Collector
) -> None:
    with stub(server) as calls:
        calls.Generate(asked("unsampled"), metadata=[("traceparent", f"{TRACEPARENT[:-1]}0")])
        calls.Generate(asked("sampled"), metadata=[("traceparent", TRACEPARENT)])
    collector.span("sampled")
    assert "unsampled" not in str(collector.spans)


def test_the_last_spans_are_sent_and_a_dead_collector_delays_nothing(tmp_path: Path) -> None:
    with collecting("http/protobuf") as collector:
        # Spans would wait for an hour.
        environment = {**collector.environment, "OTEL_BSP_SCHEDULE_DELAY": "3600000"}
        environment["OTEL_METRIC_EXPORT_INTERVAL"] = "3600000"
        with start_server(tmp_path, *FLAGS, environment=environment) as server:
            with stub(server) as calls:
                calls.Generate(asked("last"))
            assert not collector.spans
        collector.span("last")
        assert collector.histograms["gen_ai.server.time_to_first_token"][0].count == 1
    # This collector accepts connections, but never answers.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environment["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{silent.getsockname()[1]}"
        environment["OTEL_BSP_SCHEDULE_DELAY"] = "20"
        with start_server(tmp_path, *FLAGS, environment=environment) as server:
            with stub(server) as calls:
                for number in range(5):
                    calls.Generate(asked(f"to-nobody-{number}"))
            server.process.send_signal(signal.SIGTERM)
            start = time.monotonic()
            assert server.process.wait(60) == 0
            # The server waits two seconds for the last spans; the exporter would wait for ten.
            assert time.monotonic() - start < 8


def test_the_body_of_a_collectors_answer_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    size, sent = 64 << 20, [0]

    class Endless(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.send_header("content-length", str(size))
            self.end_headers()
            with contextlib.suppress(OSError):
                while sent[0] < size:
                    sent[0] += self.wfile.write(bytes(1 << 16))

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Endless) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        endpoint = f"http://127.0.0.1:{server.server_port}/v1/traces"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        exporter = tracing._exporter("trace", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
        exporter.export([])
        exporter.shutdown()
        thread.join(60)
    # The rest is in the buffers of the connection.
    assert 0 < sent[0] < size // 2


def test_the_flag_needs_the_extra(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(line_that_hides_extras())
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT / 'src'}"}
    command = [sys.executable, "-m", "turret.server.cli", "serve", "--otel", "--log-format", "json"]
    # Other servers may use the default ports.
    command += ["--address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    said = [json.loads(line) for line in done.stderr.splitlines()]
    assert [(line["field"], line["reason"]) for line in said] == [("--otel", "NOT_INSTALLED")]
