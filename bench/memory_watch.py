"""Samples a server's memory while something else happens."""

from __future__ import annotations

import threading
import urllib.request
from typing import Self

import psutil
from prometheus_client.parser import text_string_to_metric_families

INTERVAL_SECONDS = 0.25


def scrape(metrics_address: str) -> dict[str, float]:
    """Every series; labels are part of the name, as in ``turret_adapter_bytes{tier=host}``."""
    with urllib.request.urlopen(f"http://{metrics_address}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    values = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            values[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return values


class MemoryWatch:
    """The most that was seen inside the ``with`` block.

    Attributes:
        host_bytes: Adapter weights in host memory.
        device_bytes: Adapter weights on the device.
        rss_bytes: Resident set of the process.
        num_samples: How often it was looked at.
    """

    def __init__(self, metrics_address: str, pid: int) -> None:
        self.host_bytes = self.device_bytes = self.rss_bytes = 0
        self.num_samples = 0
        self._address = metrics_address
        self._process = psutil.Process(pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_SECONDS):
            self._look()

    def _look(self) -> None:
        values = scrape(self._address)
        host = int(values.get("turret_adapter_bytes{tier=host}", 0))
        device = int(values.get("turret_adapter_bytes{tier=device}", 0))
        self.host_bytes = max(self.host_bytes, host)
        self.device_bytes = max(self.device_bytes, device)
        self.rss_bytes = max(self.rss_bytes, self._process.memory_info().rss)
        self.num_samples += 1
