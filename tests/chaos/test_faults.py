"""A server survives failures of disks, descriptors, memory, files and clocks."""

from __future__ import annotations

import asyncio
import contextlib
import random
import resource
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import grpc
import psutil
import pytest
from builders.bases.tiny_models import save_tiny_model
from builders.random_adapters import AdapterSpec, arch_of, write_adapter
from builders.registries import until
from chaos.administration import PATHS, Administrator, Operation
from chaos.disk import filled, read_only, small_disk
from chaos.memory_group import memory_group
from chaos.wall_clock import WallClock
from grpc import StatusCode as Code
from servers.engine_harness import EngineHarness, make_request
from servers.zygote import Life, Zygote, running_zygote
from torch.utils._python_dispatch import TorchDispatchMode

from turret.clients.errors import TurretRpcError
from turret.server.engine import loop
from turret.server.engine.step.runner import TorchExecutor
from turret.server.errors import TurretError, UnavailableError
from turret.v1 import inference_pb2, inference_pb2_grpc

WRITES = ("load", "upload", "pin", "replace", "unload", "fuse")
LASTING_MIB = 48


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> WallClock:
    return WallClock(tmp_path_factory.mktemp("clock"))


@pytest.fixture(scope="module")
def zygote(clock: WallClock) -> Iterator[Zygote]:
    with running_zygote(clock.environment) as started:
        yield started


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("faults") / "model")


class Served:
    """A server with two adapters, its administrator, and its resource use when idle.

    The letters x, y, z, v and w are names of adapters; a, b and c are directories with checkpoints.
    """

    def __init__(self, life: Life, root: Path, *, loads: bool = True) -> None:
        self.life = life
        self.admin = Administrator(life.address, root)
        for name in ("x", "y") if loads else ():
            self.admin.perform(Operation("load", name, "a" if name == "x" else "b"), {})
        self.answers = {name: self.admin.generate(name) for name in ("x", "y")}

    def code(self, kind: str, name: str, path: str = "") -> Code:
        try:
            self.admin.perform(Operation(kind, name, path), self.admin.state())
        except TurretRpcError as error:
            return error.code
        return Code.OK

    def constrained_code(self) -> Code:
        """The status of a request to the base with a constraint."""
        try:
            self.admin.client.generate("a", regex="[a-z]{9}", max_tokens=2)
        except TurretRpcError as error:
            return error.code
        return Code.OK

    def serves(self) -> bool:
        """Whether both adapters give the same answers as before."""
        return all(self.admin.generate(name) == text for name, text in self.answers.items())


Start = Callable[..., Served]


@pytest.fixture
def start(zygote: Zygote, model: Path, tmp_path: Path) -> Iterator[Start]:
    root = tmp_path / "adapters"
    for seed, name in enumerate(PATHS):
        write_adapter(root, arch_of(model), AdapterSpec(name, rank=4), seed)
    lives: list[Life] = []

    def begin(state_dir: Path, *flags: str, loads: bool = True) -> Served:
        common = ("--model", str(model), "--adapter-root", str(root), "--state-dir", str(state_dir))
        life = zygote.start(tmp_path, *common, *flags)
        lives.append(life)
        return Served(life, root, loads=loads)

    yield begin
    for life in lives:
        if life.is_alive:
            life.kill()
            life.wait()


@pytest.mark.slow
def test_a_disk_that_is_full_or_read_only_changes_nothing(start: Start, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 24) as disk:
        served = start(disk)
        before = served.admin.state()
        faults: tuple[tuple[Any, Code], ...] = (
            (filled, Code.RESOURCE_EXHAUSTED),
            (read_only, Code.UNAVAILABLE),
        )
        for fault, expected in faults:
            with fault(disk):
                # A removal needs no disk space.
                writes = [w for w in WRITES if w != "unload" or fault is read_only]
                found = {
                    kind: served.code(kind, "z" if kind in ("load", "upload", "fuse") else "x", "c")
                    for kind in writes
                }
                assert found == dict.fromkeys(writes, expected), fault
                assert served.serves()
                assert served.admin.state() == before
        for kind, name in (("upload", "z"), ("pin", "x"), ("unpin", "x"), ("unload", "z")):
            assert served.code(kind, name, "c") is Code.OK
        assert served.admin.state() == before
        served.life.process.terminate()
        served.life.wait()
        assert "internal error" not in served.life.log.read_text()


@pytest.mark.slow
def test_without_descriptors_or_memory_calls_fail_and_the_server_stays(
    start: Start, tmp_path: Path
) -> None:
    served = start(tmp_path / "state")
    pid, process = served.life.pid, served.life.process
    # Run each operation once, so that nothing must be imported when memory is short. Merges are not
    # run before.
    for kind, name in (("load", "z"), ("unload", "z")):
        assert served.code(kind, name, "c") is Code.OK
    before = served.admin.state()
    kept = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (process.num_fds() + 1, kept[1]))
    for kind in ("load", "upload"):
        assert served.code(kind, "z", "c") is Code.UNAVAILABLE
    assert served.serves()
    assert served.admin.state() == before
    resource.prlimit(pid, resource.RLIMIT_NOFILE, kept)
    assert served.code("load", "z", "c") is Code.OK
    assert served.code("unload", "z") is Code.OK
    # Allow a few more megabytes: operations that need more fail alone.
    whole = resource.prlimit(pid, resource.RLIMIT_AS)
    resource.prlimit(pid, resource.RLIMIT_AS, (process.memory_info().vms + (4 << 20), whole[1]))
    calls = (("merge", "x"), ("unmerge", "x"), ("load", "z"), ("fuse", "v"), ("unload", "z"))
    codes = {kind: served.code(kind, name, "c") for kind, name in calls}
    codes["constraint"] = served.constrained_code()
    assert served.life.is_alive, codes
    # A call may miss the result of an earlier call that failed for lack of memory.
    missing = {Code.NOT_FOUND, Code.FAILED_PRECONDITION}
    assert set(codes.values()) <= {Code.OK, Code.RESOURCE_EXHAUSTED} | missing, codes
    resource.prlimit(pid, resource.RLIMIT_AS, whole)
    served.code("unmerge", "x")
    for kind in ("merge", "unmerge"):
        assert served.code(kind, "x") is Code.OK
    for name in ("z", "v"):
        served.code("unload", name)
    assert served.serves()
    assert served.admin.state() == before
    assert "internal error" not in served.life.log.read_text()


@pytest.mark.slow
def test_a_server_that_exceeds_its_groups_memory_comes_back_with_every_adapter(
    start: Start, tmp_path: Path
) -> None:
    """The kernel kills the server, as in a container.

    The limit applies only to memory allocated afterwards.
    """
    served = start(tmp_path / "state", "--adapter-host-bytes", "1GiB")
    names = [f"n{number}" for number in range(400)]
    with memory_group(f"turret-{served.life.pid}", 12 << 20) as group:
        (group / "cgroup.procs").write_text(str(served.life.pid))
        confirmed: list[str] = []
        with contextlib.suppress(TurretRpcError):
            for name in names:
                served.admin.perform(Operation("load", name, "c"), {})
                confirmed.append(name)
        served.life.wait()
    assert len(confirmed) < len(names)
    again = start(tmp_path / "state", loads=False)
    state = again.admin.state()
    # The interrupted load may have been saved.
    assert {"x", "y", *confirmed} <= state.keys() <= {"x", "y", *names[: len(confirmed) + 1]}
    assert again.admin.generate("x") == served.answers["x"]


@pytest.mark.slow
def test_no_wait_depends_on_the_wall_clock(start: Start, tmp_path: Path, clock: WallClock) -> None:
    """Setting the clock during a stream neither ends nor extends anything."""
    served = start(tmp_path / "state")
    request = inference_pb2.GenerateRequest(prompt="a b c")
    request.stop.max_tokens, request.stop.ignore_eos = 200, True
    request.options.token_ids = True
    with grpc.insecure_channel(served.life.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        for ahead in (86_400, -86_400, -100_000_000, 0):
            # The deadline is within the jump of the clock.
            stream = stub.GenerateStream(request, timeout=3600)
            tokens = list(next(stream).token_ids)
            clock.set_ahead(ahead)
            for chunk in stream:
                tokens += chunk.token_ids
            assert len(tokens) == 200
            for kind, name in (("load", "z"), ("replace", "z"), ("upload", "w"), ("fuse", "v")):
                assert served.code(kind, name, "c") is Code.OK, (ahead, kind)
            for name in ("z", "w", "v"):
                assert served.code("unload", name) is Code.OK
            assert served.serves()
            start_time = time.monotonic()
            with pytest.raises(grpc.RpcError) as raised:
                list(stub.GenerateStream(request, timeout=0.02))
            assert raised.value.code() is Code.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
            assert time.monotonic() - start_time < 10
        clock.set_ahead(86_400)
        list(stub.GenerateStream(request, timeout=3600))
        clock.set_ahead(0)
    served.life.process.terminate()
    served.life.wait()
    assert "internal error" not in served.life.log.read_text()


@pytest.mark.long
def test_five_hundred_adapters_come_and_go(start: Start, tmp_path: Path) -> None:
    """Only a few adapters fit in memory; answers and the server's resource use stay the same."""
    served = start(tmp_path / "state", "--adapter-host-bytes", "1MiB")
    admin, source = served.admin, random.Random(1)
    paths = sorted(PATHS)
    path_of = {f"n{number}": paths[number % len(paths)] for number in range(500)}
    for name, path in path_of.items():
        admin.perform(Operation("load", name, path), {})
    texts: dict[str, str] = {}
    grown: list[int] = []
    for _ in range(3):
        for _ in range(200):
            name = source.choice(sorted(path_of))
            text = admin.generate(name)
            assert texts.setdefault(path_of[name], text) == text
            for kind in ("unload", "load"):
                admin.perform(Operation(kind, name, path_of[name]), {})
        grown.append(served.life.process.memory_info().rss)
    assert grown[-1] - grown[0] < LASTING_MIB << 20
    assert len(set(texts.values())) == len(paths)
    before = admin.state()
    served.life.kill()
    served.life.wait()
    again = start(tmp_path / "state", "--adapter-host-bytes", "1MiB", loads=False)
    assert again.admin.state() == before
    assert {again.admin.generate(f"n{n}") for n in range(len(paths))} == set(texts.values())


@pytest.mark.slow
def test_a_server_keeps_serving_without_its_model_directory(
    start: Start, model: Path, tmp_path: Path
) -> None:
    """The served model was read at startup; later reads report the missing file."""
    served = start(tmp_path / "state")
    shutil.move(model, model.with_name("elsewhere"))
    shutil.move(tmp_path / "adapters", tmp_path / "gone")
    try:
        assert served.serves()
        assert served.code("load", "z", "c") is Code.INVALID_ARGUMENT
        assert served.code("merge", "x") in (Code.OK, Code.INVALID_ARGUMENT)
        served.code("unmerge", "x")
        assert served.serves()
    finally:
        shutil.move(model.with_name("elsewhere"), model)
        shutil.move(tmp_path / "gone", tmp_path / "adapters")
    assert served.code("load", "z", "c") is Code.OK


@pytest.mark.slow
def test_clients_that_die_or_never_read_leave_nothing_behind(start: Start, tmp_path: Path) -> None:
    served = start(tmp_path / "state")
    process = served.life.process

    def census() -> tuple[int, int]:
        return process.num_fds(), process.num_threads()

    def sequences() -> float:
        host, _, port = served.life.metrics_address.rpartition(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            text = b""
            while data := connection.recv(65536):
                text += data
        lines = text.decode().splitlines()
        wanted = ("turret_sequences{", 'turret_kv_blocks{state="used"}')
        return sum(float(line.split()[-1]) for line in lines if line.startswith(wanted))

    _abandon(served, 4)
    until(lambda: sequences() == 0)
    time.sleep(0.5)
    before, memory = census(), process.memory_info().rss
    for _ in range(3):
        _abandon(served, 12)
    until(lambda: sequences() == 0)
    until(lambda: census()[0] <= before[0] and census()[1] <= before[1] + 1)
    assert process.memory_info().rss - memory < LASTING_MIB << 20
    assert served.serves()
    for name in ("x", "y"):
        assert served.code("unload", name) is Code.OK


def _abandon(served: Served, count: int) -> None:
    """Start streams with clients that read at most one message and then vanish."""
    request = inference_pb2.GenerateRequest(prompt="a b c")
    request.stop.max_tokens = 400
    request.stop.ignore_eos = True
    request.options.logprobs, request.options.top_n = True, 5
    request.adapters.add(name="x")
    for number in range(count):
        channel = grpc.insecure_channel(
            served.life.address, (("grpc.use_local_subchannel_pool", 1),)
        )
        stream = inference_pb2_grpc.InferenceStub(channel).GenerateStream(request)
        if number % 2:
            next(stream)
        channel.close()


def test_the_descriptor_count_sees_an_open_file(tmp_path: Path) -> None:
    process = psutil.Process()
    before = process.num_fds()
    with (tmp_path / "file").open("w"):
        assert process.num_fds() == before + 1


# The number of tested operations, out of more than a hundred; the last one is the sampler's.
NUM_PLACES = 10


class Counted(TorchDispatchMode):
    """Counts torch's operations, and makes one of them fail.

    Args:
        fail_at: The number of the failing operation, from 1; None for none.
    """

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.count = 0
        self._fail_at = fail_at

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self._fail_at:
            raise ValueError("a kernel failed")
        return func(*args, **(kwargs or {}))


async def _ask(harness: EngineHarness) -> list[Any]:
    requests = [make_request([1, 2, 3], *mix, max_tokens=3) for mix in ((), ("a",), ("a", "b"))]
    asking = [harness.run(request) for request in requests]
    return await asyncio.gather(*asking, return_exceptions=True)


async def _live(model: Path, root: Path, mode: Counted) -> tuple[list[Any], list[int], bool]:
    """The answers or errors, the requests in flight afterwards, and whether the engine is dead."""
    run = TorchExecutor.run

    def within(executor: TorchExecutor, step: Any) -> Any:
        with mode:
            return run(executor, step)

    answers: list[Any] = []
    in_flight: list[int] = []
    is_dead = False
    # The harness itself reports a dead engine.
    with contextlib.suppress(AssertionError):
        async with EngineHarness.start(model, root, adapters=("a", "b")) as harness:
            with patch.object(TorchExecutor, "run", within):
                answers = await _ask(harness)
            is_dead = harness.engine.is_dead
            in_flight = [record.in_flight for record in harness.registry.list()]
            if is_dead:
                with pytest.raises(UnavailableError):
                    await harness.engine.submit(make_request([1], "a"))
    return answers, in_flight, is_dead


@pytest.fixture(scope="module")
def root(tiny_llama: Path) -> Path:
    root = tiny_llama.parent / "adapters"
    for seed, name in enumerate("ab"):
        write_adapter(root, arch_of(tiny_llama), AdapterSpec(name, rank=4), seed)
    return root


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_an_engine_that_cannot_log_its_failure_ends_every_request(
    tiny_llama: Path, root: Path
) -> None:
    """Without memory, logging fails as well."""
    with patch.object(loop._log, "exception", side_effect=MemoryError):
        async with asyncio.timeout(60):
            answers, in_flight, is_dead = await _live(tiny_llama, root, Counted(1))
    assert is_dead
    assert all(isinstance(answer, TurretError) for answer in answers)
    assert in_flight == [0, 0]


@pytest.mark.slow
async def test_a_fault_in_any_operation_ends_every_request_and_releases_everything(
    tiny_llama: Path, root: Path
) -> None:
    whole = Counted()
    answers, in_flight, is_dead = await _live(tiny_llama, root, whole)
    assert not is_dead
    assert [len(answer.token_ids) for answer in answers] == [3] * 3
    assert in_flight == [0, 0]
    assert whole.count > 100
    for place in range(NUM_PLACES):
        at = 1 + place * (whole.count - 1) // (NUM_PLACES - 1)
        answers, in_flight, is_dead = await _live(tiny_llama, root, Counted(at))
        assert is_dead, at
        assert all(isinstance(answer, TurretError) for answer in answers), at
        assert in_flight == [0, 0], at
