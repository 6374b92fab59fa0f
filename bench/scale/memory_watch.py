"""Samples a server's memory during a block of code."""

from __future__ import annotations

import threading
import urllib.request
from typing import Self

import psutil
from prometheus_client.parser import text_string_to_metric_families

INTERVAL_SECONDS = 0.5


def adapter_bytes(metrics_address: str) -> dict[str, int]:
    """The bytes of adapter weights, by tier.

    Only these lines are parsed, because parsing all others would take most of a sample's time.
    """
    with urllib.request.urlopen(f"http://{metrics_address}/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    text = "\n".join(line for line in lines if line.startswith("turret_adapter_bytes{"))
    families = text_string_to_metric_families(text + "\n")
    return {s.labels["tier"]: int(s.value) for family in families for s in family.samples}


class MemoryWatch:
    """The maxima of all samples in the ``with`` block.

    Attributes:
        host_bytes: The size of adapter weights in host memory.
        device_bytes: The size of adapter weights on the device.
        rss_bytes: The resident set of the process.
        num_samples: The number of samples.
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
        held = adapter_bytes(self._address)
        self.host_bytes = max(self.host_bytes, held.get("host", 0))
        self.device_bytes = max(self.device_bytes, held.get("device", 0))
        self.rss_bytes = max(self.rss_bytes, self._process.memory_info().rss)
        self.num_samples += 1
