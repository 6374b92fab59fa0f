"""Steps on a device that is as late as its streams allow: each sees its own metadata."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import patch

import pytest
import torch
from builders.facts import Resident, resident
from fake_cuda import FakeCuda
from said import says
from transformers import LlamaConfig

from turret.kernels.gpu import tables as staged_buffer
from turret.kernels.gpu.tables import ATTENTION_HEADER
from turret.server.adapters.adapter import Mix
from turret.server.adapters.device import AdapterMemoryError
from turret.server.adapters.device import gpu_uploads as uploads_module
from turret.server.adapters.device.gpu_pack import GpuPack
from turret.server.adapters.device.gpu_store import GpuStore
from turret.server.adapters.operators.adapter_operators import AdapterOperators, ModuleOperators
from turret.server.adapters.operators.low_rank import LowRank
from turret.server.adapters.peft_format.reading import dora_gain
from turret.server.engine.scheduling.request import Request
from turret.server.engine.scheduling.sequence import Scheduled, Sequence, Step
from turret.server.engine.step.gpu_executor import CudaCapture, DecodeGraphs, GpuExecutor
from turret.server.engine.step.gpu_tables import BlockTables
from turret.server.engine.step.runner import DeviceFullError, Runner
from turret.server.models.decoding.layer_ops import KvCache
from turret.server.models.describe import describe_projections
from turret.server.models.families import read_arch

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
    """Records the tokens, positions and blocks that the device sees when it executes a step."""

    arch = ARCH
    device = CPU
    dtype = torch.float32
    epoch = 0

    def __init__(self, cuda: FakeCuda) -> None:
        self.seen: list[tuple[list[int], list[int], int]] = []
        self._cuda = cuda

    def compute(self, step: Any, cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
        table = step.attention[None]

        def work() -> None:
            # The position of the sequence's block numbers, from the first record.
            block = int(table.blocks[int(table.buffer[ATTENTION_HEADER + 3])])
            self.seen.append((step.token_ids.tolist(), step.positions.tolist(), block))

        self._cuda.launch(work)
        return torch.zeros(CHUNK, 1), torch.zeros(0, 1)


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    """A late device with streams and events."""
    fake, write = FakeCuda(), BlockTables.write
    uploads_module._beside.cache_clear()

    def late_write(tables: BlockTables, places: torch.Tensor, numbers: torch.Tensor) -> None:
        fake.launch(lambda: write(tables, places, numbers))

    with (
        fake.installed(),
        patch.object(BlockTables, "write", late_write),
        patch.object(staged_buffer, "has_streams", lambda device: True),
        patch.object(uploads_module, "has_streams", lambda device: True),
    ):
        yield fake


def _executor(cuda: FakeCuda) -> tuple[GpuExecutor, _Decoder]:
    decoder: Any = _Decoder(cuda)
    executor = GpuExecutor(
        decoder,
        KvCache(ARCH, 32, 16, torch.float32, CPU),
        GpuStore(describe_projections(ARCH), torch.float32, CPU, 1 << 20),
        max_num_seqs=2,
        max_num_batched_tokens=CHUNK,
        capture=None,
    )
    return executor, decoder


def test_queued_chunks_of_a_prompt_keep_their_own_inputs(cuda: FakeCuda):
    """Only the last chunk samples, so the host could be far ahead of the device."""
    executor, decoder = _executor(cuda)
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


def test_the_host_is_free_once_a_step_is_launched(cuda: FakeCuda):
    executor, decoder = _executor(cuda)
    runner, found = Runner(executor, frozenset()), list[tuple[int, bool]]()
    assert runner.is_asynchronous
    sequence = Sequence(Request(request_id="r", prompt_token_ids=tuple(range(9))), Mix(()), 0.0)
    sequence.blocks = [7]

    def meanwhile() -> None:
        found.append((len(decoder.seen), bool(cuda.default.pending)))

    runner.run(Step((Scheduled(sequence, CHUNK),), (), 0), meanwhile)
    assert found == [(0, True)]


def test_a_failed_step_is_sent_again_completely(cuda: FakeCuda):
    """Block numbers of a failed step are transferred with the next one."""
    executor, decoder = _executor(cuda)
    sequence = Sequence(Request(request_id="r", prompt_token_ids=tuple(range(9))), Mix(()), 0.0)
    sequence.blocks = [7]
    step = Step((Scheduled(sequence, CHUNK),), (), 0)
    with (
        patch.object(decoder, "compute", side_effect=torch.OutOfMemoryError("full")),
        patch.object(BlockTables, "write", lambda *_: None),
        pytest.raises(torch.OutOfMemoryError),
    ):
        executor.run(step)
    executor.run(step)
    cuda.default.synchronize()
    assert decoder.seen == [(list(range(CHUNK)), list(range(CHUNK)), 7)]


def _adapter(key: str) -> Resident:
    low_rank = LowRank(torch.randn(8, 64), torch.randn(8, 64))
    path = "model.layers.0.self_attn.q_proj"
    return resident(key, AdapterOperators({path: ModuleOperators(low_rank)}))


def test_each_adapter_of_a_mix_is_uploaded_once_and_in_parallel(cuda: FakeCuda):
    executor, _ = _executor(cuda)
    runner = Runner(executor, frozenset())
    adapters = [_adapter(key) for key in "ab"]
    mix = Mix(tuple((adapter, 1.0) for adapter in adapters))
    sequence = Sequence(Request(request_id="r", prompt_token_ids=(1, 2)), mix, 0.0)
    assert not runner.is_near(sequence)
    uploads = executor.store._uploads
    assert set(uploads._staged) == {"a", "b"}
    for staged in uploads._staged.values():
        staged.copying.result()
    stream: Any = uploads._stream
    stream.synchronize()
    assert runner.is_near(sequence)
    executor.store.prepare(adapters)
    cuda.default.synchronize()
    assert runner.is_near(sequence)
    assert uploads._staged == {}
    assert stream.pending == deque()


def test_idle_adapters_are_evicted_if_a_step_runs_out_of_memory(cuda: FakeCuda):
    executor, _ = _executor(cuda)
    runner = Runner(executor, frozenset())
    adapters = [_adapter(key) for key in "ab"]
    idle, used = adapters
    executor.store.prepare(adapters)
    mix = Mix(((used, 1.0),))
    sequence = Sequence(Request(request_id="r", prompt_token_ids=(1, 2, 3)), mix, 0.0)
    sequence.blocks = [3]
    here: list[tuple[int, int]] = []

    def full(*_: Any) -> Any:
        here.append((idle.bytes_device, used.bytes_device))
        raise torch.OutOfMemoryError("full")

    with patch.object(GpuExecutor, "_body", lambda *_: full), pytest.raises(DeviceFullError):
        runner.run(Step((Scheduled(sequence, 2),), (), 0))
    size = executor.store.stored_bytes(used.operators)
    assert here == [(size, size), (0, size)]


def test_an_adapter_that_does_not_fit_keeps_the_graphs_of_others(cuda: FakeCuda):
    executor, _ = _executor(cuda)
    runner = Runner(executor, frozenset())
    adapters = [_adapter(key) for key in "ab"]
    idle, used = adapters
    executor.store.prepare(adapters[:1])
    mix = Mix(((used, 1.0),))
    sequence = Sequence(Request(request_id="r", prompt_token_ids=(1, 2, 3)), mix, 0.0)
    sequence.blocks = [3]
    step = Step((Scheduled(sequence, 2),), (), 0)
    assert not runner.is_near(sequence)
    uploads = executor.store._uploads
    uploads._staged["b"].copying.result()
    dropped, tried = list[str](), list[str]()

    def full(pack: GpuPack, key: str, operators: AdapterOperators) -> None:
        tried.append(key)
        raise torch.OutOfMemoryError("full")

    with (
        patch.object(GpuPack, "insert", full),
        patch.object(DecodeGraphs, "drop", lambda self: dropped.append("graphs")),
    ):
        for _ in range(3):
            with pytest.raises(AdapterMemoryError):
                runner.run(step)
    assert tried == ["b", "b"], "once more after idle ones have left, and then not for a while"
    assert dropped == []
    assert idle.bytes_device == 0
    cuda.default.synchronize()
    assert uploads._held() == 0, "its copy has left the device"
    refusal = runner.refusal(sequence)
    assert refusal is not None
    assert says("DEVICE_MEMORY_SHORT")(refusal)


def test_memory_is_freed_after_a_failed_capture(cuda: FakeCuda):
    """With torch 2.11, a failed capture leaves the allocator unable to free its reserve."""
    executor, _ = _executor(cuda)
    stream, graph = torch.cuda.Stream(CPU), torch.cuda.CUDAGraph()
    with pytest.raises(ValueError, match="failed"), torch.cuda.graph(graph, stream=stream):
        raise ValueError("failed")
    with pytest.raises(RuntimeError, match="INTERNAL ASSERT"):
        torch.cuda.empty_cache()
    executor.free_memory()


@pytest.mark.parametrize(
    ("error", "is_full"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_errors_are_recognised(cuda: FakeCuda, error: Exception, is_full: bool):
    """The driver, libraries and Triton have no specific type for this error."""
    runner = Runner(_executor(cuda)[0], frozenset())
    sequence = Sequence(Request(request_id="r", prompt_token_ids=(1, 2, 3)), Mix(()), 0.0)
    sequence.blocks = [3]
    with (
        patch.object(GpuExecutor, "run", side_effect=error),
        pytest.raises(DeviceFullError if is_full else type(error)),
    ):
        runner.run(Step((Scheduled(sequence, 2),), (), 0))


def test_steps_run_on_their_own_stream(cuda: FakeCuda):
    """The stream runs after earlier work and before later work."""
    order: list[str] = []
    stream = uploads_module.StepStream(CPU)
    cuda.launch(lambda: order.append("loaded weights"))
    with stream.entered():
        assert cuda.current is not cuda.default
        cuda.launch(lambda: order.append("step"))
        steps = cuda.current
    cuda.launch(lambda: order.append("after"))
    steps.synchronize()
    assert order == ["loaded weights", "step"]
    cuda.default.synchronize()
    assert order == ["loaded weights", "step", "after"]
    with stream.entered():
        assert cuda.current is steps


def test_work_beside_the_steps_starts_after_them_and_ends_within_its_block(cuda: FakeCuda):
    order: list[str] = []
    cuda.launch(lambda: order.append("merged weights"))
    with uploads_module.beside_steps(CPU):
        cuda.launch(lambda: order.append("norms"))
        assert order == []
    assert order == ["merged weights", "norms"]


def dora_norms(weight: torch.Tensor) -> torch.Tensor:
    """Compute the gain of a DoRA alongside the steps, like a load."""
    a, b = torch.ones(4, weight.shape[1]), torch.ones(weight.shape[0], 4)
    with uploads_module.beside_steps(CPU):
        return dora_gain(torch.ones(len(weight)), a, b, 0.5, weight)


def test_loads_never_use_the_stream_of_a_capture(cuda: FakeCuda):
    """PyTorch assigns 32 streams in turn; the 33rd load must not get the capturing one.

    Loads run on a few threads, except preloads, which have a thread each.
    """
    graphs = DecodeGraphs(CudaCapture(CPU))
    steps, loads = uploads_module.StepStream(CPU), list[torch.Tensor]()
    with ThreadPoolExecutor(2) as pool, steps.entered():

        def body() -> tuple[torch.Tensor, torch.Tensor]:
            jobs = [pool.submit(dora_norms, torch.ones(8, 8)) for _ in range(33)]
            loads.extend(job.result() for job in jobs)
            return torch.zeros(1), torch.zeros(1)

        graphs.prepare(0, "a", body)
    for _ in range(33):
        with ThreadPoolExecutor(1) as thread:
            loads.append(thread.submit(dora_norms, torch.ones(8, 8)).result())
    assert cuda.num_captures == 1
    assert len(loads) == 3 * 33, "of a step, of its capture, and afterwards"
    assert all(torch.equal(norms, loads[0]) for norms in loads)
    assert sorted(stream.priority for stream in set(cuda.handed_out)) == [-1, -1, 0]
    assert len(cuda.handed_out) == 3


@pytest.mark.parametrize("spoil", ["synchronize", "wait_stream", "launch", "whole"])
def test_a_forbidden_operation_during_capture_spoils_the_capture(cuda: FakeCuda, spoil: str):
    stream = torch.cuda.Stream(CPU, priority=-1)

    def disturb() -> None:
        with torch.cuda.stream(stream):
            if spoil == "whole":
                torch.cuda.synchronize(CPU)
            elif spoil == "launch":
                cuda.launch(lambda: None)
            elif spoil == "wait_stream":
                stream.wait_stream(torch.cuda.default_stream(CPU))
            else:
                stream.synchronize()

    with (
        ThreadPoolExecutor(1) as pool,
        pytest.raises(RuntimeError, match="previous error"),
        torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream),
        pytest.raises(RuntimeError, match="when stream is capturing"),
    ):
        pool.submit(disturb).result()
    stream.synchronize()
