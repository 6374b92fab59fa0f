"""Decode steps as graphs: buckets, what is captured when, and a real graph where there is a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_path import FakeCapture

from turret.server.engine.decode_graphs import CudaCapture, DecodeGraphs, buckets


@pytest.mark.parametrize("most", [1, 7, 64, 200])
def test_buckets_cover_every_count_with_little_waste(most: int):
    sizes = buckets(most)
    assert sizes == tuple(sorted(set(sizes)))
    assert sizes[-1] == most
    for count in range(1, most + 1):
        size = next(s for s in sizes if s >= count)
        assert size < 2 * count or size - count < 64


def test_a_body_is_captured_the_second_time_and_replayed_from_then_on():
    capture = FakeCapture()
    graphs = DecodeGraphs(capture, capacity=2)
    calls: list[str] = []

    def body(name: str) -> Any:
        calls.append(name)
        return torch.full((1,), float(len(calls))), torch.zeros(1)

    first = graphs.run(0, "a", lambda: body("a"))
    assert capture.num_captures == 0
    assert first[0].item() == 1.0
    captured = graphs.run(0, "a", lambda: body("a"))
    assert capture.num_captures == 1
    replayed = graphs.run(0, "a", lambda: body("not this one"))
    assert capture.num_replays == 1
    assert replayed[0] is captured[0], "a replay writes where the capture did"
    assert "not this one" not in calls
    for key in ("b", "b", "c", "c"):
        graphs.run(0, key, lambda key=key: body(key))
    assert capture.num_captures == 3
    # "a" made room.
    graphs.run(0, "a", lambda: body("a"))
    assert capture.num_captures == 4
    graphs.run(1, "a", lambda: body("a"))
    assert capture.num_captures == 4, "a new epoch starts afresh"
    graphs.run(1, "a", lambda: body("a"))
    assert capture.num_captures == 5


def test_without_capture_every_step_runs():
    graphs = DecodeGraphs(None)
    results = [graphs.run(0, "a", lambda: (torch.zeros(1), torch.ones(1))) for _ in range(3)]
    assert len({id(hidden) for hidden, _ in results}) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_real_graph_reads_its_buffers_anew():
    buffer = torch.ones(4, device="cuda")

    def body() -> tuple[torch.Tensor, torch.Tensor]:
        return buffer * 2.0, buffer + 1.0

    graphs = DecodeGraphs(CudaCapture())
    graphs.run(0, "a", body)
    doubled, _ = graphs.run(0, "a", body)
    assert doubled.tolist() == [2.0] * 4
    buffer.fill_(5.0)
    again, raised = graphs.run(0, "a", body)
    assert again.data_ptr() == doubled.data_ptr()
    assert again.tolist() == [10.0] * 4
    assert raised.tolist() == [6.0] * 4
