"""MergeAdapters, UnmergeAdapters and GetMergeState over gRPC."""

from __future__ import annotations

import asyncio
import errno

import grpc
import pytest
from servers.rpc_harness import failure_of, harness

from turret.server.adapters.adapter import AdapterRef
from turret.server.errors import InvalidRequestError, MergeActiveError
from turret.v1 import adapters_pb2 as pb

Merge = pb.MergeAdaptersRequest


async def test_a_merge_reports_its_state_and_can_be_undone() -> None:
    async with harness() as server:
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


async def test_the_merge_chooses_the_precision_by_default() -> None:
    async with harness() as server:
        for precision in (Merge.PRECISION_UNSPECIFIED, Merge.AUTO, Merge.NF4):
            await server.adapters.MergeAdapters(
                Merge(adapters=[pb.AdapterWeight(name="a")], precision=precision)
            )
        assert [precision for _, precision in server.merger.calls] == [None, None, "NF4"]


async def test_every_invalid_field_is_reported() -> None:
    async with harness() as server:
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
async def test_a_failed_merge_reports_its_reason(error: Exception, code: str, reason: str) -> None:
    async with harness() as server:
        server.merger.error = error
        request = Merge(adapters=[pb.AdapterWeight(name="a")])
        failure = await failure_of(server.adapters.MergeAdapters(request))
        assert (failure.code.name, failure.reason) == (code, reason)


@pytest.mark.parametrize("seconds", [None, 0.3])
async def test_a_caller_that_disconnects_cancels_its_merge(seconds: float | None) -> None:
    async with harness() as server:
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
