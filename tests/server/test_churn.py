"""Soak test: all kinds of load on a real server, then every answer again alone.

``make soak`` runs it for ten minutes.
"""

from __future__ import annotations

import asyncio
import collections
import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from builders.methods import make_config, save_adapter
from method_oracle import twin
from servers.churn import Churn, Generation, Record
from servers.churn_requests import Answer, Bits, Mix, Shape, ask, make_shapes
from servers.server_under_test import ServerUnderTest, start_server

from turret.clients.aio import AsyncTurretClient

NAMES = [f"name-{number:02}" for number in range(12)]
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {}),
    "lora-wide": ("lora", {"r": 16}),
    "lora-qv": ("lora", {"r": 8, "target_modules": ["q_proj", "v_proj"]}),
    "rslora": ("rslora", {}),
    "dora": ("dora", {}),
    "loha": ("loha", {}),
    "lokr": ("lokr", {}),
    "ia3": ("ia3", {}),
    "adalora": ("adalora", {}),
    "vera": ("vera", {}),
    "prefix": ("prefix_tuning", {"num_virtual_tokens": 21}),
    "prompt": ("prompt_tuning", {"num_virtual_tokens": 7}),
    "p-tuning": ("p_tuning", {}),
}
# Allowed statuses. INVALID_ARGUMENT: a mix with two soft prompts. RESOURCE_EXHAUSTED: a mix that
# does not fit next to pinned adapters. UNKNOWN, INTERNAL and UNAVAILABLE are forbidden.
STATUSES = {"OK", "CLIENT_CANCELLED", "DEADLINE_EXCEEDED", "NOT_FOUND", "ABORTED"}
STATUSES |= {"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"}
ADMIN_STATUSES = {"OK", "NOT_FOUND", "ALREADY_EXISTS", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED"}
MIB = 1 << 20
KIB = 1 << 10
HOST_BYTES, DEVICE_BYTES = 420 * KIB, 300 * KIB
# Large blocks are returned to the system when they are freed, so that RSS shows the held memory.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}
MAX_GROWTH_BYTES = 16 * MIB
# For about a minute, memory grows, because oneDNN keeps the compiled products of the last
# 1,024 shapes (about half a megabyte each).
LONG_SECONDS = 240.0


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter root."""
    root = tmp_path_factory.mktemp("churn") / "adapters"
    for seed, (name, (method, keys)) in enumerate(CHECKPOINTS.items()):
        save_adapter(twin("llama").model, make_config(method, **keys), root / name, seed=seed)
    return root


def start(folder: Path, *flags: str, **variables: str) -> Any:
    environment = {"XDG_CACHE_HOME": str(folder / "cache"), **variables}
    model = str(twin("llama").folder)
    return start_server(folder, "--model", model, *flags, environment=environment)


async def settled(server: ServerUnderTest) -> dict[str, float]:
    """The memory and blocks that the server holds after all clients are gone."""
    deadline = time.monotonic() + 20.0
    while True:
        metrics = await asyncio.to_thread(server.metrics)
        found = {
            f"{name} {state}": metrics[name, frozenset({("state", state)})]
            for name, state in (
                ("turret_kv_blocks", "used"),
                ("turret_sequences", "running"),
                ("turret_sequences", "waiting"),
            )
        }
        if not any(found.values()) or time.monotonic() > deadline:
            return found
        await asyncio.sleep(0.05)


async def empty(client: AsyncTurretClient, server: ServerUnderTest) -> None:
    """Unload all adapters, and check that nothing is left."""
    async for adapter in client.adapters.list():
        assert adapter.in_flight == 0, adapter
        if adapter.pinned:
            await client.adapters.unpin(adapter.name)
        await client.adapters.unload(adapter.name, drain_seconds=0.0)
    # The engine thread processes the unloads before it serves this request.
    await client.generate([1], max_tokens=1)
    metrics = await asyncio.to_thread(server.metrics)
    held = {
        (name, labels): value
        for (name, labels), value in metrics.items()
        if name in ("turret_adapter_bytes", "turret_adapter_residency") and value
    }
    assert held == {}


async def content_names(client: AsyncTurretClient) -> dict[str, str]:
    """Digest → checkpoint."""
    names = {}
    for name in CHECKPOINTS:
        names[(await client.adapters.load("probe", name)).digest] = name
        await client.adapters.unload("probe")
    assert len(names) == len(CHECKPOINTS)
    return names


def what_answered(
    record: Record, contents: Mapping[str, str]
) -> list[tuple[Shape, Mix, Answer, str]]:
    """The shape, checkpoints with weights, answer and status of each request that was answered."""
    found = []
    for ended in record.ended:
        answer = ended.answer
        if answer.end is None:
            continue
        generations: list[Generation] = [(use.uuid, use.generation) for use in answer.used]
        unknown = [g for g in generations if g not in record.digests]
        assert not unknown, f"{ended}: a generation that no call has made"
        # The used adapters are the requested ones, in order and with the requested weights.
        assert tuple((use.name, use.weight) for use in answer.used) == ended.mix
        mix = tuple(
            (contents[record.digests[g]], use.weight)
            for g, use in zip(generations, answer.used, strict=True)
        )
        found.append((ended.shape, mix, answer, ended.status))
    return found


async def replay(folder: Path, root: Path, asked: set[tuple[Shape, Mix]]) -> dict[Any, Bits]:
    """Send each of the asked requests alone to a fresh server."""
    (folder / "adapters").symlink_to(root)
    answers: dict[Any, Bits] = {}
    with start(folder) as server:
        async with AsyncTurretClient(server.address) as client:
            # Two names in a mix may have had the same content.
            for name, copy in itertools.product(CHECKPOINTS, range(3)):
                await client.adapters.load(f"{name}.{copy}", name)
            for shape, mix in asked:
                answer = Answer()
                names = tuple((f"{name}.{i}", weight) for i, (name, weight) in enumerate(mix))
                await ask(client, shape, names, answer)
                answers[shape, mix] = answer.bits
    return answers


def check_what_was_promised(record: Record) -> None:
    """Every request ended once, with an allowed status, and the budgets held."""
    statuses = collections.Counter(ended.status for ended in record.ended)
    print(f"\n{dict(statuses)}\n{dict(record.calls)}\n{record.most_bytes}")
    assert record.unexpected == []
    assert len(record.ended) == record.num_sent
    assert set(statuses) <= STATUSES
    assert {status for _, status in record.calls} <= ADMIN_STATUSES
    assert record.most_bytes["host"] <= HOST_BYTES
    assert record.most_bytes["device"] <= DEVICE_BYTES
    # All kinds of events must have happened.
    assert statuses["OK"] > len(record.ended) / 3
    assert {verb for verb, status in record.calls if status == "OK"} >= {
        *("load", "replace", "upload", "unload", "force", "pin", "unpin", "export", "abandon")
    }


def check_export(exported: Path, original: Path) -> None:
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (exported / file).read_bytes() == (original / file).read_bytes()


@pytest.mark.slow
async def test_all_operations_run_concurrently(
    checkpoints: Path, tmp_path: Path, soak_seconds: float
) -> None:
    busy, alone, exports = (tmp_path / name for name in ("busy", "alone", "exports"))
    for folder in (busy, alone, exports):
        folder.mkdir()
    (busy / "adapters").symlink_to(checkpoints)
    flags = (
        *("--state-dir", str(tmp_path / "state"), "--max-num-batched-tokens", "96"),
        *("--kv-cache-bytes", str(2 * MIB), "--max-num-seqs", "12"),
        *("--adapter-host-bytes", str(HOST_BYTES), "--adapter-device-bytes", str(DEVICE_BYTES)),
    )
    with start(busy, *flags, **MALLOC) as server:
        process = psutil.Process(server.process.pid)
        async with AsyncTurretClient(server.address) as client:
            contents = await content_names(client)
            churn = Churn(
                client,
                server,
                names=NAMES,
                checkpoints=list(CHECKPOINTS),
                shapes=make_shapes(),
                scratch=exports,
                seed=0,
            )
            await churn.run(soak_seconds / 2)
            assert not any((await settled(server)).values())
            half_way = process.memory_info().rss
            handles = [(process.num_threads(), process.num_fds())]
            await churn.run(soak_seconds / 2)
            assert not any((await settled(server)).values())
            grown = process.memory_info().rss - half_way
            handles += [(process.num_threads(), process.num_fds())]
            # Check the stacks that would be printed if something hung.
            assert "loop.py" in await churn.stacks()
            await empty(client, server)
    for leftover in ("files", "incoming", "adapters"):
        assert list((tmp_path / "state" / leftover).iterdir()) == []
    record = churn.record
    check_what_was_promised(record)
    for digest, exported in record.exports:
        check_export(exported, checkpoints / contents[digest])
    answered = what_answered(record, contents)
    expected = await replay(alone, checkpoints, {(shape, mix) for shape, mix, _, _ in answered})
    for shape, mix, answer, status in answered:
        whole = expected[shape, mix]
        if answer.end == "DEADLINE":
            assert answer.is_beginning_of(whole), (shape, mix, answer, whole)
        else:
            assert answer.bits == whole, (shape, mix, status)
    samples = record.resident_bytes
    shown = [round(rss / MIB) for rss in samples[:: max(len(samples) // 20, 1)]]
    print(f"RSS, MiB: {shown}; threads and files: {handles}")
    print(f"{len(answered)} answers of {len(expected)} kinds equal those given alone")
    (threads, files), (threads_after, files_after) = handles
    assert files_after <= files + 4, handles
    if soak_seconds >= LONG_SECONDS:
        assert grown < MAX_GROWTH_BYTES, f"{grown / MIB:.1f} MiB more after the second half"
        assert threads_after <= threads + 2, handles
    assert len({kind for kind, _ in expected}) == len(make_shapes())
