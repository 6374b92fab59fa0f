"""Decode steps as graphs: buckets, captures, and a real graph if there is a GPU."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_cuda import FakeCuda
from gpu_path import FakeCapture

from turret.server.adapters.device.gpu_uploads import StepStream, beside_steps
from turret.server.engine.step import gpu_executor as executor
from turret.server.engine.step.gpu_executor import WINDOW, CudaCapture, DecodeGraphs, buckets

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def captured_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in conftest.py, which ``bench/gpu.sh`` does not load."""
    monkeypatch.setattr(executor, "SIGHTS", 2)


@pytest.mark.parametrize("most", [1, 7, 64, 200])
def test_buckets_cover_every_count_with_little_waste(most: int):
    sizes = buckets(most)
    assert sizes == tuple(sorted(set(sizes)))
    assert sizes[-1] == most
    for count in range(1, most + 1):
        size = next(s for s in sizes if s >= count)
        assert size < 2 * count or size - count < 64


def test_a_step_is_captured_the_second_time_and_then_replayed():
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
    for key in ("b", "b", "a", "c", "c"):
        graphs.run(0, key, lambda key=key: body(key))
    assert capture.num_captures == 3
    # There was no room for "c", so the graph that was used longest ago has gone.
    assert list(graphs._graphs) == ["a", "c"]
    graphs.run(0, "b", lambda: body("b"))
    assert capture.num_captures == 4
    assert list(graphs._graphs) == ["c", "b"]
    graphs.run(1, "a", lambda: body("a"))
    assert capture.num_captures == 4, "a new epoch starts afresh"
    graphs.run(1, "a", lambda: body("a"))
    assert capture.num_captures == 5


def test_without_capture_every_step_runs():
    graphs = DecodeGraphs(None)
    results = [graphs.run(0, "a", lambda: (torch.zeros(1), torch.ones(1))) for _ in range(3)]
    assert len({id(hidden) for hidden, _ in results}) == 3


def multiply() -> tuple[torch.Tensor, torch.Tensor]:
    """A body that needs a workspace, like that of every step."""
    return F.linear(torch.ones(1, 4), torch.ones(4, 4)), torch.zeros(1)


@pytest.mark.parametrize("frees_workspaces", [False, True])
def test_steps_are_recaptured_after_an_epoch_and_beyond_the_capacity(frees_workspaces: bool):
    """The test simulates the treatment of pools and workspaces in torch 2.11 and later.

    Captures at startup run on the loading thread, later ones on the engine's thread.
    """
    cuda = FakeCuda(frees_workspaces=frees_workspaces)
    with cuda.installed(), ThreadPoolExecutor(1) as pool:
        graphs = DecodeGraphs(CudaCapture(CPU), capacity=2)
        for epoch in range(3):
            pool.submit(graphs.prepare, epoch, "a", multiply).result()
            for key in "aabbccabcabc":
                graphs.run(epoch, key, multiply)
        # In every epoch, all three steps are captured, and two graphs stay. After that, each
        # captured step is the one whose graph was just dropped.
        assert cuda.num_captures == 3 * 9
        kept = graphs._graphs
        for key in list(kept):
            graphs.run(2, key, lambda: pytest.fail("a captured step is replayed"))


def test_after_a_failed_capture_no_step_uses_its_workspace():
    """Otherwise, the end of a later graph would free a workspace whose pool is gone."""
    fails = [True]

    def body() -> tuple[torch.Tensor, torch.Tensor]:
        outputs = multiply()
        if cuda.current.capturing is not None and fails:
            raise torch.OutOfMemoryError(fails.pop())
        return outputs

    cuda = FakeCuda(frees_workspaces=True)
    with cuda.installed():
        graphs = DecodeGraphs(CudaCapture(CPU), capacity=2)
        for key in "aa" + WINDOW * "a" + "bbcc":
            graphs.run(0, key, body)
        assert cuda.num_captures == 3
        for key in "bc":
            graphs.run(0, key, lambda: pytest.fail("a captured step is replayed"))


@pytest.mark.parametrize("frees_workspaces", [False, True])
def test_the_fake_capture_fails_like_torch(frees_workspaces: bool):
    """The faults are a permanent pool, and a workspace outside the pool."""
    cuda = FakeCuda(frees_workspaces=frees_workspaces)
    with cuda.installed():
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        if frees_workspaces:
            with torch.cuda.stream(stream):
                multiply()
        graphs = []
        for _ in range(2):
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1], pool=pool, stream=stream):
                multiply()
        del graphs[0]
        if frees_workspaces:
            with pytest.raises(RuntimeError, match="illegal memory access"):
                graphs[0].replay()
            return
        graphs[0].replay()
        graphs.clear()
        with (
            pytest.raises(RuntimeError, match="use_count"),
            torch.cuda.graph(torch.cuda.CUDAGraph(), pool=pool, stream=stream),
        ):
            multiply()


def test_graphs_share_a_pool_until_they_are_dropped():
    """Nothing is captured into a dropped pool that still has contents, such as a step's results."""
    cuda = FakeCuda()
    with cuda.installed():
        graphs = DecodeGraphs(CudaCapture(CPU))
        for epoch in range(3):
            for key in "aabb":
                graphs.run(epoch, key, multiply)
            assert cuda.num_pools == epoch + 1
    assert cuda.num_captures == 3 * 2


class Broken(FakeCapture):
    """Fails a number of times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self._left = times

    def __call__(self, body: Any) -> Any:
        found = super().__call__(body)
        if self._left:
            self._left -= 1
            raise RuntimeError("operation not permitted when stream is capturing")
        return found


def test_a_failed_capture_is_retried(caplog: pytest.LogCaptureFixture):
    capture, offs = Broken(2), list[str]()
    graphs = DecodeGraphs(capture, on_off=lambda: offs.append("off"))
    results = [graphs.run(0, "a", multiply)[0] for _ in range(2 * WINDOW + 4)]
    assert all(torch.equal(result, results[0]) for result in results)
    assert capture.num_captures == 3
    assert capture.num_replays > 0
    assert not offs
    assert "without CUDA graphs" in caplog.text


def test_three_failures_in_a_row_turn_graphs_off_and_are_reported():
    capture, offs = Broken(9), list[str]()
    graphs = DecodeGraphs(capture, on_off=lambda: offs.append("off"))
    for _ in range(5 * WINDOW):
        graphs.run(0, "a", multiply)
    assert capture.num_captures == 3
    assert offs == ["off"]
    forms = [frozenset({name}) for name in "ab"]
    assert [graphs.form_for("kind", form) for form in forms] == forms


def test_a_rare_form_of_step_is_not_captured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(executor, "SIGHTS", 8)
    capture = FakeCapture()
    graphs = DecodeGraphs(capture)
    for step in range(40 * 33):
        graphs.run(0, "rare" if step % 40 == 0 else f"once, {step}", multiply)
    assert capture.num_captures == 0
    for _ in range(8):
        assert capture.num_captures == 0
        graphs.run(0, "common", multiply)
    assert capture.num_captures == 1


def test_a_failed_capture_leaves_the_stream_unchanged(caplog: pytest.LogCaptureFixture):
    """Work without graphs continues in order."""
    cuda, streams = FakeCuda(), []

    def body() -> tuple[torch.Tensor, torch.Tensor]:
        streams.append(cuda.current)
        if len(streams) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return multiply()

    with cuda.installed():
        graphs = DecodeGraphs(CudaCapture(CPU))
        for _ in range(3):
            graphs.run(0, "a", body)
    assert cuda.num_captures == 0
    assert "without CUDA graphs" in caplog.text
    first, capturing, *rest = streams
    assert capturing is not first
    assert rest == [first, first]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        # The driver's error when it instantiates a graph.
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_graphs_are_dropped_when_memory_runs_out_and_captured_again(error: RuntimeError):
    """An attempt to capture delays everybody's step, so none is made for a while."""

    class Full(FakeCapture):
        fails, num_failures = False, 0

        def __call__(self, body: Any) -> Any:
            if self.fails:
                self.num_failures += 1
                raise error
            return super().__call__(body)

    capture, offs = Full(), list[str]()
    graphs = DecodeGraphs(capture, on_off=lambda: offs.append("off"))
    for key in "aabbc":
        graphs.run(0, key, multiply)
    capture.fails = True
    graphs.run(0, "c", multiply)
    assert graphs._graphs == {}
    for _ in range(4 * WINDOW):
        graphs.run(0, "c", multiply)
    assert capture.num_failures == 5
    assert not offs
    capture.fails = False
    for _ in range(WINDOW):
        graphs.run(0, "c", multiply)
    for key in "bb":
        graphs.run(0, key, multiply)
    assert set(graphs._graphs) == {"b", "c"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_real_graphs_are_captured_again_after_an_epoch():
    device = torch.device("cuda")
    weight = torch.ones(64, 64, device=device)

    def body() -> tuple[torch.Tensor, torch.Tensor]:
        return F.linear(weight, weight), weight + 1.0

    graphs = DecodeGraphs(CudaCapture(device), capacity=2)
    for epoch in range(3):
        for key in "aabbccabcabc":
            product, _ = graphs.run(epoch, key, body)
            assert float(product[0, 0]) == 64.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_replayed_graph_reads_the_current_buffers():
    buffer = torch.ones(4, device="cuda")

    def body() -> tuple[torch.Tensor, torch.Tensor]:
        return buffer * 2.0, buffer + 1.0

    graphs = DecodeGraphs(CudaCapture(torch.device("cuda")))
    graphs.run(0, "a", body)
    doubled, _ = graphs.run(0, "a", body)
    assert doubled.tolist() == [2.0] * 4
    buffer.fill_(5.0)
    again, raised = graphs.run(0, "a", body)
    assert again.data_ptr() == doubled.data_ptr()
    assert again.tolist() == [10.0] * 4
    assert raised.tolist() == [6.0] * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_real_captures_and_loads_run_concurrently():
    device = torch.device("cuda", torch.cuda.current_device())
    weight = torch.randn(2048, 2048, dtype=torch.bfloat16, device=device)
    x = torch.randn(16, 2048, dtype=torch.bfloat16, device=device)
    ended, offs = threading.Event(), list[str]()
    graphs = DecodeGraphs(CudaCapture(device), on_off=lambda: offs.append("off"))

    def load() -> int:
        count = 0
        while not ended.is_set():
            with beside_steps(device):
                float((weight.float() @ weight.float()).sum())
            count += 1
        return count

    def body() -> tuple[torch.Tensor, torch.Tensor]:
        return F.linear(F.linear(x, weight).relu(), weight), x

    with ThreadPoolExecutor(2) as pool, StepStream(device).entered(), torch.inference_mode():
        expected = body()[0].clone()
        loads = [pool.submit(load) for _ in range(2)]
        try:
            for number in range(200):
                for _ in range(3):
                    assert torch.equal(graphs.run(0, number, body)[0], expected)
        finally:
            ended.set()
        assert all(each.result() for each in loads)
    assert not offs
    torch.cuda.empty_cache()
