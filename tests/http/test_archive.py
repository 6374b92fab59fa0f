"""Adapters over HTTP: uploads as tar archives made by Python and by tar itself, and loads."""

from __future__ import annotations

import asyncio
import io
import random
import subprocess
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from builders import registries
from builders.registries import Registries
from servers.http_harness import HttpHarness, Refused, http_harness

from turret.server.adapters import state_dir
from turret.server.adapters.state_dir import StateDir
from turret.server.http.endpoint import MAX_BODY_BYTES

PATH = "/v1/upload_lora_adapter?lora_name="
TYPE = {"content-type": "application/x-tar"}
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
MOST_BYTES = 1 << 20


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[HttpHarness]:
    made = Registries(tmp_path)
    registry = made(2.5, state=StateDir(tmp_path / "state", MOST_BYTES))
    async with http_harness(registry=registry) as running:
        yield running
    made.close()


def archive(folder: Path, format: int = tarfile.PAX_FORMAT, inside: str = "some/where") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        tar.add(folder, inside)
    return buffer.getvalue()


def of_names(*files: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


async def send(server: HttpHarness, query: str, body: Any, **headers: str) -> Any:
    return await server.client.post(PATH + query, content=body, headers=TYPE | headers)


async def in_pieces(data: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]
        await asyncio.sleep(0)


async def test_an_archive_becomes_an_adapter(server: HttpHarness, tmp_path: Path) -> None:
    folders = {name: tmp_path / "root" / name for name in "ab"}
    (folders["a"] / "README.md").write_text("skipped " * 200)
    (folders["a"] / ("long" * 40)).write_text("skipped as well")
    packing = ["tar", "c", "-C", str(folders["a"]), "."]
    packed = await asyncio.to_thread(subprocess.check_output, packing)
    digests = {}
    for name, body in (
        ("tar", packed),
        ("gnu", archive(folders["a"], tarfile.GNU_FORMAT)),
        ("pieces", in_pieces(archive(folders["a"]), 700)),
        ("gnu-long", archive(folders["a"], tarfile.GNU_FORMAT, "long/" * 40)),
        ("pax-long", archive(folders["a"], inside="long/" * 40)),
    ):
        answer = await send(server, name, body)
        assert answer.status_code == 200, answer.text
        digests[name] = server.registry.get(name).facts.digest
    assert len(set(digests.values())) == 1
    again = await send(server, "tar", archive(folders["b"]))
    assert again.status_code == 409
    again = await send(server, "tar&load_inplace=true", archive(folders["b"]))
    assert (again.status_code, server.registry.get("tar").generation) == (200, 2)
    assert (await send(server, "p&pinned=true", archive(folders["b"]))).status_code == 200
    assert server.registry.get("p").pinned


async def test_an_archive_may_be_larger_than_other_bodies(tmp_path: Path) -> None:
    made = Registries(tmp_path)
    registry = made(2.5, state=StateDir(tmp_path / "state", 64 << 20))
    (tmp_path / "root" / "a" / "README.md").write_bytes(bytes(4 * MAX_BODY_BYTES))
    body = archive(tmp_path / "root" / "a")
    async with http_harness(registry=registry) as server:
        for name, content in ("length", body), ("chunks", in_pieces(body, 1 << 16)):
            answer = await send(server, name, content)
            assert answer.status_code == 200, answer.text
    made.close()


async def test_a_disk_needs_room_only_for_the_bytes_still_to_be_written(
    server: HttpHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [(name, (tmp_path / "root" / "a" / name).read_bytes()) for name in (TENSORS, CONFIG)]
    size = sum(len(data) for _, data in files)
    state = tmp_path / "state"

    def usage(path: Path) -> Any:
        written = sum(file.stat().st_size for file in state.glob("incoming/*/*"))
        return SimpleNamespace(free=state_dir.MIN_FREE_BYTES + room - written)

    monkeypatch.setattr(state_dir.shutil, "disk_usage", usage)
    body = of_names(("optimizer.pt", bytes(2 * size)), *files)
    room = size
    assert (await send(server, "n", body)).status_code == 200
    room = size - 1
    assert Refused.of(await send(server, "m", body)).code == "storage_full"


async def test_a_rejected_archive_leaves_no_files(server: HttpHarness, tmp_path: Path) -> None:
    whole = archive(tmp_path / "root" / "a")
    config = (CONFIG, b"{}")
    for body, found in (
        (b"", "archive_unreadable"),
        (b"x" * 600, "archive_unreadable"),
        (whole[: len(whole) // 2], "archive_unreadable"),
        (whole + bytes(3 << 20), "archive_unreadable"),
        (of_names(config), {"files": "lacks"}),
        (of_names(config, ("x/" + CONFIG, b"{}")), {f"{CONFIG}.path": "duplicate"}),
        (of_names((CONFIG, b"")), {f"{CONFIG}.size_bytes": "too_small"}),
        (of_names((CONFIG, bytes(MOST_BYTES + 1))), "budget_exceeded"),
        (of_names(("other", bytes(MOST_BYTES + 1))), "budget_exceeded"),
        (of_names(*((str(n), b"") for n in range(2000))), "archive_too_long"),
        (of_names((CONFIG, b"["), (TENSORS, b"x")), {CONFIG: "not_json"}),
    ):
        refused = Refused.of(await send(server, "n", body))
        assert (refused.violations or refused.code) == found
        assert 400 <= refused.status < 500
    assert not server.registry.list()
    state = tmp_path / "state"
    gone = lambda: not [*(state / "incoming").iterdir(), *(state / "files").iterdir()]  # noqa: E731
    await asyncio.to_thread(registries.until, gone)


async def test_a_page_of_another_origin_cannot_send_an_archive(
    server: HttpHarness, tmp_path: Path
) -> None:
    """Browsers send forms and plain text to other origins without asking."""
    body = archive(tmp_path / "root" / "a")
    for kind in ("text/plain", "multipart/form-data; boundary=a", ""):
        answer = await send(server, "n", body, **{"content-type": kind})
        assert answer.status_code == 415
    for query, field in (
        ("", "lora_name"),
        ("n&load_inplace=1", "load_inplace"),
        ("n&path=x", "path"),
        ("n&load_inplace=true&pinned=true", "pinned"),
    ):
        refused = Refused.of(await send(server, query, body))
        assert field in refused.violations


async def test_broken_archives_are_refused_or_loaded(server: HttpHarness, tmp_path: Path) -> None:
    whole, draw = archive(tmp_path / "root" / "a"), random.Random(5)
    statuses = set()
    for _ in range(100):
        body = bytearray(whole)
        for _ in range(draw.randrange(1, 4)):
            # Headers are at the beginning, where most of the structure is.
            body[draw.randrange(draw.choice((512, 2048, len(body))))] = draw.randrange(256)
        answer = await send(server, "n&load_inplace=true", bytes(body))
        statuses.add(answer.status_code)
        assert answer.status_code < 500, answer.text
    assert {400, 404} & statuses


LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
ADAPTER = {"lora_name": "a", "lora_path": "b"}


async def test_a_task_is_registered(http: HttpHarness) -> None:
    assert (await http.post(LOAD, ADAPTER | {"task": 2})).status_code == 200
    assert http.registry.get("a").facts.digest == "digest of task 2 of b"
    again = ADAPTER | {"task": 3, "load_inplace": True}
    assert (await http.post(LOAD, again)).status_code == 200
    assert http.registry.get("a").facts.digest == "digest of task 3 of b"
    assert http.registry.get("a").generation == 2


async def test_a_repository_may_be_given_as_an_hf_uri(http: HttpHarness) -> None:
    assert (await http.post(LOAD, ADAPTER | {"lora_path": "hf://org/a"})).status_code == 200
    assert http.registry.get("a").facts.digest.endswith("hub:org/a")
