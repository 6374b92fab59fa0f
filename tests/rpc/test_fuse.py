"""Fusions and merges over gRPC, and a fused adapter that serves and exports like any other."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from builders import registries
from builders.methods import load_adapter, make_config, save_adapter
from builders.mixes.fuse import Fusions, Turnstile, cancellations
from builders.registries import WAIT_SECONDS
from method_oracle import check_close, oracle_logprobs, prompt_of, twin
from servers.command import parse_and_run
from servers.rpc_harness import Harness, failure_of, harness
from servers.server_under_test import start_server

from turret.clients.client import TurretClient
from turret.server.adapters.adapter import AdapterRef
from turret.server.errors import InvalidRequestError, MergeActiveError
from turret.v1 import adapters_pb2 as pb

Code = grpc.StatusCode


@pytest.fixture
def fusions(tmp_path: Path) -> Fusions:
    made = Fusions(tmp_path)
    made.add("a", seed=1)
    made.add("b", "dora", seed=2)
    return made


@pytest.fixture
async def server(fusions: Fusions) -> AsyncIterator[Harness]:
    async with harness(registry=fusions.registry, fuser=fusions.fuser) as running:
        yield running
    fusions.close()


def fuse(name: str = "both", members: str = "ab", **fields: Any) -> pb.FuseAdaptersRequest:
    weights = [pb.AdapterWeight(name=member, weight=0.5) for member in members]
    return pb.FuseAdaptersRequest(name=name, adapters=weights, **fields)


async def test_the_reply_reports_adapter_and_errors(server: Harness, fusions: Fusions) -> None:
    reply = await server.adapters.FuseAdapters(fuse(combination="svd", rank=3))
    got = await server.adapters.GetAdapter(pb.GetAdapterRequest(name="both"))
    assert reply.adapter == got
    assert (got.method, list(got.ranks), got.generation) == ("lora", [3], 1)
    result = fusions.fuse({"a": 0.5, "b": 0.5}, how="svd", rank=3)
    assert reply.relative_error == result.relative_error > 0.1
    assert [(m.module, m.relative_error, m.rank) for m in reply.modules] == [
        (m.module, m.relative_error, m.rank) for m in result.modules
    ]


@pytest.mark.parametrize(
    ("request_", "paths"),
    [
        (pb.FuseAdaptersRequest(), {"name", "adapters"}),
        (
            pb.FuseAdaptersRequest(
                name="A-",
                adapters=[
                    pb.AdapterWeight(name="a", weight=float("nan")),
                    pb.AdapterWeight(name="a", weight=101.0),
                    pb.AdapterWeight(name="/"),
                ],
                combination="mean",
            ),
            {
                *("name", "adapters[0].weight", "adapters[1].name", "adapters[1].weight"),
                *("adapters[2].name", "combination"),
            },
        ),
        (fuse(rank=0, energy=2.0, combination="svd"), {"rank", "energy"}),
        (fuse(density=0.0, majority_sign_method="x", combination="ties"),
         {"density", "majority_sign_method"}),
        (fuse(density=0.5, seed=1, combination="exact"), {"density", "seed"}),
        (fuse("a", combination="svd"), {"name"}),
        (fuse(combination="exact"), {"adapters[1].name"}),
        (fuse(), {"adapters[1].name"}),
    ],
)  # fmt: skip
async def test_every_offending_field_is_listed(
    server: Harness, request_: pb.FuseAdaptersRequest, paths: set[str]
) -> None:
    failure = await failure_of(server.adapters.FuseAdapters(request_))
    assert failure.code is Code.INVALID_ARGUMENT
    assert set(failure.violations) == paths


async def test_an_invalid_name_is_quoted(server: Harness) -> None:
    for name, shown in (
        ("json-", "json-"),
        ("json,pirate", "json,pirate"),
        ("A" * 500, f"{'A' * 40}..."),
    ):
        failure = await failure_of(server.adapters.FuseAdapters(fuse(name, combination="svd")))
        assert failure.reasons == {"name": "NOT_AN_ADAPTER_NAME"}
        assert failure.metadata == {"value": shown}
        member = pb.AdapterWeight(name=name)
        fused = pb.FuseAdaptersRequest(name="c", adapters=[member], combination="svd")
        failure = await failure_of(server.adapters.FuseAdapters(fused))
        assert failure.reasons == {"adapters[0].name": "NOT_AN_ADAPTER_NAME"}
    failure = await failure_of(server.adapters.FuseAdapters(fuse("", combination="svd")))
    assert failure.reasons == {"name": "REQUIRED"}


async def test_other_invalid_fusions_are_refused(server: Harness) -> None:
    for request, code, reason in (
        (fuse(members="abx"), Code.NOT_FOUND, "ADAPTER_NOT_FOUND"),
        (fuse(combination="svd", rank=65), Code.RESOURCE_EXHAUSTED, "BUDGET_EXCEEDED"),
        (fuse("b", "a"), Code.ALREADY_EXISTS, "ADAPTER_EXISTS"),
    ):
        failure = await failure_of(server.adapters.FuseAdapters(request))
        assert (failure.code, failure.reason) == (code, reason)
    stale = fuse(members="a")
    stale.adapters[0].generation = 2
    failure = await failure_of(server.adapters.FuseAdapters(stale))
    assert failure.code is Code.NOT_FOUND


@pytest.mark.parametrize("goes", ["cancel", "deadline"])
async def test_a_caller_that_disconnects_ends_its_fusion(
    server: Harness, fusions: Fusions, monkeypatch: pytest.MonkeyPatch, goes: str
) -> None:
    turnstile, cancelled = Turnstile(monkeypatch), cancellations(monkeypatch)
    timeout = 1.5 if goes == "deadline" else None
    call = server.adapters.FuseAdapters(fuse(combination="svd"), timeout=timeout)
    await asyncio.to_thread(turnstile.wait)
    busy = await failure_of(server.adapters.FuseAdapters(fuse("other", "a")))
    assert (busy.code, busy.reason) == (Code.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert busy.retry_seconds is not None
    if goes == "cancel":
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    else:
        assert (await failure_of(call)).code is Code.DEADLINE_EXCEEDED
    assert await asyncio.to_thread(cancelled.wait, WAIT_SECONDS)
    turnstile.opened.set()
    await asyncio.to_thread(registries.until, lambda: not fusions.fuser.is_busy)
    assert turnstile.passed == 3
    assert [record.name for record in fusions.registry.list()] == ["a", "b"]
    assert list((fusions.state / "files").iterdir()) == []
    assert (await server.adapters.FuseAdapters(fuse(combination="svd"))).adapter.name == "both"


def test_a_server_fuses_serves_and_exports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests ``turret serve``, the command and the client; PEFT reads the export."""
    base = twin("qwen2")
    (tmp_path / "adapters").mkdir()
    for seed, method in enumerate(("lora", "dora", "loha", "ia3")):
        save_adapter(base.model, make_config(method), tmp_path / "adapters" / method, seed=seed)
    flags = ["--model", str(base.folder), "--dtype", "float32", "--device", "cpu"]
    flags += ["--state-dir", str(tmp_path / "state")]
    cache = {"XDG_CACHE_HOME": str(base.folder.parent / "cache")}
    monkeypatch.setenv("COLUMNS", "120")
    prompt = prompt_of(33, 1)
    with (
        start_server(tmp_path, *flags, environment=cache) as running,
        TurretClient(running.address) as client,
    ):
        for method in ("lora", "dora", "loha", "ia3"):
            client.adapters.load(method, method)
        mix = [("lora", 0.5), ("dora", 0.5), ("loha", -0.5), ("ia3", 0.5)]
        parts = [f"--adapter={name}={weight}" for name, weight in mix]
        arguments = ["adapters", "fuse", "all", *parts, "--combination", "svd", "--rank", "128"]
        assert parse_and_run(*arguments, "--address", running.address) == 0
        printed = capsys.readouterr().out
        assert "lora" in printed
        assert "relative error" in printed
        fused = client.score(prompt, adapters=["all"])
        mixed = client.score(prompt, adapters=mix)
        client.adapters.export("all", tmp_path / "exported")
        assert "fusing" in running.log.read_text()
    oracle = load_adapter(base.model, tmp_path / "exported")
    rows = oracle_logprobs(oracle, prompt)
    plain = oracle_logprobs(base.model, prompt)
    assert (rows - plain).abs().max() > 0.05
    expected = [float(rows[i, token]) for i, token in enumerate(prompt[1:])]
    for scored in (fused, mixed):
        found = [token.logprob for token in scored.tokens[1:]]
        check_close([p for p in found if p is not None], expected, "the fused adapter")


Merge = pb.MergeAdaptersRequest


async def test_a_merge_reports_its_state_and_can_be_undone(server: Harness) -> None:
    nothing = await server.adapters.GetMergeState(pb.GetMergeStateRequest())
    assert nothing == pb.MergeState(base_generation=1)
    members = [pb.AdapterWeight(name="a", weight=-0.5), pb.AdapterWeight(name="b")]
    state = await server.adapters.MergeAdapters(Merge(adapters=members, precision=Merge.BF16))
    refs = (AdapterRef(name="a", weight=-0.5), AdapterRef(name="b"))
    assert server.merger.calls == [(refs, "BF16")]
    assert (state.active, state.base_generation, state.precision) == (True, 2, Merge.BF16)
    assert [(a.name, a.uuid, a.generation, a.weight) for a in state.adapters] == [
        ("a", "uuid-a", 3, -0.5),
        ("b", "uuid-b", 3, 1.0),
    ]
    assert (state.relative_error, state.update_error) == (0.125, 0.75)
    assert [(m.module, m.relative_error, m.rank) for m in state.modules] == [
        ("layers.0.q_proj", 0.25, 0),
        ("layers.1.q_proj", 0.0, 0),
    ]
    assert state.merge_time.ToNanoseconds() == 86_400_500_000_000
    assert await server.adapters.GetMergeState(pb.GetMergeStateRequest()) == state
    after = await server.adapters.UnmergeAdapters(pb.UnmergeAdaptersRequest())
    assert after == pb.MergeState(base_generation=3)
    failure = await failure_of(server.adapters.UnmergeAdapters(pb.UnmergeAdaptersRequest()))
    assert failure.code is grpc.StatusCode.FAILED_PRECONDITION
    assert failure.reason == "NOT_MERGED"


async def test_the_merge_chooses_the_precision_by_default(server: Harness) -> None:
    for precision in (Merge.PRECISION_UNSPECIFIED, Merge.AUTO, Merge.NF4):
        await server.adapters.MergeAdapters(
            Merge(adapters=[pb.AdapterWeight(name="a")], precision=precision)
        )
    assert [precision for _, precision in server.merger.calls] == [None, None, "NF4"]


async def test_every_invalid_field_is_reported(server: Harness) -> None:
    failure = await failure_of(server.adapters.MergeAdapters(Merge()))
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
    assert list(failure.violations) == ["adapters"]
    members = [pb.AdapterWeight(name="a+"), pb.AdapterWeight(name="b", weight=101)]
    request = Merge(adapters=members, precision=7)  # type: ignore[arg-type]
    failure = await failure_of(server.adapters.MergeAdapters(request))
    assert list(failure.violations) == ["adapters[0].name", "adapters[1].weight", "precision"]
    nothing = [pb.AdapterWeight(name="a", weight=0), pb.AdapterWeight(name="b", weight=0)]
    failure = await failure_of(server.adapters.MergeAdapters(Merge(adapters=nothing)))
    assert failure.reasons == {"adapters": "NO_WEIGHT"}
    assert server.merger.calls == []


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (MergeActiveError("a merge is active"), "FAILED_PRECONDITION", "MERGE_ACTIVE"),
        (InvalidRequestError("prefixes"), "INVALID_ARGUMENT", "INVALID_REQUEST"),
        (KeyError(), "INTERNAL", "INTERNAL"),
        (MemoryError(), "RESOURCE_EXHAUSTED", "OUT_OF_MEMORY"),
        (OSError(errno.ENOMEM, "no"), "RESOURCE_EXHAUSTED", "OUT_OF_MEMORY"),
        (RuntimeError("can't start new thread"), "RESOURCE_EXHAUSTED", "OUT_OF_MEMORY"),
    ],
)
async def test_a_failed_merge_reports_its_reason(
    error: Exception, code: str, reason: str, server: Harness
) -> None:
    server.merger.error = error
    request = Merge(adapters=[pb.AdapterWeight(name="a")])
    failure = await failure_of(server.adapters.MergeAdapters(request))
    assert (failure.code.name, failure.reason) == (code, reason)


@pytest.mark.parametrize("seconds", [None, 0.3])
async def test_a_caller_that_disconnects_cancels_its_merge(
    seconds: float | None, server: Harness
) -> None:
    server.merger.is_slow = True
    request = Merge(adapters=[pb.AdapterWeight(name="a")])
    call = server.adapters.MergeAdapters(request, timeout=seconds)
    merging = asyncio.ensure_future(failure_of(call))
    assert await asyncio.to_thread(server.merger.begun.wait, 5)
    if seconds is None:
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await merging
    else:
        assert (await merging).code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert await asyncio.to_thread(server.merger.withdrawn.wait, 5)
