"""The aliases, read as an endpoint picker reads them."""

from __future__ import annotations

import dataclasses

import pytest
from prometheus_client import Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from turret.server.metrics import VLLM, Metrics, add_aliases


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
    # Leaves a series of value 0.
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
