"""The metrics that routers read, under the names that vLLM gives them.

The names, types and labels are those of the endpoint picker's metric protocol (Gateway API
inference extension, llm-d), in its form for vLLM. Each alias is computed from turret's own series
when they are read, so nothing is counted twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from turret.server.metrics import OTHER, PLAIN_NAME

# The value of the setting that asks for these aliases.
VLLM = "vllm"

_INFO, _SEQUENCES, _RESIDENCY = "turret_info", "turret_sequences", "turret_adapter_residency"
_USAGE, _CACHE = "turret_kv_usage_ratio", "turret_kv_cache_info"
_ADAPTERS = "turret_adapters_info"
_SOURCES = (_INFO, _SEQUENCES, _RESIDENCY, _USAGE, _CACHE, _ADAPTERS)
_LEVELS = {"device": "gpu", "host": "cpu"}

_Series = Sequence[tuple[Mapping[str, str], float]]


class _Aliases(Collector):
    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        """All aliases whose source already has a value."""
        for name, source, series in self._gauges():
            family = GaugeMetricFamily(f"vllm:{name}", f"Alias of {source}.")
            for labels, value in series:
                family.add_sample(family.name, dict(labels), value)
            if family.samples:
                yield family

    def _gauges(self) -> Iterator[tuple[str, str, _Series]]:
        """For each alias: its name, the series from which it is computed, and its own series."""
        found: dict[str, list[tuple[Mapping[str, str], float]]] = {name: [] for name in _SOURCES}
        for family in self._registry.restricted_registry(_SOURCES).collect():
            for sample in family.samples:
                found[sample.name].append((sample.labels, sample.value))
        names = [labels["model"] for labels, _ in found[_INFO] if "model" in labels]
        model = {"model_name": names[0]} if names else {}

        def values(source: str, **only: str) -> _Series:
            return [(model, v) for labels, v in found[source] if only.items() <= labels.items()]

        yield "num_requests_waiting", _SEQUENCES, values(_SEQUENCES, state="waiting")
        yield "num_requests_running", _SEQUENCES, values(_SEQUENCES, state="running")
        yield "kv_cache_usage_perc", _USAGE, values(_USAGE)
        sizes = (
            {"block_size": labels["block_size"], "num_gpu_blocks": labels["num_blocks"]}
            for labels, _ in found[_CACHE]
        )
        yield "cache_config_info", _CACHE, [({**model, **size}, 1.0) for size in sizes]
        yield "lora_requests_info", _ADAPTERS, found[_ADAPTERS]
        # Adapters that share a label have no name to report.
        loaded = (
            {"adapter_name": labels["adapter"].removeprefix(PLAIN_NAME), "level": level}
            for labels, value in found[_RESIDENCY]
            if value and labels["adapter"] != OTHER and (level := _LEVELS.get(labels["tier"]))
        )
        yield "lora_adapter_loaded", _RESIDENCY, [({**model, **each}, 1.0) for each in loaded]
        on_device = sum(value for _, value in values(_RESIDENCY, tier="device"))
        yield "num_gpu_loaded_lora_adapters", _RESIDENCY, [(model, on_device)]
        most = [(model, float(labels["max_lora"])) for labels, _ in found[_ADAPTERS]]
        yield "max_gpu_lora_adapters", _ADAPTERS, most


def add_aliases(registry: CollectorRegistry, names: str | None) -> None:
    """Adds the aliases of a setting's value, ``VLLM`` or None, to a registry of ``Metrics``."""
    if names == VLLM:
        registry.register(_Aliases(registry))
