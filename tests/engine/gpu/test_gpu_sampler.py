"""The device's sampler, in Triton's interpreter, compared with the row-by-row sampler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders.sequences import sequence_with
from fake_cuda import FakeCuda, FakeEvent

from turret.kernels.gpu.tables import SamplingTable
from turret.server.engine.scheduling.request import StopConditions
from turret.server.engine.scheduling.sequence import Sequence
from turret.server.engine.step import gpu_sampler
from turret.server.engine.step.gpu_sampler import GpuSampler
from turret.server.engine.step.sampler import Draw, Sampler

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="made for the interpreter")

CPU = torch.device("cpu")
VOCAB = 50
STOP = StopConditions(min_tokens=4, stop_token_ids=frozenset({11, 30}))
# Requests for which both samplers draw in the order of ids, so that a seed gives the same tokens.
REQUESTS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"seed": 1},
    {"seed": 2, "temperature": 0.7, "logprobs": True},
    {"seed": 3, "min_p": 0.05},
    {"temperature": 0.0, "repetition_penalty": 1.7, "logprobs": True},
    {"seed": 4, "presence_penalty": 0.8, "frequency_penalty": 0.3},
    {"seed": 5, "logit_bias": {3: 2.5, 17: -4.0}, "stop": STOP},
    {"seed": 6, "repetition_penalty": 0.6, "frequency_penalty": -0.4, "logit_bias": {7: 1.0}},
]


def drawn(sampler: GpuSampler, logits: torch.Tensor, sequences: list[Sequence]) -> list[Draw]:
    """The drawn token of each request in a step."""
    table = SamplingTable(len(sequences), CPU)
    sampler.load(sampler.numbers(sequences), table)
    sampler.launch(logits, table)
    return sampler.draw(logits, sequences)


@pytest.mark.parametrize("chosen", [REQUESTS, REQUESTS[:4], REQUESTS[4:5]], ids=len)
def test_draws_match_the_cpu_sampler(chosen: list[dict[str, Any]]):
    stops = frozenset({5, 6})
    device, rows = GpuSampler(stops, len(chosen), CPU), Sampler(stops)
    sequences = [sequence_with((7, 8, 8), **params) for params in chosen]
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        logits = torch.randn(len(chosen), VOCAB, generator=generator) * 3
        changed, others = logits.clone(), logits.clone()
        expected = rows.draw(others, sequences)
        found = drawn(device, changed, sequences)
        assert torch.equal(changed, others)
        for one, two, sequence in zip(found, expected, sequences, strict=True):
            assert one.token_id == two.token_id
            assert one.logprob == pytest.approx(two.logprob)
            assert [token for token, _ in one.top] == [token for token, _ in two.top]
            sequence.tokens.append(one.token_id)


def test_a_recomputed_step_draws_the_same_tokens():
    sampler, logits = GpuSampler(frozenset(), 1, CPU), torch.zeros(1, VOCAB)
    sequence = sequence_with(seed=9)
    first = drawn(sampler, logits, [sequence])
    assert drawn(sampler, logits, [sequence]) == first
    tokens = set()
    for _ in range(6):
        tokens.add(drawn(sampler, logits, [sequence])[0].token_id)
        sequence.tokens.append(1)
    assert len(tokens) > 1
    assert sampler.numbers([sequence], ahead=3) != sampler.numbers([sequence])
    now = sampler.numbers([sequence], ahead=1)
    sequence.tokens.append(1)
    assert sampler.numbers([sequence]) == now


def test_sampling_waits_for_the_device_once(monkeypatch: pytest.MonkeyPatch):
    """The device uploads, draws and copies the tokens only when the host waits for them."""
    sequences = [sequence_with((7, 8), **REQUESTS[i]) for i in (0, 1, 3, 5)]
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(1))
    expected = Sampler().draw(logits.clone(), sequences)
    cuda = FakeCuda()
    kernel = gpu_sampler.sample_rows
    monkeypatch.setattr(gpu_sampler, "has_streams", lambda device: True)
    monkeypatch.setattr(
        gpu_sampler, "sample_rows", lambda *args: cuda.launch(lambda: kernel(*args))
    )
    with cuda.installed():
        waits = []
        synchronize = FakeEvent.synchronize

        def waited(event: FakeEvent) -> None:
            waits.append(event)
            synchronize(event)

        monkeypatch.setattr(FakeEvent, "synchronize", waited)
        found = drawn(GpuSampler(frozenset(), 4, CPU), logits, sequences)
    assert len(waits) == 1
    assert found == expected


def test_changes_of_all_rows_take_two_copies(monkeypatch: pytest.MonkeyPatch):
    copies = []
    original = gpu_sampler.upload

    def upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
        copies.append(len(values))
        return original(values, device)

    monkeypatch.setattr(gpu_sampler, "upload", upload)
    sampler = GpuSampler(frozenset({5}), len(REQUESTS), CPU)
    sequences = [sequence_with((7, 8), **params) for params in REQUESTS]
    drawn(sampler, torch.randn(len(REQUESTS), VOCAB), sequences)
    assert len(copies) == 2
    assert copies[0] == copies[1] > 4
    plain = [sequence_with(seed=1), sequence_with(temperature=0.0, logprobs=True)]
    drawn(sampler, torch.randn(2, VOCAB), plain)
    assert len(copies) == 2
