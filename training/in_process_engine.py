"""Trains adapters in this process with the server's engine, any number at the same time."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import torch

from turret.clients.requests import TrainingDatum
from turret.kernels.cpu import has_native
from turret.server.adapters.adapter import AdapterRef
from turret.server.basics.files import sync_directory
from turret.server.basics.settings import MIB
from turret.server.build import build_backend
from turret.server.config import AdapterConfig, CacheConfig, Config, ModelConfig, SchedulerConfig
from turret.server.engine.scheduling.request import (
    FinishReason,
    Request,
    SamplingParams,
    StopConditions,
)
from turret.server.metrics import Metrics
from turret.server.models.decoding.layer_ops import KvCache
from turret.server.training import MAX_SEQUENCE_TOKENS, TARGETS, AdamParams, Datum
from turret.training.base_model import DTYPES, keep_freed_memory
from turret.training.engine import Engine, PeftEngine
from turret.training.run import FOLDER_SUFFIX, checkpoint_path, step_of
from turret.training.server_engine import SharedEngine
from turret.training.settings import BaseConfig
from turret.training.settings.checks import unserved
from turret.training.settings.resolve import Resolved

T = TypeVar("T")
# The process trains for one user, so the limits of a server for its clients do not apply.
_NO_LIMIT = 1 << 60
# Positions for the longest prompt of a report, its answer, and the rounding to whole blocks.
_MOST_POSITIONS = MAX_SEQUENCE_TOKENS + 128


class InProcessBase:
    """A base model in this process, and an engine that trains adapters on it.

    Args:
        resolved: A run on the base.
    """

    def __init__(self, resolved: Resolved) -> None:
        keep_freed_memory()
        base = resolved.config.base
        assert base.dtype is not None
        positions = _MOST_POSITIONS + (resolved.config.method.num_virtual_tokens or 0)
        cache = KvCache.block_bytes(resolved.base.arch, positions, DTYPES[base.dtype])
        self._scratch = tempfile.TemporaryDirectory()
        config = Config(
            model=ModelConfig(
                model=resolved.base.directory, device="cpu", dtype=base.dtype, head_screen=False
            ),
            cache=CacheConfig(kv_cache_bytes=max(cache, MIB)),
            scheduler=SchedulerConfig(speculation="off"),
            adapters=AdapterConfig(
                state_dir=Path(self._scratch.name) / "state",
                training=True,
                max_rank=_NO_LIMIT,
                training_bytes=_NO_LIMIT,
                adapter_host_bytes=_NO_LIMIT,
                max_upload_bytes=_NO_LIMIT,
            ),
        )
        self._backend = build_backend(config, Metrics())
        assert self._backend.training is not None
        self.training = self._backend.training
        self._runner = asyncio.Runner()
        self._loop = self._runner.get_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.run(self._backend.engine.start())

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine on the engine's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the engine's event loop."""
        return self.start(work).result()

    async def answer(self, request: Request) -> tuple[list[int], FinishReason | None]:
        """The tokens of an answer, and why it ended."""
        tokens: list[int] = []
        reason = None
        async for output in await self._backend.engine.submit(request):
            tokens += output.token_ids
            reason = output.finish.reason if output.finish else None
        return tokens, reason

    def close(self) -> None:
        """Stop the engine; a pass that runs ends between two of its parts."""
        self.run(self._backend.engine.drain(0.0))
        self._backend.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._runner.close()
        self._scratch.cleanup()


@contextlib.contextmanager
def in_process_engines() -> Iterator[Callable[[Resolved], Engine]]:
    """Yield a function that opens engines in this process, and close their bases at the end.

    Runs with the same settings of the base and the same number of virtual tokens share one base. A
    run that a server cannot train is trained with PEFT instead.
    """
    bases: dict[tuple[BaseConfig, int | None], InProcessBase] = {}

    def open_engine(resolved: Resolved) -> Engine:
        if not is_shared(resolved):
            return PeftEngine(resolved)
        key = resolved.config.base, resolved.config.method.num_virtual_tokens
        if key not in bases:
            bases[key] = InProcessBase(resolved)
        return InProcessEngine(resolved, bases[key])

    try:
        yield open_engine
    finally:
        for base in bases.values():
            base.close()


def is_shared(resolved: Resolved) -> bool:
    """Whether a run in this process is trained by the server's engine, not by PEFT."""
    config, has_experts = resolved.config, resolved.base.arch.experts is not None
    assert config.base.dtype is not None
    if config.base.device != "cpu" or has_experts or unserved(config):
        return False
    # Without kernels that read 4-bit weights, the engine would keep the base dequantised.
    return has_native(DTYPES[config.base.dtype], torch.device("cpu"))


class InProcessEngine(SharedEngine):
    """Trains an adapter on a base in this process.

    Args:
        resolved: See ``SharedEngine``.
        base: The base.
    """

    def __init__(self, resolved: Resolved, base: InProcessBase) -> None:
        super().__init__(resolved)
        self._base = base
        self._training = base.training
        self._id = base.run(self._training.create(self._learner))
        # The adapter's name for samples.
        self._sampled = f"sample-{self._id}"

    def _pass(self, data: Sequence[TrainingDatum], *, has_grad: bool) -> float:
        inputs = [
            Datum(
                each.token_ids,
                {TARGETS: torch.tensor(each.target_ids), "weights": torch.tensor(each.weights)},
            )
            for each in data
        ]
        work = self._training.pass_over(
            self._id, inputs, "cross_entropy", {}, is_forward_only=not has_grad
        )
        return sum(each.losses.sum(dtype=torch.float64).item() for each in self._base.run(work))

    def _optimize(self, adam: AdamParams) -> float:
        return self._base.run(self._training.step(self._id, adam))["grad_norm"]

    def _publish(self) -> AdapterRef:
        self._base.run(self._training.publish(self._id, self._sampled))
        return AdapterRef(name=self._sampled)

    def _answer(self, prompt: Sequence[int], adapter: Any, most: int) -> list[int]:
        request = Request(
            request_id=self._sampled,
            prompt_token_ids=tuple(prompt),
            adapters=() if adapter is None else (adapter,),
            sampling=SamplingParams(temperature=0.0),
            stop=StopConditions(max_tokens=most),
        )
        tokens, reason = self._base.run(self._base.answer(request))
        end = self._resolved.base.tokenizer.eos_token_id
        return [*tokens, *([end] if reason is FinishReason.STOP else [])]

    def save(self, checkpoints: Path, step: int) -> None:
        """Save a checkpoint; its directory appears only when it is complete."""
        path = checkpoint_path(checkpoints, step, FOLDER_SUFFIX)
        partial = path.with_name(f"{path.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        self._base.run(self._training.save(self._id, partial, with_optimizer=True))
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
        sync_directory(checkpoints)

    def restore(self, checkpoint: Path) -> int:
        self._base.run(self._training.load(self._id, checkpoint, with_optimizer=True))
        return step_of(checkpoint)

    def discard(self, checkpoint: Path) -> None:
        shutil.rmtree(checkpoint)

    def _export(self, folder: Path) -> None:
        folder.mkdir()
        self._base.run(self._training.save(self._id, folder, with_optimizer=False))

    def end(self, checkpoints: Sequence[Path]) -> None:
        """Do nothing, because the directory of the run keeps the checkpoints."""

    def cancel(self) -> None:
        self.close()

    def close(self) -> None:
        """Drop the adapter, without waiting for the end of a pass."""
        self._base.start(self._training.withdraw(self._sampled))
        self._base.start(self._training.drop(self._id))
