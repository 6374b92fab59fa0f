"""Steps on a device that is as late as its streams allow: every step sees its own metadata."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from fake_cuda import FakeCuda
from transformers import LlamaConfig

from turret.server.adapters.device import streams
from turret.server.adapters.device.gpu_store import GpuStore
from turret.server.adapters.device.layout import ProjectionLayout, SliceShape
from turret.server.adapters.mix import Mix
from turret.server.engine.gpu_executor import GpuExecutor
from turret.server.engine.request import Request
from turret.server.engine.scheduler import Scheduled, Step
from turret.server.engine.sequence import Sequence
from turret.server.models.families import read_arch
from turret.server.models.kv_cache import KvCache

CPU = torch.device("cpu")
ARCH = read_arch(
    LlamaConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
)
CHUNK = 8


class _Decoder:
    """Notes which tokens, positions and blocks the device finds when it gets to a step."""

    arch = ARCH
    device = CPU
    epoch = 0

    def __init__(self, cuda: FakeCuda) -> None:
        self.seen: list[tuple[list[int], list[int], int]] = []
        self._cuda = cuda

    def compute(self, step: Any, cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
        table = step.attention[None].buffer

        def work() -> None:
            self.seen.append((step.token_ids.tolist(), step.positions.tolist(), int(table[4])))

        self._cuda.launch(work)
        return torch.zeros(CHUNK, 1), torch.zeros(0, 1)


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    """A late device on which the server uses streams and events."""
    fake = FakeCuda()
    with fake.installed(), patch.object(streams, "has_streams", lambda device: True):
        yield fake


def test_chunks_of_a_prompt_that_nobody_waits_for(cuda: FakeCuda):
    """No chunk but the last samples, so the host could be far ahead of the device."""
    decoder: Any = _Decoder(cuda)
    projections = {
        name: tuple(SliceShape(path, out, inner) for path, out, inner in slices)
        for name, slices in ARCH.linears().items()
    }
    store = GpuStore(ProjectionLayout(1, projections), torch.float32, CPU, 1 << 20)
    executor = GpuExecutor(
        decoder,
        KvCache(ARCH, 32, 16, torch.float32, CPU),
        store,
        max_num_seqs=2,
        max_num_batched_tokens=CHUNK,
        capture=None,
    )
    expected = []
    for number in range(6):
        prompt = tuple(range(1000 * number % 4000, 1000 * number % 4000 + 9 * CHUNK))
        sequence = Sequence(Request(request_id="r", prompt_token_ids=prompt), Mix(()), 0.0)
        sequence.num_computed = CHUNK * number
        sequence.blocks = list(range(2 + number, 12 + number))
        executor.run(Step((Scheduled(sequence, CHUNK),), (), 0))
        rows = range(sequence.num_computed, sequence.num_computed + CHUNK)
        expected.append(([prompt[row] for row in rows], list(rows), sequence.blocks[0]))
    cuda.default.synchronize()
    assert decoder.seen == expected
