"""The control plane in process: load, list in pages, pin, unload, and unsupported calls."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2
from servers.rpc_harness import Harness, failure_of

from turret.server.api import admin
from turret.v1 import adapters_pb2 as pb

Load = pb.LoadAdapterRequest
List = pb.ListAdaptersRequest


async def test_load_get_pin_unload(server: Harness) -> None:
    loaded = await server.adapters.LoadAdapter(Load(name="sql", path="sql", pinned=True))
    again = await server.adapters.LoadAdapter(Load(name="sql", path="sql"))
    taken = await failure_of(server.adapters.LoadAdapter(Load(name="sql", path="other")))
    got = await server.adapters.GetAdapter(pb.GetAdapterRequest(name="sql"))
    pinned = await failure_of(server.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="sql")))
    free = await server.adapters.UnpinAdapter(pb.UnpinAdapterRequest(name="sql"))
    back = await server.adapters.PinAdapter(pb.PinAdapterRequest(name="sql"))
    await server.adapters.UnpinAdapter(pb.UnpinAdapterRequest(name="sql"))
    await server.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="sql"))
    gone = await failure_of(server.adapters.GetAdapter(pb.GetAdapterRequest(name="sql")))
    assert loaded == again == got
    assert (loaded.name, loaded.method, list(loaded.ranks)) == ("sql", "lora", [4, 8])
    assert (loaded.residency, loaded.state) == (pb.Adapter.HOST, pb.Adapter.ACTIVE)
    assert loaded.last_used_time.ToNanoseconds() == 1_700_000_000_500_000_000
    assert taken.code is grpc.StatusCode.ALREADY_EXISTS
    assert pinned.code is grpc.StatusCode.FAILED_PRECONDITION
    assert (free.pinned, back.pinned) == (False, True)
    assert (gone.code, gone.metadata) == (grpc.StatusCode.NOT_FOUND, {"adapter": "sql"})


async def test_load_passes_the_task(server: Harness) -> None:
    for task in (None, 0, 2):
        name = f"task-{task}".lower()
        await server.adapters.LoadAdapter(Load(name=name, path="x", task=task))
        of_task = "x" if task is None else f"task {task} of x"
        assert server.registry.records[name].facts.digest == f"digest of {of_task}"


async def test_a_rollback_passes_both_generations(server: Harness) -> None:
    server.registry.load("a", "a")
    server.registry.replace("a", "b")
    request = pb.RollbackAdapterRequest(name="a")
    adapter = await server.adapters.RollbackAdapter(request)
    assert (adapter.generation, list(adapter.kept_generations)) == (1, [2])
    request = pb.RollbackAdapterRequest(name="a", generation=2, expected_generation=1)
    assert (await server.adapters.RollbackAdapter(request)).generation == 2
    failure = await failure_of(server.adapters.RollbackAdapter(pb.RollbackAdapterRequest()))
    assert list(failure.violations) == ["name"]


async def test_aliases_are_set_listed_and_deleted(server: Harness) -> None:
    targets = [pb.AliasTarget(name="a", generation=7, weight=0.75), pb.AliasTarget(name="b")]
    alias = await server.adapters.SetAlias(pb.SetAliasRequest(name="prod", targets=targets))
    targets[1].generation, targets[1].weight = 1, 1.0
    assert alias == pb.Alias(name="prod", targets=targets)
    listed = await server.adapters.ListAliases(pb.ListAliasesRequest())
    assert list(listed.aliases) == [alias]
    await server.adapters.DeleteAlias(pb.DeleteAliasRequest(name="prod"))
    listed = await server.adapters.ListAliases(pb.ListAliasesRequest())
    assert not listed.aliases


async def test_unload_passes_mode_and_timeout(server: Harness) -> None:
    cases: list[tuple[dict[str, Any], tuple[str, float]]] = [
        ({}, ("DRAIN", 30.0)),
        (
            {"mode": pb.UnloadAdapterRequest.DRAIN, "timeout": {"nanos": 500_000_000}},
            ("DRAIN", 0.5),
        ),
        ({"mode": pb.UnloadAdapterRequest.FORCE, "timeout": {}}, ("FORCE", 0.0)),
    ]
    for fields, expected in cases:
        server.registry.load("a", "a")
        await server.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="a", **fields))
        assert server.registry.unloads[-1] == ("a", *expected)


ODD_PARTS = ("//", "/./", "/../", "/c/../")


@pytest.mark.parametrize(
    ("rpc", "message", "paths"),
    [
        ("LoadAdapter", Load(name="../x"), {"name", "path"}),
        ("LoadAdapter", Load(name="a" * 129, path="a\0b"), {"name", "path"}),
        ("ReplaceAdapter", pb.ReplaceAdapterRequest(name="Ä"), {"name", "path"}),
        ("ExportAdapter", pb.ExportAdapterRequest(name="a/b/"), {"name"}),
        *(("LoadAdapter", Load(name=f"a{part}b", path="p"), {"name"}) for part in ODD_PARTS),
        ("GetAdapter", pb.GetAdapterRequest(name="UPPER-"), {"name"}),
        ("PinAdapter", pb.PinAdapterRequest(), {"name"}),
        ("SetAlias", pb.SetAliasRequest(), {"name", "targets"}),
        (
            "SetAlias",
            pb.SetAliasRequest(
                name="a",
                targets=[
                    pb.AliasTarget(name="b+"),
                    pb.AliasTarget(name="b", weight=0),
                    pb.AliasTarget(name="c", weight=float("nan")),
                    pb.AliasTarget(name="d", weight=100.1),
                ],
            ),
            {"targets[0].name", *(f"targets[{index}].weight" for index in (1, 2, 3))},
        ),
        ("DeleteAlias", pb.DeleteAliasRequest(), {"name"}),
        (
            "UnloadAdapter",
            pb.UnloadAdapterRequest(
                name="-",
                mode=9,  # type: ignore[arg-type]
                timeout=duration_pb2.Duration(seconds=3601),
            ),
            {"name", "mode", "timeout"},
        ),
        (
            "UnloadAdapter",
            pb.UnloadAdapterRequest(name="a", timeout=duration_pb2.Duration(nanos=-1)),
            {"timeout"},
        ),
        (
            "ListAdapters",
            List(page_size=-1, page_token="!", residency=9),  # type: ignore[arg-type]
            {"page_size", "page_token", "residency"},
        ),
    ],
)
async def test_every_offending_field_is_listed(
    rpc: str, message: Any, paths: set[str], server: Harness
) -> None:
    failure = await failure_of(getattr(server.adapters, rpc)(message))
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
    assert set(failure.violations) == paths


def _fill(server: Harness) -> list[str]:
    names = [f"a{n:02d}" for n in range(7)] + ["b-dora", "cold-c", "cold-d-dora"]
    for name in reversed(names):
        server.registry.load(name, name)
    return names


async def _pages(server: Harness, **fields: Any) -> list[list[str]]:
    pages, token = [], ""
    while True:
        page = await server.adapters.ListAdapters(List(page_token=token, **fields))
        pages.append([adapter.name for adapter in page.adapters])
        token = page.next_page_token
        if not token:
            return pages


async def test_pages_cover_every_adapter_once_in_name_order(server: Harness) -> None:
    assert await _pages(server) == [[]]
    names = _fill(server)
    assert await _pages(server) == [names]
    assert await _pages(server, page_size=4) == [names[:4], names[4:8], names[8:]]
    assert await _pages(server, page_size=5) == [names[:5], names[5:]]
    assert await _pages(server, page_size=2_000_000) == [names]
    first = await server.adapters.ListAdapters(List(page_size=3))
    assert first.total_size == 10
    # A page begins after the last name, regardless of changes in between.
    server.registry.unload("a02", "DRAIN", 0)
    server.registry.load("a025", "x")
    second = await server.adapters.ListAdapters(List(page_size=2, page_token=first.next_page_token))
    assert [a.name for a in second.adapters] == ["a025", "a03"]


async def test_a_page_ends_before_it_is_too_large(
    monkeypatch: pytest.MonkeyPatch, server: Harness
) -> None:
    names = _fill(server)
    (one,) = (await server.adapters.ListAdapters(List(page_size=1))).adapters
    monkeypatch.setattr(admin, "MAX_PAGE_BYTES", 3 * one.ByteSize() + 1)
    pages = await _pages(server)
    assert [name for page in pages for name in page] == names
    assert [len(page) for page in pages[:2]] == [3, 3]
    # An entry that exceeds the limit is alone on its page.
    monkeypatch.setattr(admin, "MAX_PAGE_BYTES", 1)
    assert await _pages(server) == [[name] for name in names]


async def test_filters_apply_across_pages(server: Harness) -> None:
    _fill(server)
    assert await _pages(server, method="dora", page_size=1) == [["b-dora"], ["cold-d-dora"]]
    assert await _pages(server, residency=pb.Adapter.DISK) == [["cold-c", "cold-d-dora"]]
    assert await _pages(server, residency=pb.Adapter.DISK, method="lora") == [["cold-c"]]
    assert await _pages(server, method="loha") == [[]]
    failure = await failure_of(server.adapters.ListAdapters(List(method="lorra")))
    assert failure.reasons == {"method": "NOT_ONE_OF"}
    assert (failure.metadata["value"], failure.metadata["closest"]) == ("lorra", "lora")
    failure = await failure_of(server.adapters.ListAdapters(List(method="qwerty")))
    assert "closest" not in failure.metadata
    token = (await server.adapters.ListAdapters(List(page_size=1, method="dora"))).next_page_token
    failure = await failure_of(server.adapters.ListAdapters(List(page_token=token)))
    assert list(failure.violations) == ["page_token"]
