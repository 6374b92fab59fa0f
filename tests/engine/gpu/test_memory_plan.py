"""The division of a CUDA device's memory, with simulated numbers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from builders.adapters import tiny_llama

from turret.server import build
from turret.server.adapters.adapter import Mix
from turret.server.adapters.device.gpu_store import GpuStore
from turret.server.config import GIB, AdapterConfig, Config, SchedulerConfig
from turret.server.engine.scheduling.request import Request
from turret.server.engine.scheduling.sequence import Scheduled, Sequence
from turret.server.engine.step.gpu_executor import (
    GpuExecutor,
    adapter_bytes,
    is_fused,
    largest_step,
    measure,
    spare_bytes,
)
from turret.server.metrics import Metrics
from turret.server.models.decoding.layer_ops import KvCache
from turret.server.models.describe import describe_projections
from turret.server.models.families import read_arch
from turret.server.training import training_pass

DEVICE = torch.device("cuda", 0)


class _Memory:
    """A device with 80 GiB, of which a model holds ``allocated``.

    The peak of a step is temporary.
    """

    def __init__(self, allocated: int) -> None:
        self.allocated = self.peak = allocated

    def take(self, size: int) -> None:
        self.peak = max(self.peak, self.allocated + size)


@pytest.fixture
def memory() -> Iterator[_Memory]:
    held = _Memory(16 * GIB)

    def reset(device: torch.device) -> None:
        held.peak = held.allocated

    names = {
        "mem_get_info": lambda device: (80 * GIB - held.allocated, 80 * GIB),
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": reset,
        "memory_allocated": lambda device: held.allocated,
        "max_memory_allocated": lambda device: held.peak,
    }
    with patch.multiple(torch.cuda, **names):
        yield held


def test_the_step_and_a_reserve_are_kept_free(memory: _Memory):
    assert adapter_bytes(DEVICE) == int(64 * GIB / 7)
    memory.take(40 * GIB)  # temporary memory of loading the model
    taken = measure(lambda: memory.take(3 * GIB), DEVICE)
    assert taken == 3 * GIB
    assert spare_bytes(DEVICE) == 4 * GIB


@pytest.mark.parametrize("training", [False, True])
def test_the_cache_gets_the_memory_that_the_other_parts_leave(
    memory: _Memory, caplog: pytest.LogCaptureFixture, tmp_path: Path, *, training: bool
):
    """The pack of adapters is already allocated; the plan lists only later allocations."""
    arch, budget = read_arch(tiny_llama().config), 8 << 20
    store = GpuStore(describe_projections(arch), torch.float16, torch.device("meta"), budget)
    executor: Any = Mock(spec=GpuExecutor, store=store)
    executor.forms.return_value = [(4, frozenset()), (8, frozenset())]
    executor.run.side_effect = lambda step: memory.take(3 * GIB) or Mock(placed=())
    decoder: Any = Mock(arch=arch, device=DEVICE, dtype=torch.float16)
    # Leave so little memory that the sequences could use all of it.
    free = spare_bytes(DEVICE) + (7 if training else 3) * GIB + (16 << 20)
    memory.allocated = memory.peak = 80 * GIB - free
    caplog.set_level(logging.INFO)
    with (
        patch.object(build, "_build_executor", lambda *_: executor),
        patch.object(build, "KvCache", Mock(block_bytes=KvCache.block_bytes)),
        patch.object(training_pass, "largest_pass", lambda *_: lambda: memory.take(2 * GIB)),
    ):
        adapters = AdapterConfig(training=training, training_bytes=6 * GIB, state_dir=tmp_path)
        left = build._kv_bytes(Config(adapters=adapters), decoder, store, Metrics())
    named = next(r for r in caplog.records if r.message == "memory planned").fields  # type: ignore[attr-defined]
    assert named == {
        "step_bytes": 3 * GIB,
        "captured_bytes": 12 * arch.hidden_size * 2,
        "adapter_bytes": store.later_bytes,
        "spare_bytes": spare_bytes(DEVICE),
        "kv_cache_bytes": left,
        **({"pass_bytes": 2 * GIB, "training_bytes": 2 * GIB} if training else {}),
    }
    assert store.later_bytes > budget // 8
    assert sum(named.values()) == 80 * GIB - memory.allocated


@pytest.mark.parametrize(("tokens", "seqs"), [(64, 4), (67, 8), (5, 5), (3, 8)])
def test_the_largest_step_fills_all_rows_and_samples_for_all_sequences(tokens: int, seqs: int):
    step = largest_step(tokens, seqs, 16)
    assert sum(item.num_new for item in step.scheduled) == tokens
    assert sum(item.samples for item in step.scheduled) == min(tokens, seqs)
    for item in step.scheduled:
        assert len(item.sequence.blocks) * 16 >= item.num_new
        assert set(item.sequence.blocks) == {1}


def test_defaults_follow_the_device_and_the_settings():
    assert SchedulerConfig().sizes("cpu") == (64, 512)
    assert SchedulerConfig().sizes("cuda") == (256, 2048)
    assert SchedulerConfig(max_num_seqs=1000).sizes("cpu") == (1000, 1000)
    assert SchedulerConfig(max_num_batched_tokens=32).sizes("cuda") == (32, 32)
    assert SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=40).sizes("cuda") == (8, 40)


# The product for a sequence's rows on the GPU path, which depends only on the sequence.


def scheduled(prompt: int, computed: int, num_new: int) -> Scheduled:
    sequence = Sequence(Request(request_id="x", prompt_token_ids=(1,) * prompt), Mix(()), 0.0)
    sequence.num_computed = computed
    return Scheduled(sequence, num_new)


@pytest.mark.parametrize(
    ("prompt", "computed", "fused"),
    [(64, 0, True), (64, 63, True), (65, 0, False), (65, 64, False), (65, 65, True), (9, 30, True)],
)
def test_short_prompts_use_the_kernels_of_decoding_rows(prompt, computed, fused):
    """All chunks use the same kernel, because other requests determine where a prompt is cut."""
    for num_new in (1, 3):
        assert is_fused(scheduled(prompt, computed, num_new)) is fused


@pytest.mark.parametrize(("tokens", "seqs"), [(512, 64), (8192, 64), (48, 8), (4, 8)])
def test_memory_is_planned_for_a_long_prompt_beside_short_ones(tokens, seqs):
    step = largest_step(tokens, seqs, 16)
    sizes = [item.num_new for item in step.scheduled]
    assert sum(sizes) == tokens
    assert len(sizes) == min(tokens, seqs)
    assert max(sizes) == tokens - len(sizes) + 1
    # With a token budget for a GPU, some products read dequantised weights.
    assert tokens < 128 or not all(is_fused(item) for item in step.scheduled)
