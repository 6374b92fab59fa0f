"""The series, the bounded adapter label, and the HTTP endpoint."""

from __future__ import annotations

import threading
import time
import urllib.error
import urllib.request

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from servers.rpc_harness import harness

from turret.server.metrics import Metrics
from turret.server.metrics_server import MetricsServer
from turret.v1 import adapters_pb2, inference_pb2

# The names and labels of the design.
SERIES = {
    "turret_requests_total": {"adapter", "code"},
    "turret_calls_total": {"protocol", "code"},
    "turret_request_duration_seconds_count": {"method", "code"},
    "turret_prompt_tokens_total": {"adapter"},
    "turret_generated_tokens_total": {"adapter"},
    "turret_time_to_first_token_seconds_count": set(),
    "turret_inter_token_seconds_count": set(),
    "turret_adapter_time_to_first_token_seconds_count": {"adapter"},
    "turret_adapter_inter_token_seconds_count": {"adapter"},
    "turret_queue_seconds_count": set(),
    "turret_step_seconds_count": {"phase"},
    "turret_step_tokens_count": set(),
    "turret_step_adapters_count": set(),
    "turret_sequences": {"state"},
    "turret_kv_blocks": {"state"},
    "turret_kv_usage_ratio": set(),
    "turret_kv_cache_info": {"block_size", "num_blocks"},
    "turret_cuda_graphs_off": set(),
    "turret_adapters_info": {"max_lora", "running_lora_adapters", "waiting_lora_adapters"},
    "turret_preemptions_total": set(),
    "turret_spec_decode_num_draft_tokens_total": set(),
    "turret_spec_decode_num_accepted_tokens_total": set(),
    "turret_prefix_cache_tokens_total": {"result"},
    "turret_adapter_residency": {"adapter", "tier"},
    "turret_adapter_bytes": {"tier"},
    "turret_adapter_load_seconds_count": {"stage"},
    "turret_adapter_loads_total": {"result"},
    "turret_adapter_evictions_total": {"tier", "reason"},
    "turret_merge_active": set(),
    "turret_training_adapters": set(),
    "turret_training_bytes": {"kind"},
    "turret_training_queued_tokens": set(),
    "turret_training_tokens_total": set(),
    "turret_training_steps_total": set(),
    "turret_training_seconds_total": set(),
    "turret_info": {"version", "model", "dtype", "quantization"},
}


def exercise(metrics: Metrics) -> None:
    """Call every method once."""
    metrics.adapter_registered("sql")
    metrics.adapter_residency("sql", "host")
    metrics.request_finished(["sql"], "OK")
    metrics.calls.labels("grpc", "OK").inc()
    metrics.duration.labels("/turret.v1.Inference/Generate", "OK").observe(0.3)
    metrics.tokens(["sql"], prompt=5, generated=7)
    metrics.queue_seconds.observe(0.01)
    metrics.first_token(0.02, ["sql"])
    metrics.inter_token(0.003, ["sql"])
    metrics.cuda_graphs_off.set(1)
    metrics.step_seconds.labels("decode").observe(0.004)
    metrics.step_tokens.observe(8)
    metrics.step_adapters.observe(2)
    metrics.sequences(waiting=1, running=2)
    metrics.kv_blocks(free=3, used=4)
    metrics.kv_cache_info.labels("16", "7").set(1)
    metrics.adapters_in_use(most=8, running=["sql", "json"], waiting=[])
    metrics.preemptions.inc(2)
    metrics.draft_tokens.inc(5)
    metrics.accepted_tokens.inc(3)
    for result, count in (("hit", 16), ("miss", 4)):
        metrics.prefix_tokens.labels(result).inc(count)
    for tier, size in (("host", 100), ("device", 50)):
        metrics.adapter_bytes.labels(tier).set(size)
    metrics.load_seconds.labels("read").observe(0.1)
    metrics.loads.labels("ok").inc()
    metrics.evictions.labels("host", "budget").inc()
    metrics.merge_active.set(True)
    metrics.training_adapters.set(1)
    for kind, size in (("adapters", 100), ("activations", 1000)):
        metrics.training_bytes.labels(kind).set(size)
    metrics.training_queued_tokens.set(5)
    metrics.training_tokens.inc(7)
    metrics.training_steps.inc()
    metrics.training_seconds.inc(0.5)
    metrics.info("1", "smol", "bfloat16", "nf4")


def scrape(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as response:
        return response.read().decode()


def test_every_series_is_exposed_with_its_labels() -> None:
    metrics = Metrics()
    exercise(metrics)
    server = MetricsServer(metrics, "127.0.0.1:0")
    try:
        samples = [
            s for f in text_string_to_metric_families(scrape(server.address)) for s in f.samples
        ]
    finally:
        server.close()
    labels = {sample.name: set(sample.labels) for sample in samples}
    for name, expected in SERIES.items():
        assert labels[name] == expected
    values = {(s.name, *sorted(s.labels.values())): s.value for s in samples}
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
    server = MetricsServer(first, "127.0.0.1:0")
    again = MetricsServer(second, "127.0.0.1:0")
    threads = threading.active_count()
    server.close()
    assert threading.active_count() == threads - 1
    with pytest.raises(urllib.error.URLError):
        scrape(server.address)
    assert "turret_step_tokens" in scrape(again.address)
    again.close()


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


def test_a_mix_counts_once_per_label() -> None:
    metrics = Metrics()
    for name in ("a", "b"):
        metrics.adapter_registered(name)
    metrics.request_finished(["a", "b", "unknown", "unknown2"], "OK")
    assert _requests(metrics) == {"a": 1, "b": 1, "other": 1}


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


def test_adapters_named_like_the_shared_labels_do_not_mix_with_them() -> None:
    metrics = Metrics()
    for name in ("base", "other"):
        metrics.adapter_registered(name)
        metrics.request_finished([name], "OK")
    metrics.request_finished([], "OK")
    assert _requests(metrics) == {"adapter:base": 1, "adapter:other": 1, "base": 1}


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
