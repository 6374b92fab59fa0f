"""The series, their aliases, the bounded adapter label, and the endpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from servers.rpc_harness import harness

from turret.server import metrics_server
from turret.server.api.access import TokenTable
from turret.server.basics.settings import split_address
from turret.server.metrics import VLLM, Metrics, add_aliases
from turret.server.metrics_server import MAX_CONNECTIONS, MAX_REQUEST_BYTES, MetricsServer
from turret.v1 import adapters_pb2, inference_pb2


def scrape(address: str, token: str | None = None) -> str:
    request = urllib.request.Request(f"http://{address}/metrics")
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.read().decode()


def serving(
    metrics: Metrics, address: str = "127.0.0.1:0", tokens: TokenTable | None = None, **ports: int
) -> contextlib.closing[MetricsServer]:
    return contextlib.closing(MetricsServer(metrics, address, tokens, **ports))


def test_the_endpoint_exposes_what_was_counted() -> None:
    """The table in docs/operations.md lists all series and labels."""
    metrics = Metrics()
    metrics.adapter_registered("sql")
    metrics.adapter_residency("sql", "host")
    metrics.tokens(["sql"], prompt=5, generated=7)
    metrics.inter_token(0.003, ["sql"])
    metrics.kv_blocks(free=3, used=4)
    metrics.adapters_in_use(most=8, running=["sql", "json"], waiting=[])
    metrics.preemptions.inc(2)
    metrics.draft_tokens.inc(5)
    metrics.accepted_tokens.inc(3)
    for result, count in (("hit", 16), ("miss", 4)):
        metrics.prefix_tokens.labels(result).inc(count)
    with serving(metrics) as server:
        families = text_string_to_metric_families(scrape(server.address))
    values = {(s.name, *sorted(s.labels.values())): s.value for f in families for s in f.samples}
    assert values["turret_generated_tokens_total", "sql"] == 7
    assert values["turret_kv_blocks", "used"] == 4
    assert values["turret_kv_usage_ratio",] == 4 / 7
    assert abs(values["turret_adapters_info", "", "8", "json,sql"] - time.time()) < 60
    assert values["turret_adapter_inter_token_seconds_count", "sql"] == 1
    assert values["turret_preemptions_total",] == 2
    assert values["turret_spec_decode_num_draft_tokens_total",] == 5
    assert values["turret_spec_decode_num_accepted_tokens_total",] == 3
    assert values["turret_prefix_cache_tokens_total", "hit"] == 16
    assert values["turret_adapter_residency", "host", "sql"] == 1
    assert values["turret_adapter_residency", "disk", "sql"] == 0


def test_two_servers_share_nothing_and_a_closed_endpoint_is_closed() -> None:
    first, second = Metrics(), Metrics()
    first.request_finished([], "OK")
    assert second.registry.get_sample_value("turret_requests_total") is None
    with serving(second) as again:
        with serving(first) as server:
            threads = threading.active_count()
        assert threading.active_count() == threads - 1
        with pytest.raises(urllib.error.URLError):
            scrape(server.address)
        assert "turret_step_tokens" in scrape(again.address)


def _requests(metrics: Metrics) -> dict[str, float]:
    return {
        sample.labels["adapter"]: sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "turret_requests_total"
    }


def test_the_adapter_label_is_bounded() -> None:
    metrics = Metrics(max_adapter_labels=3)
    names = [f"a{n}" for n in range(50)]
    for name in names:
        metrics.adapter_registered(name)
    for name in [*names, "never-registered", "x" * 500]:
        metrics.request_finished([name], "OK")
    metrics.request_finished([], "OK")
    assert _requests(metrics) == {"a0": 1, "a1": 1, "a2": 1, "other": 49, "base": 1}
    disk = {"adapter": "other", "tier": "disk"}
    assert metrics.registry.get_sample_value("turret_adapter_residency", disk) == 47
    metrics.adapter_residency("a40", "host")
    assert metrics.registry.get_sample_value("turret_adapter_residency", disk) == 46


def test_private_names_are_in_no_label() -> None:
    metrics, name = Metrics(), f"training/{'a1' * 16}/0"
    metrics.adapter_registered(name)
    metrics.request_finished([name], "OK")
    assert _requests(metrics) == {"other": 1}
    metrics.adapters_in_use(most=8, running=[name, "a"], waiting=[name])
    assert name.encode() not in generate_latest(metrics.registry)
    metrics.adapter_removed(name)


@pytest.mark.parametrize(
    ("registered", "requests", "counts"),
    [
        (["a", "b"], [["a", "b", "unknown", "unknown2"]], {"a": 1, "b": 1, "other": 1}),
        # Adapters may have the names of the shared labels.
        (
            ["base", "other"],
            [["base"], ["other"], []],
            {"adapter:base": 1, "adapter:other": 1, "base": 1},
        ),
    ],
)
def test_a_request_counts_once_per_label(
    registered: list[str], requests: list[list[str]], counts: dict[str, float]
) -> None:
    metrics = Metrics()
    for name in registered:
        metrics.adapter_registered(name)
    for names in requests:
        metrics.request_finished(names, "OK")
    assert _requests(metrics) == counts


def test_times_of_a_mix_count_once_in_total_and_once_for_each_member() -> None:
    metrics = Metrics(max_adapter_labels=2)
    for name in ("a", "b", "c", "d"):
        metrics.adapter_registered(name)
    for names in ([], ["a"], ["a", "b"], ["c", "d", "unknown"]):
        metrics.first_token(0.5, names)
        metrics.inter_token(0.5, names)
    for series in ("time_to_first_token", "inter_token"):
        count = f"turret_{series}_seconds_count"
        assert metrics.registry.get_sample_value(count) == 4
        counts = {
            label: metrics.registry.get_sample_value(
                count.replace("turret_", "turret_adapter_"), {"adapter": label}
            )
            for label in ("base", "a", "b", "c", "other")
        }
        assert counts == {"base": 1, "a": 2, "b": 1, "c": None, "other": 1}


@pytest.mark.parametrize("seconds", [0.0005, 0.001, 0.004, 7.0])
def test_equal_gaps_count_like_single_ones(seconds: float) -> None:
    together, singly = Metrics(), Metrics()
    for metrics in (together, singly):
        metrics.adapter_registered("sql")
    together.inter_token(seconds, ["sql"], 3)
    for _ in range(3):
        singly.inter_token(seconds, ["sql"])
        # The same by the library's own method.
        singly._inter_token.observe(seconds)
    together.inter_token(seconds, [], 3)

    def total(metrics: Metrics) -> dict[str, float]:
        return {
            f"{sample.name} {sample.labels.get('le', '')}": sample.value
            for family in metrics.registry.collect()
            if family.name == "turret_inter_token_seconds"
            for sample in family.samples
            if not sample.name.endswith("_created")
        }

    assert total(together) == pytest.approx(total(singly))
    count = "turret_adapter_inter_token_seconds_count"
    assert together.registry.get_sample_value(count, {"adapter": "sql"}) == 3


def test_adapters_in_use_are_one_series_of_limited_length() -> None:
    metrics = Metrics()

    def labels() -> list[dict[str, str]]:
        families = metrics.registry.collect()
        (family,) = (f for f in families if f.name == "turret_adapters_info")
        return [sample.labels for sample in family.samples]

    assert labels() == []
    metrics.adapters_in_use(most=64, running={"b", "a"}, waiting={"c"})
    first = {"max_lora": "64", "running_lora_adapters": "a,b", "waiting_lora_adapters": "c"}
    assert labels() == [first]
    metrics.adapters_in_use(most=64, running={"b", "a"}, waiting={"c"})
    assert labels() == [first]
    metrics.adapters_in_use(most=64, running=(f"n{i:04}" for i in range(900)), waiting=())
    (label,) = labels()
    assert label["running_lora_adapters"].split(",") == [f"n{i:04}" for i in range(100)]
    metrics.adapters_in_use(most=64, running=(), waiting=())
    assert [label["running_lora_adapters"] for label in labels()] == [""]


def test_unloading_an_adapter_removes_its_series_and_frees_its_label() -> None:
    metrics = Metrics(max_adapter_labels=1)
    for name in ("first", "second"):
        metrics.adapter_registered(name, "host")
        for code in ("OK", "CANCELLED", "INVALID_ARGUMENT"):
            metrics.request_finished([name], code)
        metrics.tokens([name], prompt=1, generated=1)
        metrics.first_token(0.1, [name])
        metrics.inter_token(0.1, [name])
    metrics.adapter_residency("first", "device")
    metrics.adapter_removed("first")
    metrics.adapter_removed("first")
    labels = {
        sample.labels["adapter"]
        for family in metrics.registry.collect()
        for sample in family.samples
        if "adapter" in sample.labels
    }
    assert labels == {"other"}
    metrics.request_finished(["first"], "OK")
    metrics.adapter_registered("third")
    metrics.request_finished(["third"], "OK")
    assert _requests(metrics).keys() == {"other", "third"}


async def test_only_calls_that_name_adapters_are_counted() -> None:
    generate = inference_pb2.GenerateRequest(
        prompt="a", adapters=[adapters_pb2.AdapterWeight(name="sql")]
    )
    async with harness() as server:
        server.metrics.adapter_registered("sql")
        await server.inference.Generate(generate)
        async for _ in server.inference.GenerateStream(generate):
            pass
        await server.inference.Score(inference_pb2.ScoreRequest(prompt="a"))
        await server.inference.GetModel(inference_pb2.GetModelRequest())
        await server.adapters.ListAdapters(adapters_pb2.ListAdaptersRequest())
        assert _requests(server.metrics) == {"sql": 2, "base": 1}
        durations = "turret_request_duration_seconds"
        for name, count in (
            ("Generate", 1),
            ("GenerateStream", 1),
            ("Score", 1),
            ("GetModel", None),
        ):
            of = {"method": f"/turret.v1.Inference/{name}", "code": "OK"}
            assert server.sample(f"{durations}_count", **of) == count
        # Two requests with one prompt token each, and answers of two tokens each.
        assert server.sample("turret_prompt_tokens_total", adapter="sql") == 2
        assert server.sample("turret_generated_tokens_total", adapter="sql") == 4


@dataclasses.dataclass
class Endpoint:
    """The state that the picker keeps of a server, with its names and defaults."""

    waiting: int
    running: int
    kv_usage: float
    max_loras: int = 0
    active: frozenset[str] = frozenset()
    queued: frozenset[str] = frozenset()
    block_size: int = 0
    num_blocks: int = 0
    loaded: dict[str, str] = dataclasses.field(default_factory=dict)
    num_on_gpu: int | None = None
    base: str = ""


def extract(text: str) -> Endpoint:
    """Read a scrape by the rules of the metric protocol for vLLM.

    A gauge without a match is an error, except those of adapters. Of several series of
    ``lora_requests_info`` the one with the largest value counts. Numbers in labels are integers,
    and lists have commas, perhaps with spaces.
    """
    families: dict[str, Metric] = {each.name: each for each in text_string_to_metric_families(text)}

    def gauge(name: str) -> float:
        family = families[f"vllm:{name}"]
        assert family.type == "gauge"
        return family.samples[0].value

    def names(text: str) -> frozenset[str]:
        return frozenset(filter(None, (part.strip() for part in text.split(","))))

    found = Endpoint(
        int(gauge("num_requests_waiting")),
        int(gauge("num_requests_running")),
        gauge("kv_cache_usage_perc"),
    )
    cache = families["vllm:cache_config_info"].samples[0].labels
    found.block_size, found.num_blocks = int(cache["block_size"]), int(cache["num_gpu_blocks"])
    if requests := families.get("vllm:lora_requests_info"):
        latest = max(requests.samples, key=lambda sample: sample.value)
        found.max_loras = int(latest.labels["max_lora"])
        found.active = names(latest.labels["running_lora_adapters"])
        found.queued = names(latest.labels["waiting_lora_adapters"])
    for sample in getattr(families.get("vllm:lora_adapter_loaded"), "samples", ()):
        if sample.value:
            found.loaded[sample.labels["adapter_name"]] = sample.labels["level"]
    if count := families.get("vllm:num_gpu_loaded_lora_adapters"):
        found.num_on_gpu, found.base = (
            int(count.samples[0].value),
            count.samples[0].labels["model_name"],
        )
        assert gauge("max_gpu_lora_adapters") == found.max_loras
    return found


def aliased() -> Metrics:
    metrics = Metrics(max_adapter_labels=3)
    add_aliases(metrics.registry, VLLM)
    return metrics


def scraped(metrics: Metrics) -> str:
    return generate_latest(metrics.registry).decode()


def test_an_endpoint_picker_reads_turrets_counts() -> None:
    metrics = aliased()
    metrics.info("1", "smol", "bfloat16", "nf4")
    metrics.sequences(waiting=3, running=2)
    metrics.kv_blocks(free=6, used=2)
    metrics.kv_cache_info.labels("16", "8").set(1)
    metrics.adapters_in_use(most=64, running=["sql"], waiting=["json", "base"])
    for name, tier in (("sql", "device"), ("json", "host"), ("base", "device"), ("late", "device")):
        metrics.adapter_registered(name, tier)
    metrics.adapter_registered("cold")
    # This leaves a series of value 0.
    metrics.adapter_residency("json", "device")
    metrics.adapter_residency("json", "host")
    assert extract(scraped(metrics)) == Endpoint(
        waiting=3,
        running=2,
        kv_usage=0.25,
        max_loras=64,
        active=frozenset({"sql"}),
        queued=frozenset({"json", "base"}),
        block_size=16,
        num_blocks=8,
        # "late" has no label value of its own.
        loaded={"sql": "gpu", "json": "cpu", "base": "gpu"},
        num_on_gpu=3,
        base="smol",
    )
    waiting = metrics.registry.get_sample_value("vllm:num_requests_waiting", {"model_name": "smol"})
    assert waiting == 3


def test_before_the_model_is_loaded_a_server_does_not_seem_idle() -> None:
    with pytest.raises(KeyError):
        extract(scraped(aliased()))


def test_metric_aliases_are_exposed_only_on_request() -> None:
    metrics = Metrics()
    add_aliases(metrics.registry, None)
    metrics.sequences(waiting=3, running=2)
    assert "vllm:" not in scraped(metrics)


TIMEOUT_SECONDS = 1.0
GET = b"GET /metrics HTTP/1.1\r\n"


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[MetricsServer]:
    monkeypatch.setattr(metrics_server, "TIMEOUT_SECONDS", TIMEOUT_SECONDS)
    with serving(Metrics()) as started:
        yield started


def connect(endpoint: MetricsServer) -> socket.socket:
    return socket.create_connection(split_address(endpoint.address), timeout=10)


def status_of(endpoint: MetricsServer, request: bytes) -> bytes:
    """The first line of the answer; empty if the server closed the connection without one."""
    with connect(endpoint) as client:
        client.sendall(request)
        return read_all(client).partition(b"\r\n")[0]


def read_all(client: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while data := client.recv(1 << 16):
            received += data
    return received


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_unfinished_requests_are_limited_and_time_out(endpoint: MetricsServer) -> None:
    scrape(endpoint.address)
    threads, descriptors = threading.active_count(), num_descriptors()
    clients = [connect(endpoint) for _ in range(3 * MAX_CONNECTIONS)]
    for client in clients:
        client.sendall(GET)
    assert threading.active_count() == threads
    start = time.monotonic()
    for client in clients:
        assert read_all(client) == b""
    assert time.monotonic() - start < 5 * TIMEOUT_SECONDS
    for client in clients:
        client.close()
    assert num_descriptors() <= descriptors
    assert "turret_step_tokens" in scrape(endpoint.address)


@pytest.mark.parametrize(
    ("host", "status"),
    [(b"localhost:9464", b"200"), (b"127.0.0.1:9464", b"200"), (b"evil.example:9464", b"421")],
)
def test_a_rebound_host_name_is_rejected_on_loopback(
    endpoint: MetricsServer, host: bytes, status: bytes
) -> None:
    assert status_of(endpoint, GET + b"Host: %b\r\n\r\n" % host).split()[1] == status


@pytest.mark.parametrize(
    ("address", "tokens"), [("0.0.0.0:0", None), ("127.0.0.1:0", "t metrics")], ids=str
)
def test_other_endpoints_accept_any_host_name(
    address: str, tokens: str | None, tmp_path: Path
) -> None:
    """Scrapers in a cluster may use a name, and a web page has no token."""
    table = None
    if tokens is not None:
        (tmp_path / "tokens").write_text(tokens)
        table = TokenTable.parse(tmp_path / "tokens")
    request = GET + b"Host: turret.svc\r\nAuthorization: Bearer t\r\n\r\n"
    with serving(Metrics(), address, table) as server:
        assert status_of(server, request).split()[1] == b"200"


def test_the_number_of_open_connections_is_limited(endpoint: MetricsServer) -> None:
    waiting = [connect(endpoint) for _ in range(MAX_CONNECTIONS)]
    time.sleep(0.2)
    with connect(endpoint) as refused:
        start = time.monotonic()
        assert read_all(refused) == b""
        assert time.monotonic() - start < TIMEOUT_SECONDS / 2
    for client in waiting:
        client.close()
    time.sleep(0.2)
    assert "turret_step_tokens" in scrape(endpoint.address)


def test_slow_writers_and_silent_readers_are_timed_out(
    endpoint: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connect(endpoint) as client:
        start = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - start < 10:
                client.sendall(b"x")
                time.sleep(0.05)
        assert time.monotonic() - start < 5
    # More than the system's buffers hold.
    body = b"#" * (64 << 20)
    monkeypatch.setattr(metrics_server, "choose_encoder", lambda _: (lambda _: body, "text/plain"))
    with connect(endpoint) as client:
        client.sendall(GET + b"\r\n")
        time.sleep(3 * TIMEOUT_SECONDS)
        assert len(read_all(client)) < len(body)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (GET + b"\r\n", b"200 OK"),
        (b"HEAD /metrics?x=1 HTTP/1.0\r\n\r\n", b"200 OK"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", b"405 Method Not Allowed"),
        (b"GET /etc/passwd HTTP/1.1\r\n\r\n", b"404 Not Found"),
        (b"GET\r\n\r\n", b"400 Bad Request"),
        (b"\xff\xfe\r\n\r\n", b"400 Bad Request"),
    ],
)
def test_requests_get_the_expected_status(
    endpoint: MetricsServer, request_: bytes, status: bytes
) -> None:
    assert status_of(endpoint, request_) == b"HTTP/1.1 " + status


def test_a_request_that_is_too_long_gets_no_answer(endpoint: MetricsServer) -> None:
    assert status_of(endpoint, GET + b"a: " + b"b" * (2 * MAX_REQUEST_BYTES)) == b""
    assert "turret_step_tokens" in scrape(endpoint.address)


def test_a_configured_metrics_role_makes_the_endpoint_private() -> None:
    inference = ("a", frozenset({"inference"}))
    with serving(Metrics(), tokens=TokenTable([inference])) as open_to_all:
        assert "turret_step_tokens" in scrape(open_to_all.address)
    tokens = TokenTable([inference, ("m", frozenset({"metrics"}))])
    with serving(Metrics(), tokens=tokens) as guarded:
        assert "turret_step_tokens" in scrape(guarded.address, "m")
        for token, code in ((None, 401), ("guess", 401), ("a", 403)):
            with pytest.raises(urllib.error.HTTPError) as caught:
                scrape(guarded.address, token)
            assert caught.value.code == code
            caught.value.close()


def test_servers_that_share_an_address_take_ports_that_follow_each_other() -> None:
    with serving(Metrics()) as first:
        host, port = split_address(first.address)
        with pytest.raises(OSError, match="in use"):
            MetricsServer(Metrics(), first.address)
        with serving(Metrics(), first.address, num_ports=8) as beside:
            assert split_address(beside.address)[0] == host
            assert port < split_address(beside.address)[1] < port + 8
            assert "turret_step_tokens" in scrape(beside.address)


def test_metrics_that_others_can_read_cause_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    tokens = TokenTable([("m", frozenset({"metrics"}))])
    for address, guard, is_said in (
        ("127.0.0.1:0", None, False),
        ("0.0.0.0:0", None, True),
        ("0.0.0.0:0", tokens, False),
    ):
        caplog.clear()
        MetricsServer(Metrics(), address, guard).close()
        assert ("metrics are readable without a token" in caplog.messages) is is_said
