"""The metrics that routers read, under the names that vLLM gives them.

The names, types and labels are those of the endpoint picker's metric protocol (Gateway API
inference extension, llm-d), in its form for vLLM. Each alias is computed from turret's own series
when they are read, so nothing is counted twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from turret.server.metrics import OTHER, PLAIN_NAME

# The value of the setting that asks for these aliases.
VLLM = "vllm"

_Labels = Mapping[str, str]
_Series = Iterable[tuple[_Labels, float]]


def _unchanged(series: _Series) -> _Series:
    return series


def _values(series: _Series) -> _Series:
    return [({}, value) for _, value in series]


def _total(series: _Series) -> _Series:
    return [({}, sum(value for _, value in series))]


def _loaded(series: _Series) -> _Series:
    """A series for each adapter in memory; adapters that share a label have no name to report."""
    levels = {"device": "gpu", "host": "cpu"}
    for labels, value in series:
        name, level = labels["adapter"], levels.get(labels["tier"])
        if value and level and name != OTHER:
            yield {"adapter_name": name.removeprefix(PLAIN_NAME), "level": level}, 1.0


def _slots(series: _Series) -> _Series:
    return [({}, float(labels["max_lora"])) for labels, _ in series]


def _cache_config(series: _Series) -> _Series:
    for labels, _ in series:
        yield {"block_size": labels["block_size"], "num_gpu_blocks": labels["num_blocks"]}, 1.0


@dataclass(frozen=True, slots=True)
class _Alias:
    """A gauge that vLLM has too.

    Attributes:
        name: Its name.
        source: The series of turret's that it is computed from.
        only: The labels that a series of the source must have.
        make: Computes the labels and values of the alias from those of the source.
        has_model: Whether it has the label ``model_name``, the base's name.
    """

    name: str
    source: str
    only: _Labels
    make: Callable[[_Series], _Series]
    has_model: bool = True


_ALIASES = (
    _Alias("num_requests_waiting", "turret_sequences", {"state": "waiting"}, _values),
    _Alias("num_requests_running", "turret_sequences", {"state": "running"}, _values),
    _Alias("kv_cache_usage_perc", "turret_kv_usage_ratio", {}, _values),
    _Alias("cache_config_info", "turret_kv_cache_info", {}, _cache_config),
    _Alias("lora_requests_info", "turret_adapters_info", {}, _unchanged, has_model=False),
    _Alias("lora_adapter_loaded", "turret_adapter_residency", {}, _loaded),
    _Alias("num_gpu_loaded_lora_adapters", "turret_adapter_residency", {"tier": "device"}, _total),
    _Alias("max_gpu_lora_adapters", "turret_adapters_info", {}, _slots),
)
_MODEL = "turret_info"
_SOURCES = (_MODEL, *dict.fromkeys(alias.source for alias in _ALIASES))


class _Aliases(Collector):
    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        """All aliases whose source has a value by now."""
        found: dict[str, list[tuple[_Labels, float]]] = {name: [] for name in _SOURCES}
        for family in self._registry.restricted_registry(_SOURCES).collect():
            for sample in family.samples:
                found[sample.name].append((sample.labels, sample.value))
        models = [labels["model"] for labels, _ in found[_MODEL] if "model" in labels]
        for alias in _ALIASES:
            series = [
                (labels, value)
                for labels, value in found[alias.source]
                if alias.only.items() <= labels.items()
            ]
            common = {"model_name": models[0]} if alias.has_model and models else {}
            family = GaugeMetricFamily(f"vllm:{alias.name}", f"Alias of {alias.source}.")
            for labels, value in alias.make(series):
                family.add_sample(family.name, {**common, **labels}, value)
            if family.samples:
                yield family


def add_aliases(registry: CollectorRegistry, names: str | None) -> None:
    """Adds the aliases of a setting's value, ``VLLM`` or None, to a registry of ``Metrics``."""
    if names == VLLM:
        registry.register(_Aliases(registry))
