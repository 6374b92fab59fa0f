"""A real server process with adapters, and the requests that are sent to it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from common.batch import BatchTiming, send_batch
from common.prompts import PromptSource

from turret.clients.client import TurretClient
from turret.clients.messages.requests import GenerateOptions
from turret.server.server_process import ServerProcess

_IDLE_SECONDS = 5.0


class Served:
    """A server with loaded adapters, and its prompts.

    Args:
        root: The folder of the adapters.
        adapters: The adapters, which have the names of their folders.
        prompt_tokens: The length of every prompt.
        new_tokens: The length of every answer.
        flags: Flags of ``turret serve``, in addition to those of all benchmarks.
    """

    def __init__(
        self,
        root: Path,
        adapters: Sequence[str],
        *,
        prompt_tokens: int = 64,
        new_tokens: int = 64,
        flags: Sequence[str] = (),
    ) -> None:
        # Measure the cost of a step; speculation would change the number of steps.
        common = ["--adapter-root", str(root), "--speculation", "off"]
        common += ["--max-num-seqs", "64", "--max-rank", "128"]
        self.server = ServerProcess([*common, *flags])
        self.server.wait()
        self.pid = self.server.process.pid
        self.client = TurretClient(self.server.address)
        for name in adapters:
            self.client.adapters.load(name, name)
        self._new_tokens = new_tokens
        self._prompts = PromptSource(self.client, prompt_tokens)

    def timing(
        self,
        adapters: Sequence[str | None],
        new_tokens: int | None = None,
        options: Sequence[GenerateOptions] | None = None,
    ) -> BatchTiming:
        """Measure one batch with a request per adapter (None: the base)."""
        prompts = self._prompts.take(len(adapters))
        count = self._new_tokens if new_tokens is None else new_tokens
        answers = send_batch(self.server.address, prompts, adapters, count, options)
        return BatchTiming.of(answers)

    def rate(self, adapters: Sequence[str | None], new_tokens: int | None = None) -> float:
        """The tokens per second of one batch, after every request has its first token."""
        return self.timing(adapters, new_tokens).decode_rate

    def idle_share(self) -> float:
        """The share of one processor that the server uses without requests."""
        process = psutil.Process(self.pid)
        before, start = process.cpu_times(), time.perf_counter()
        time.sleep(_IDLE_SECONDS)
        after = process.cpu_times()
        used = after.user + after.system - before.user - before.system
        return used / (time.perf_counter() - start)

    def stop(self) -> None:
        self.client.close()
        self.server.stop()
