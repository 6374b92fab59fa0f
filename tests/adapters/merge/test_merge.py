"""The merged base: its answers, adapters on it, and failed merges."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.methods import load_adapter, make_config, quiet, save_adapter
from builders.mixes.merges import (
    ARCHITECTURE,
    NAMES,
    PROMPT,
    merge,
    save_adapters,
    score,
    start,
    unmerge,
)
from builders.registries import until
from method_oracle import check_greedy, check_score, twin
from safetensors.torch import load_file, save_file
from said import says
from servers.engine_harness import Answer, EngineHarness, make_request

from turret.server.adapters.adapter import AdapterRef
from turret.server.adapters.merger import MergeState
from turret.server.basics.work import Cancellation
from turret.server.errors import (
    AdapterMergedError,
    AdapterNotFoundError,
    InvalidRequestError,
    MergeActiveError,
    MergeUnderWayError,
    NotMergedError,
    UnavailableError,
)
from turret.server.models.describe import BaseEdit


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
async def server(root: Path) -> AsyncIterator[EngineHarness]:
    async with start(root, allow_merged_twice=True) as started:
        yield started


def merged_model(adapter: Path, base: Any) -> Any:
    """PEFT's merged model, rounded as the server stores it."""
    with quiet():
        model: Any = load_adapter(base, adapter).merge_and_unload()  # type: ignore[operator]
    own = dict(base.named_modules())
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            changed = not torch.equal(module.weight, own[name].weight)
            if changed:
                module.weight.data = module.weight.data.bfloat16().float()
    return model


# Answers


@pytest.mark.parametrize("name", ["lora", "dora", "ia3"])
async def test_the_merged_base_answers_as_the_adapter(
    server: EngineHarness, root: Path, name: str
) -> None:
    """Without an adapter, the merged base answers exactly as PEFT's merged model.

    With an adapter, it answers as PEFT does with the adapter on that model.
    """
    oracle = merged_model(root / name, twin(ARCHITECTURE).model)
    with_adapter = await score(server, name)
    base = await score(server)
    await merge(server, name)
    alone = await score(server)
    check_score(alone, oracle, PROMPT, name)
    check_greedy(await server.run(make_request(PROMPT)), oracle, PROMPT, name)
    # Two digits of the adapter's effect survive the rounding to bf16.
    effect = _distance(with_adapter, base)
    assert _distance(alone, with_adapter) < 0.05 * effect
    for second in ("lora", "dora", "other"):
        expected = load_adapter(oracle, root / second)
        check_score(await score(server, second), expected, PROMPT, f"{second} on {name}")


def _distance(one: Answer, other: Answer) -> float:
    pairs = zip(one.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True)
    return sum(abs((a or 0.0) - (b or 0.0)) for a, b in pairs)


async def test_a_soft_prompt_works_on_the_merged_base(server: EngineHarness, root: Path) -> None:
    oracle = merged_model(root / "lora", twin(ARCHITECTURE).model)
    await score(server, "prefix_tuning")
    await merge(server, "lora")
    for name in ("prefix_tuning", "prompt_tuning"):
        check_score(await score(server, name), load_adapter(oracle, root / name), PROMPT, name)


async def test_unmerge_restores_every_answer(server: EngineHarness) -> None:
    """Merges in both precisions, in sequence, including adapters that depend on the base."""
    mixes: Sequence[tuple[str, ...]] = ((), *((name,) for name in NAMES), ("lora", "dora", "ia3"))

    async def answers() -> list[Any]:
        found = await server.run_all([make_request(PROMPT, *mix) for mix in mixes])
        return [answer.bits for answer in found]

    before = await answers()
    for round_, precision in enumerate(("NF4", "BF16")):
        state = await merge(server, "lora", "dora", precision=precision)
        assert (state.base_generation, state.merge is None) == (2 + 2 * round_, False)
        changed = [one != other for one, other in zip(await answers(), before, strict=True)]
        assert all(changed)
        state = await unmerge(server)
        assert (state.base_generation, state.merge) == (3 + 2 * round_, None)
        assert await answers() == before


async def test_a_cached_prefix_is_never_used_on_another_base(server: EngineHarness) -> None:
    async def cached(*adapters: str) -> int:
        return (await server.run(make_request(PROMPT, *adapters))).finish.usage.cached_tokens

    for name in ((), ("lora",), ("prefix_tuning",)):
        await cached(*name)
        assert await cached(*name) == 32
        await merge(server, "other")
        assert await cached(*name) == 0
        assert await cached(*name) == 32
        await unmerge(server)
        assert await cached(*name) == 0


async def test_a_weight_of_zero_changes_nothing(server: EngineHarness) -> None:
    before = await score(server)
    mix = [AdapterRef(name="lora", weight=0.0)]
    state = await asyncio.to_thread(server.merger.merge, mix, "NF4", Cancellation())
    assert state.merge is not None
    assert (state.merge.report.modules, state.merge.report.update_error) == ((), 0.0)
    assert (await score(server)).bits == before.bits


# Adapters on the merged base


async def test_no_request_applies_a_merged_adapter_twice(root: Path) -> None:
    async with start(root) as server:
        plain = (await score(server, "lora", "other")).bits
        mix = [AdapterRef(name="lora"), AdapterRef(name="dora", weight=0.0)]
        await asyncio.to_thread(server.merger.merge, mix, "BF16", Cancellation())
        for names in (("lora",), ("other", "lora")):
            with pytest.raises(AdapterMergedError) as caught:
                await score(server, *names)
            assert says("MERGED_TWICE", adapter="lora")(caught.value)
        # Members of weight 0 change nothing, neither in the merge nor in the request.
        await score(server, "dora")
        await server.run(make_request(PROMPT, AdapterRef(name="lora", weight=0.0), "other"))
        await asyncio.to_thread(server.registry.replace, "lora", "other")
        with pytest.raises(AdapterMergedError):
            await score(server, "lora")
        # The same weights are rejected under another name; a new registration of this name with
        # other weights is accepted.
        await asyncio.to_thread(server.registry.load, "again", "lora")
        with pytest.raises(AdapterMergedError):
            await score(server, "again")
        await asyncio.to_thread(server.registry.unload, "lora")
        await asyncio.to_thread(server.registry.load, "lora", "ia3")
        await score(server, "lora")
        await asyncio.to_thread(server.registry.replace, "lora", "lora")
        with pytest.raises(AdapterMergedError):
            await score(server, "lora")
        await unmerge(server)
        assert (await score(server, "lora", "other")).bits == plain


async def test_only_what_depends_on_the_base_is_read_again(server: EngineHarness) -> None:
    for name in NAMES:
        await score(server, name)
    server.registry.pin("dora")
    pinned_before = server.registry._table.find("dora").current.operators
    await merge(server, "other")
    residency = {name: server.registry.get(name).residency for name in NAMES}
    # IA3's biases are differences from the base's biases, which Qwen2 has.
    assert residency["ia3"] == "disk"
    kept = set(NAMES) - {"ia3", "dora"}
    assert "disk" not in {residency[name] for name in kept}
    answer = await score(server, "ia3")
    assert answer.finish.adapters_used[0].cold_start
    await score(server, "dora")
    record = server.registry.get("dora")
    assert (record.pinned, record.residency) == (True, "device")
    assert server.registry._table.find("dora").current.operators is not pinned_before


# Failures


async def test_a_failure_halfway_leaves_the_base_unchanged(
    server: EngineHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [await score(server, *mix) for mix in ((), ("dora",))]
    put = BaseEdit.put_weight
    calls: list[str] = []

    def fail(self: BaseEdit, path: str, weight: torch.Tensor) -> torch.Tensor:
        calls.append(path)
        if len(calls) == 9:
            raise MemoryError
        return put(self, path, weight)

    monkeypatch.setattr(BaseEdit, "put_weight", fail)
    with pytest.raises(MemoryError):
        await merge(server, "lora")
    monkeypatch.undo()
    after = [await score(server, *mix) for mix in ((), ("dora",))]
    assert [a.bits for a in after] == [b.bits for b in before]
    assert server.merger.state == MergeState(1)
    assert server.registry.get("lora").in_flight == 0
    await merge(server, "lora")


async def test_a_cancelled_merge_stops_at_the_next_module(
    server: EngineHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancellation = Cancellation()
    put = BaseEdit.put_weight
    calls: list[str] = []

    def cancel(self: BaseEdit, path: str, weight: torch.Tensor) -> torch.Tensor:
        calls.append(path)
        if len(calls) == 3:
            cancellation.set(UnavailableError("enough"))
        return put(self, path, weight)

    monkeypatch.setattr(BaseEdit, "put_weight", cancel)
    with pytest.raises(UnavailableError, match="enough"):
        await merge(server, "lora", cancellation=cancellation)
    assert len(calls) == 3
    assert server.merger.state == MergeState(1)


async def test_an_overflow_is_reported_with_its_module(server: EngineHarness, root: Path) -> None:
    huge = make_config("lora", target_modules=["o_proj"])
    save_adapter(twin(ARCHITECTURE).model, huge, root / "huge", seed=1)
    file = root / "huge" / "adapter_model.safetensors"
    save_file({name: tensor * 1e19 for name, tensor in load_file(file).items()}, file)
    server.registry.load("huge", "huge")
    mix = [AdapterRef(name="huge", weight=100.0)]
    first = says("MERGE_OVERFLOWS", module="model.layers.0.self_attn.o_proj")
    with pytest.raises(InvalidRequestError, check=first):
        await asyncio.to_thread(server.merger.merge, mix, "BF16", Cancellation())
    assert server.merger.state == MergeState(1)


async def test_an_error_names_parts_that_cannot_be_merged(
    server: EngineHarness, root: Path
) -> None:
    head = make_config("lora", target_modules=["q_proj", "lm_head"])
    tokens = make_config("lora", trainable_token_indices=[3, 5])
    alora = make_config("alora")
    for name, config in (("head", head), ("tokens", tokens), ("alora", alora)):
        save_adapter(twin(ARCHITECTURE).model, config, root / name)
        server.registry.load(name, name)
    with pytest.raises(InvalidRequestError) as caught:
        await merge(server, "lora", "prefix_tuning", "head", "prompt_tuning", "tokens", "alora")
    texts = [text for _, text in caught.value.violations]
    assert {text.reason for text in texts} == {"NOT_MERGEABLE"}
    assert [(text.params["adapter"], text.params["parts"]) for text in texts] == [
        ("prefix_tuning", "soft prompt"),
        ("head", "head"),
        ("prompt_tuning", "soft prompt"),
        ("tokens", "tokens"),
        ("alora", "invocation"),
    ]
    with pytest.raises(AdapterNotFoundError):
        await merge(server, "lora", "unknown")
    with pytest.raises(InvalidRequestError):
        await merge(server)
    assert server.registry.get("lora").in_flight == 0


async def test_only_one_change_runs_at_a_time(
    server: EngineHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NotMergedError):
        await unmerge(server)
    may_go_on, put = threading.Event(), BaseEdit.put_weight

    def slow(self: BaseEdit, path: str, weight: torch.Tensor) -> torch.Tensor:
        assert may_go_on.wait(20)
        return put(self, path, weight)

    monkeypatch.setattr(BaseEdit, "put_weight", slow)
    merging = asyncio.ensure_future(merge(server, "lora"))
    await asyncio.to_thread(until, lambda: server.registry.get("lora").in_flight == 1)
    for call in (merge(server, "other"), unmerge(server)):
        with pytest.raises(MergeUnderWayError):
            await call
    assert server.metrics.registry.get_sample_value("turret_merge_active") == 0
    may_go_on.set()
    await merging
    assert server.metrics.registry.get_sample_value("turret_merge_active") == 1
    with pytest.raises(MergeActiveError):
        await merge(server, "other")
    await unmerge(server)
    assert server.metrics.registry.get_sample_value("turret_merge_active") == 0
