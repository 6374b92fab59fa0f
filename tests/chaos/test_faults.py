"""Disks, descriptors, memory and files that fail under a server: it goes on."""

from __future__ import annotations

import resource
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from builders.bases.tiny_models import save_tiny_model
from builders.random_adapters import AdapterSpec, arch_of, write_adapter
from builders.registries import until
from chaos.administration import PATHS, Administrator, Operation
from chaos.disk import filled, read_only, small_disk
from chaos.zygote import Life, Zygote, running_zygote
from grpc import StatusCode as Code

from turret.v1 import inference_pb2, inference_pb2_grpc

WRITES = ("load", "upload", "pin", "replace", "unload", "fuse")
LASTING_MIB = 48


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with running_zygote() as started:
        yield started


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("faults") / "model")


class Served:
    """A server with two adapters, who administers it, and what it takes when nothing happens."""

    def __init__(self, life: Life, root: Path) -> None:
        self.life = life
        self.admin = Administrator(life.address, root)
        for name in ("x", "y"):
            self.admin.perform(Operation("load", name, "a" if name == "x" else "b"), {})
        self.answers = {name: self.admin.generate(name) for name in ("x", "y")}

    def code(self, kind: str, name: str, path: str = "") -> Code:
        try:
            self.admin.perform(Operation(kind, name, path), self.admin.state())
        except grpc.RpcError as error:
            return error.code()  # type: ignore[attr-defined]
        return Code.OK

    def serves(self) -> bool:
        """Whether both adapters answer as before."""
        return all(self.admin.generate(name) == text for name, text in self.answers.items())


@pytest.fixture
def start(zygote: Zygote, model: Path, tmp_path: Path) -> Iterator[Callable[..., Served]]:
    root = tmp_path / "adapters"
    for seed, name in enumerate(PATHS):
        write_adapter(root, arch_of(model), AdapterSpec(name, rank=4), seed)
    lives: list[Life] = []

    def begin(state_dir: Path, *flags: str) -> Served:
        common = ("--model", str(model), "--adapter-root", str(root), "--state-dir", str(state_dir))
        life = zygote.start(tmp_path, *common, *flags)
        lives.append(life)
        return Served(life, root)

    yield begin
    for life in lives:
        if life.is_alive:
            life.kill()
            life.wait()


@pytest.mark.slow
def test_a_disk_that_is_full_or_read_only_changes_nothing(
    start: Callable[..., Served], tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", 24) as disk:
        served = start(disk)
        before = served.admin.state()
        faults: tuple[tuple[Any, Code], ...] = (
            (filled, Code.RESOURCE_EXHAUSTED),
            (read_only, Code.UNAVAILABLE),
        )
        for fault, expected in faults:
            with fault(disk):
                # A removal needs no room.
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
    start: Callable[..., Served], tmp_path: Path
) -> None:
    served = start(tmp_path / "state")
    pid, process = served.life.pid, served.life.process
    served.code("load", "z", "c")
    served.code("unload", "z")
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
    # Room for a few megabytes more: what does not fit fails by itself.
    whole = resource.prlimit(pid, resource.RLIMIT_AS)
    resource.prlimit(pid, resource.RLIMIT_AS, (process.memory_info().vms + (4 << 20), whole[1]))
    codes = [served.code("load", "z", "c"), served.code("unload", "z")]
    assert served.life.is_alive, codes
    resource.prlimit(pid, resource.RLIMIT_AS, whole)
    served.code("unload", "z")
    assert served.serves()
    assert served.admin.state() == before


@pytest.mark.slow
def test_a_model_directory_that_vanishes_is_not_missed(
    start: Callable[..., Served], model: Path, tmp_path: Path
) -> None:
    """What is served was read at the start; what is read later says what is missing."""
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
def test_clients_that_die_or_never_read_leave_nothing(
    start: Callable[..., Served], tmp_path: Path
) -> None:
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
    """Streams whose clients read one message at most, and then vanish with their connections."""
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


def test_the_census_counts(tmp_path: Path) -> None:
    process = psutil.Process()
    before = process.num_fds()
    with (tmp_path / "file").open("w"):
        assert process.num_fds() == before + 1
