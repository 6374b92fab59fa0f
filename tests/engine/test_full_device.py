"""A device that runs out of memory: requests get the same answers, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from builders.methods import make_config, save_adapter
from method_oracle import prompt_of, serve, twin
from servers.engine_harness import make_request

from turret.server.engine.scheduling.request import SamplingParams
from turret.server.engine.scheduling.sequence import Step
from turret.server.engine.step.runner import TorchExecutor
from turret.server.engine.step.sampler import Sampler

SEEDED = SamplingParams(temperature=1.0, seed=5)
PREFIX = {"num_virtual_tokens": 3}


def requests() -> list[Any]:
    prompts = [prompt_of(length, number) for number, length in enumerate((5, 9, 3, 12, 7, 9))]
    mixes = [(), ("prefix",), ("lora",), ("prefix",), (), ("prefix", "lora")]
    return [
        make_request(prompt, *mix, max_tokens=5, sampling=SEEDED)
        for prompt, mix in zip(prompts, mixes, strict=True)
    ]


class _Memory:
    """Memory for steps of ``most`` rows, or sequences that sample; larger steps fail.

    Attributes:
        num_failed: The number of failed steps.
    """

    def __init__(self, work: Any, size: Callable[..., int], most: int) -> None:
        self.num_failed = 0
        self._work, self._size, self._most = work, size, most

    def __call__(self, *args: Any) -> Any:
        result = self._work(*args)
        if self._size(*args) > self._most:
            self.num_failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result


def rows_of(executor: TorchExecutor, step: Step) -> int:
    return sum(item.num_rows for item in step.scheduled)


def samples_of(sampler: Sampler, logits: torch.Tensor, sequences: Any, *_: Any) -> int:
    return len(sequences)


@pytest.mark.parametrize(
    ("owner", "name", "size", "most"),
    [
        (TorchExecutor, "run", rows_of, 20),
        (TorchExecutor, "run", rows_of, 7),
        (Sampler, "draw", samples_of, 2),
    ],
)
async def test_answers_are_those_of_a_device_with_memory(
    tmp_path: Path, owner: Any, name: str, size: Callable[..., int], most: int
) -> None:
    base = twin("llama")
    save_adapter(base.model, make_config("lora"), tmp_path / "lora")
    save_adapter(base.model, make_config("prefix_tuning", **PREFIX), tmp_path / "prefix")
    sizes: dict[str, Any] = {"max_num_seqs": 6, "max_num_batched_tokens": 24}
    async with serve(base, tmp_path, adapters=("lora", "prefix"), **sizes) as harness:
        expected = await harness.run_all(requests())
    async with serve(base, tmp_path, adapters=("lora", "prefix"), **sizes) as harness:
        memory = _Memory(getattr(owner, name), size, most)
        with patch.object(owner, name, lambda *args: memory(*args)):
            found = await harness.run_all(requests())
    assert memory.num_failed >= 2
    for one, two in zip(found, expected, strict=True):
        assert one.bits == two.bits


async def test_a_step_that_fits_after_memory_is_freed_preempts_no_request(tmp_path: Path) -> None:
    base = twin("llama")
    async with serve(base, tmp_path) as harness:
        run, failed = TorchExecutor.run, []
        freed = patch.object(TorchExecutor, "free_memory", lambda self: failed.append("freed"))

        def fails_once(executor: TorchExecutor, step: Step) -> Any:
            if len(failed) == 0:
                failed.append("failed")
                raise torch.OutOfMemoryError("CUDA out of memory")
            return run(executor, step)

        with freed, patch.object(TorchExecutor, "run", fails_once):
            answer = await harness.run(make_request(prompt_of(4, 1)))
    assert failed == ["failed", "freed"]
    assert len(answer.token_ids) == 8


async def test_running_out_of_memory_on_a_cpu_is_handled_as_on_a_gpu(tmp_path: Path) -> None:
    """On a CPU, torch raises a RuntimeError, as for any other fault."""
    base = twin("llama")
    told = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 5 bytes"
    async with serve(base, tmp_path) as harness:
        run, errors = TorchExecutor.run, [RuntimeError(told), MemoryError()]
        due = [errors.pop()]

        def fails(executor: TorchExecutor, step: Step) -> Any:
            if due:
                raise due.pop()
            return run(executor, step)

        with patch.object(TorchExecutor, "run", fails):
            for _ in range(2):
                answer = await harness.run(make_request(prompt_of(4, 1)))
                assert len(answer.token_ids) == 8
                due += errors
                errors.clear()
    assert not due
