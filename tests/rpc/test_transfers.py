"""Replace, upload and export over gRPC, on a real registry."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from builders import registries
from builders.adapters import edit_config
from builders.registries import Registries
from servers.rpc_harness import Harness, bearer, failure_of, harness, tokens_of

from turret.clients.adapter_files import ExportWriter, upload_messages
from turret.server.adapters.registry import AdapterExport
from turret.server.adapters.state_dir import StateDir
from turret.server.api import admin, uploads
from turret.server.api.access import Shares
from turret.v1 import adapters_pb2 as pb

Code = grpc.StatusCode
TOKENS = tokens_of("alice", "bob", role="admin")
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Registries]:
    """Makes registries, which are closed after the test's server."""
    made = Registries(tmp_path)
    yield made
    made.close()


@pytest.fixture
async def server(made: Registries, tmp_path: Path) -> AsyncIterator[Harness]:
    registry = made(2.5, state=StateDir(tmp_path / "state", 1 << 20))
    async with harness(registry=registry) as running:
        yield running


def leftovers(tmp_path: Path) -> list[Path]:
    return [*(tmp_path / "state" / "incoming").iterdir(), *(tmp_path / "state" / "files").iterdir()]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for the effect of another thread."""
    await asyncio.to_thread(registries.until, condition)


def upload(server: Harness, directory: Path, name: str = "up", **flags: Any) -> Any:
    settings: dict[str, Any] = {"pinned": False, "replace": False} | flags
    return server.adapters.UploadAdapter(upload_messages(name, directory, **settings))


def announced(directory: Path, **changes: Any) -> list[pb.FileInfo]:
    files = []
    for name in (CONFIG, TENSORS):
        data = (directory / name).read_bytes()
        fields = {"path": name, "size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        files.append(pb.FileInfo(**fields | (changes if name == TENSORS else {})))
    return files


def header(files: list[pb.FileInfo], name: str = "up") -> pb.UploadAdapterRequest:
    return pb.UploadAdapterRequest(header=pb.UploadHeader(name=name, files=files))


def chunk(path: str, data: bytes) -> pb.UploadAdapterRequest:
    return pb.UploadAdapterRequest(chunk=pb.FileChunk(path=path, data=data))


async def test_an_adapter_is_replaced(server: Harness) -> None:
    replace = server.adapters.ReplaceAdapter
    await server.adapters.LoadAdapter(pb.LoadAdapterRequest(name="a", path="a"))
    new = await replace(pb.ReplaceAdapterRequest(name="a", path="b"))
    same = await replace(pb.ReplaceAdapterRequest(name="a", path="b"))
    assert (new.generation, same) == (2, new)
    for request, code in (
        (pb.ReplaceAdapterRequest(name="x", path="b"), Code.NOT_FOUND),
        (pb.ReplaceAdapterRequest(name="a", path="../a"), Code.INVALID_ARGUMENT),
        (pb.ReplaceAdapterRequest(name="a", path="none"), Code.INVALID_ARGUMENT),
        (
            pb.ReplaceAdapterRequest(name="a", path="a", expected_generation=1),
            Code.FAILED_PRECONDITION,
        ),
    ):
        assert (await failure_of(replace(request))).code is code
    assert await server.adapters.GetAdapter(pb.GetAdapterRequest(name="a")) == new


async def test_text_that_cannot_be_encoded_registers_nothing(
    server: Harness, tmp_path: Path
) -> None:
    folder = tmp_path / "root" / "a"
    edit_config(folder, base_model_name_or_path="\ud800")
    load = server.adapters.LoadAdapter
    await load(pb.LoadAdapterRequest(name="good", path="b"))
    for failure in (
        await failure_of(load(pb.LoadAdapterRequest(name="bad", path="a"))),
        await failure_of(upload(server, folder)),
        await failure_of(
            server.adapters.ReplaceAdapter(pb.ReplaceAdapterRequest(name="good", path="a"))
        ),
    ):
        assert failure.code is Code.INVALID_ARGUMENT
        assert failure.reasons == {CONFIG: "JSON_HALF_CHARACTER"}
    listed = await server.adapters.ListAdapters(pb.ListAdaptersRequest())
    assert [(a.name, a.generation) for a in listed.adapters] == [("good", 1)]
    await until(lambda: not leftovers(tmp_path))


async def test_a_restored_adapter_with_such_text_is_listed(
    made: Registries, tmp_path: Path
) -> None:
    first = made(state=StateDir(tmp_path / "state", 1 << 20), load="ab")
    first.close()
    path = tmp_path / "state" / "adapters" / "a.json"
    saved = json.loads(path.read_text())
    saved["facts"] |= {
        "base_model": "x\ud800",
        "method": "\udfff",
        "warnings": ["made for \udc00"],
        "target_modules": ["q\ud801"],
    }
    path.write_text(json.dumps(saved))
    registry = made(state=StateDir(tmp_path / "state", 1 << 20))
    registry.restore()
    async with harness(registry=registry) as server:
        listed = await server.adapters.ListAdapters(pb.ListAdaptersRequest())
        got = await server.adapters.GetAdapter(pb.GetAdapterRequest(name="a"))
        await server.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="a"))
    bad, good = listed.adapters
    assert got == bad
    assert (bad.base_model, bad.method, list(bad.warnings)) == ("x?", "?", ["made for ?"])
    assert list(bad.target_modules) == ["q?"]
    assert good.name == "b"


async def test_upload_then_export_gives_the_same_files(server: Harness, tmp_path: Path) -> None:
    source = tmp_path / "root" / "a"
    first = await upload(server, source, pinned=True)
    assert (first.name, first.generation, first.pinned) == ("up", 1, True)
    with ExportWriter(tmp_path / "out") as writer:
        async for message in server.adapters.ExportAdapter(pb.ExportAdapterRequest(name="up")):
            writer.write(message)
        assert writer.finish() == first
    for name in (CONFIG, TENSORS):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    again = await upload(server, source)
    assert again == first
    taken = await failure_of(upload(server, tmp_path / "root" / "b"))
    assert taken.code is Code.ALREADY_EXISTS
    late = await failure_of(
        upload(server, tmp_path / "root" / "b", replace=True, expected_generation=2)
    )
    assert late.code is Code.FAILED_PRECONDITION
    vain = await failure_of(upload(server, tmp_path / "root" / "b", expected_generation=1))
    assert vain.code is Code.INVALID_ARGUMENT
    second = await upload(server, tmp_path / "root" / "b", replace=True, expected_generation=1)
    assert (second.uuid, second.generation, second.pinned) == (first.uuid, 2, True)
    missing = await failure_of(upload(server, source, "nobody", replace=True))
    assert missing.code is Code.NOT_FOUND
    await until(lambda: len(leftovers(tmp_path)) == 1)


async def test_export_names_the_missing_adapter(server: Harness, tmp_path: Path) -> None:
    export = server.adapters.ExportAdapter
    await server.adapters.LoadAdapter(pb.LoadAdapterRequest(name="a", path="a"))
    unknown = await failure_of(export(pb.ExportAdapterRequest(name="x")))
    older = await failure_of(export(pb.ExportAdapterRequest(name="a", generation=2)))
    assert (unknown.code, older.code) == (Code.NOT_FOUND, Code.NOT_FOUND)
    path = tmp_path / "root" / "a" / TENSORS
    path.write_bytes((tmp_path / "root" / "b" / TENSORS).read_bytes())
    changed = await failure_of(export(pb.ExportAdapterRequest(name="a")))
    assert (changed.code, changed.reason) == (Code.FAILED_PRECONDITION, "ADAPTER_CHANGED")
    path.unlink()
    gone = await failure_of(export(pb.ExportAdapterRequest(name="a")))
    assert (gone.code, gone.reason) == (Code.FAILED_PRECONDITION, "ADAPTER_CHANGED")
    assert gone.metadata == {"adapter": "a", "path": "a"}


async def test_every_error_of_a_header_is_listed(server: Harness) -> None:
    files = [
        pb.FileInfo(path="../x", size_bytes=1),
        pb.FileInfo(path=CONFIG, size_bytes=(1 << 20) + 1, sha256="A" * 64),
        pb.FileInfo(path=CONFIG),
    ]
    failure = await failure_of(server.adapters.UploadAdapter(iter([header(files, "up-")])))
    assert failure.code is Code.INVALID_ARGUMENT
    assert set(failure.violations) == {
        *("header.name", "header.files", "header.files[0].path", "header.files[1].size_bytes"),
        *("header.files[1].sha256", "header.files[2].path", "header.files[2].size_bytes"),
    }
    # The error stays short for any number of announced files.
    many = [pb.FileInfo(path=f"{n}") for n in range(10_000)]
    failure = await failure_of(server.adapters.UploadAdapter(iter([header(many)])))
    assert len(failure.violations) < 20


async def test_an_adapter_cannot_have_a_name_of_the_base(server: Harness) -> None:
    server.registry.change_base(replace(server.registry.base, name="tiny"))
    for name in ("base", "tiny"):
        failure = await failure_of(
            server.adapters.LoadAdapter(pb.LoadAdapterRequest(name=name, path="a"))
        )
        assert failure.reasons == {"name": "NAME_OF_BASE"}


async def test_messages_out_of_order_are_refused(server: Harness, tmp_path: Path) -> None:
    files = announced(tmp_path / "root" / "a")
    tensors = (tmp_path / "root" / "a" / TENSORS).read_bytes()
    config = (tmp_path / "root" / "a" / CONFIG).read_bytes()
    for messages, why in (
        ([], "header"),
        ([chunk(CONFIG, b"x")], "header"),
        ([pb.UploadAdapterRequest()], "header"),
        ([header(files), header(files)], "chunk"),
        ([header(files), pb.UploadAdapterRequest()], "chunk"),
        ([header(files), chunk("x", b"x")], "chunk"),
        ([header(files), chunk(CONFIG, b"x" * ((1 << 20) + 1))], "chunk.data"),
        ([header(files), chunk(CONFIG, config), chunk(TENSORS, tensors[:-1])], "chunk"),
        ([header(files), chunk(CONFIG, config), chunk(TENSORS, tensors + b"x")], "chunk"),
        ([header(files), chunk(CONFIG, config), chunk(TENSORS, b"x" + tensors[1:])], "chunk"),
    ):
        failure = await failure_of(server.adapters.UploadAdapter(iter(messages)))
        assert failure.code is Code.INVALID_ARGUMENT, messages
        assert list(failure.violations) == [why]
    await until(lambda: leftovers(tmp_path) == [])


async def test_a_rejected_upload_leaves_no_files(server: Harness, tmp_path: Path) -> None:
    broken = announced(tmp_path / "root" / "a", size_bytes=3, sha256="")
    config = (tmp_path / "root" / "a" / CONFIG).read_bytes()
    messages = [header(broken), chunk(CONFIG, config), chunk(TENSORS, b"abc")]
    failure = await failure_of(server.adapters.UploadAdapter(iter(messages)))
    assert (failure.code, failure.reason) == (Code.INVALID_ARGUMENT, "ADAPTER_CHECKPOINT")
    large = announced(tmp_path / "root" / "a", size_bytes=1 << 20, sha256="")
    failure = await failure_of(server.adapters.UploadAdapter(iter([header(large)])))
    assert (failure.code, failure.reason) == (Code.RESOURCE_EXHAUSTED, "BUDGET_EXCEEDED")
    await until(lambda: leftovers(tmp_path) == [])


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_an_empty_file_is_named_before_anything_is_sent(name: str, tmp_path: Path) -> None:
    for file in (CONFIG, TENSORS):
        (tmp_path / file).write_bytes(b"" if file == name else b"{}")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
        upload_messages("a", tmp_path, pinned=False, replace=False)


async def test_a_client_that_disconnects_leaves_no_file(server: Harness, tmp_path: Path) -> None:
    started = asyncio.Event()

    async def messages() -> AsyncIterator[pb.UploadAdapterRequest]:
        yield header(announced(tmp_path / "root" / "a"))
        yield chunk(CONFIG, b"{")
        started.set()
        await asyncio.Event().wait()

    call = server.adapters.UploadAdapter(messages())
    await started.wait()
    await until(lambda: len(leftovers(tmp_path)) == 1)
    call.cancel()
    await until(lambda: leftovers(tmp_path) == [])
    assert (await upload(server, tmp_path / "root" / "a")).generation == 1


@pytest.mark.parametrize("sends", [False, True])
async def test_an_upload_that_makes_no_progress_is_ended(
    server: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sends: bool
) -> None:
    """Empty chunks do not count: with them, the timeout for silence would never be reached."""
    if sends:
        monkeypatch.setattr(uploads, "BASE_SECONDS", 0.3)
        monkeypatch.setattr(uploads, "LEAST_BYTES_PER_SECOND", 1 << 40)
    else:
        monkeypatch.setattr(uploads, "IDLE_SECONDS", 0.05)

    async def messages() -> AsyncIterator[pb.UploadAdapterRequest]:
        yield header(announced(tmp_path / "root" / "a"))
        while True:
            await asyncio.sleep(0.01 if sends else 1000)
            yield chunk(CONFIG, b"")

    failure = await failure_of(server.adapters.UploadAdapter(messages()))
    assert failure.code is Code.DEADLINE_EXCEEDED
    await until(lambda: leftovers(tmp_path) == [])


async def test_concurrent_uploads_are_limited(
    server: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin, "MAX_UPLOADS", 1)
    started, finish = asyncio.Event(), asyncio.Event()

    async def messages() -> AsyncIterator[pb.UploadAdapterRequest]:
        whole = list(upload_messages("slow", tmp_path / "root" / "a", pinned=False, replace=False))
        yield whole[0]
        started.set()
        await finish.wait()
        for message in whole[1:]:
            yield message

    call = server.adapters.UploadAdapter(messages())
    await started.wait()
    await until(lambda: len(leftovers(tmp_path)) == 1)
    failure = await failure_of(upload(server, tmp_path / "root" / "b"))
    assert failure.code is Code.RESOURCE_EXHAUSTED
    assert failure.retry_seconds is not None
    finish.set()
    assert (await call).name == "slow"
    assert (await upload(server, tmp_path / "root" / "b")).name == "up"


async def test_one_token_cannot_take_every_upload_slot(made: Registries, tmp_path: Path) -> None:
    registry = made(99, state=StateDir(tmp_path / "state", 1 << 20))
    finish = asyncio.Event()

    def upload_as(token: str, name: str, *, waits: bool) -> Any:
        async def messages() -> AsyncIterator[pb.UploadAdapterRequest]:
            folder = tmp_path / "root" / "a"
            for message in upload_messages(name, folder, pinned=False, replace=False):
                yield message
                if waits:
                    await finish.wait()

        return server.adapters.UploadAdapter(messages(), metadata=bearer(token))

    async with harness(
        registry=registry, tokens=TOKENS, shares=Shares(separates_tokens=True)
    ) as server:
        count = admin.MAX_UPLOADS * 3 // 4
        calls = [upload_as("alice", f"a{number}", waits=True) for number in range(count)]
        await until(lambda: len(leftovers(tmp_path)) == count)
        failure = await failure_of(upload_as("alice", "more", waits=False))
        assert failure.code is Code.RESOURCE_EXHAUSTED
        assert failure.retry_seconds is not None
        assert (await upload_as("bob", "b", waits=False)).name == "b"
        finish.set()
        assert {(await call).name for call in calls} == {f"a{number}" for number in range(count)}
        assert (await upload_as("alice", "more", waits=False)).name == "more"


@pytest.mark.parametrize("path", ["hub:acme/a", "oci://host/a", "a"])
async def test_slow_loads_of_one_token_do_not_delay_another_token(
    made: Registries, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    registry, go, begun = made(99), threading.Event(), list[str]()
    load = registry.load

    def slow(name: str, path: str, **options: Any) -> Any:
        begun.append(name)
        if name != "fast":
            go.wait()
        return load(name, "a", **options)

    monkeypatch.setattr(registry, "load", slow)
    async with harness(
        registry=registry, tokens=TOKENS, shares=Shares(separates_tokens=True)
    ) as server:

        def load_as(token: str, name: str) -> Any:
            asked = pb.LoadAdapterRequest(name=name, path=path)
            return server.adapters.LoadAdapter(asked, metadata=bearer(token))

        calls = {name: load_as("alice", name) for name in (f"a{number}" for number in range(40))}
        most = (admin._SLOW_CALLS if path == "a" else admin._DOWNLOADS) * 3 // 4
        await until(lambda: len(begun) == most)
        # A client that is gone does not free the thread that works for it.
        calls.pop(begun[0]).cancel()
        for _ in range(2):
            assert (await asyncio.wait_for(load_as("bob", "fast"), 60)).name == "fast"
        assert len(begun) == most + 2
        go.set()
        await asyncio.gather(*calls.values())


async def test_uploads_need_a_state_directory(made: Registries, tmp_path: Path) -> None:
    async with harness(registry=made()) as server:
        failure = await failure_of(upload(server, tmp_path / "root" / "a"))
    assert (failure.code, failure.reason) == (Code.FAILED_PRECONDITION, "STATE_DIR_REQUIRED")


async def test_exports_are_limited_because_they_hold_open_files(
    made: Registries, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish, chunks = threading.Event(), AdapterExport.chunks

    def slow(self: AdapterExport) -> Any:
        finish.wait(60)
        yield from chunks(self)

    monkeypatch.setattr(AdapterExport, "chunks", slow)
    monkeypatch.setattr(admin, "MAX_EXPORTS", 4)

    def export_as(token: str) -> Any:
        asked = pb.ExportAdapterRequest(name="a")
        return server.adapters.ExportAdapter(asked, metadata=bearer(token))

    async with harness(
        registry=made(2.5), tokens=TOKENS, shares=Shares(separates_tokens=True)
    ) as server:
        server.registry.load("a", "a")
        calls = [aiter(export_as(token)) for token in ("alice", "alice", "alice", "bob")]
        for call in calls:
            assert (await anext(call)).WhichOneof("part") == "header"
        for token in ("alice", "bob"):
            failure = await failure_of(anext(aiter(export_as(token))))
            assert failure.code is Code.RESOURCE_EXHAUSTED
            assert failure.retry_seconds is not None
        finish.set()
        for call in calls:
            assert {part.WhichOneof("part") async for part in call} == {"chunk"}
        assert (await export_as("alice").read()).WhichOneof("part") == "header"


async def test_an_abandoned_export_closes_its_files(
    server: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = asyncio.Event()
    loop = asyncio.get_running_loop()
    close = AdapterExport.close

    def note(self: AdapterExport) -> None:
        close(self)
        loop.call_soon_threadsafe(closed.set)

    monkeypatch.setattr(AdapterExport, "close", note)
    monkeypatch.setattr("turret.server.adapters.registry.CHUNK_BYTES", 16)
    await server.adapters.LoadAdapter(pb.LoadAdapterRequest(name="a", path="a"))
    call = server.adapters.ExportAdapter(pb.ExportAdapterRequest(name="a"))
    assert (await call.read()).WhichOneof("part") == "header"
    call.cancel()
    await asyncio.wait_for(closed.wait(), 10)
