"""Decode steps with adapters that change more than projections, on the GPU path, interpreted.

torch computes embeddings and heads before and after captured launches. A step in which rows attend
to constants is not captured.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from builders.methods import load_adapter, make_config, save_adapter
from gpu_path import FakeCapture
from method_oracle import check_greedy, prompt_of, serve, twin
from servers.engine_harness import EngineHarness, make_request

from turret.server.adapters.adapter import AdapterRef
from turret.server.adapters.device import Resident
from turret.server.adapters.device.gpu_store import GpuStore
from turret.server.engine.scheduling.request import Request
from turret.server.engine.step import gpu_executor as executor

pytestmark = [
    pytest.mark.usefixtures("coarse_tiles"),
    # Rows that only pad a step compute on uninitialised memory, which may cause warnings.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter needs CPU tensors"),
]

Q = {"target_modules": ["q_proj"]}
ALIKE = {"trainable_token_indices": {"lm_head": [3, 70, 9], "embed_tokens": [*range(40, 140)]}}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "tokens": ("lora", {**Q, **ALIKE}),
    "saved": ("lora", {**Q, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "both": ("dora", {"target_modules": ["v_proj", "embed_tokens", "lm_head"], "r": 20}),
    "norm": ("ln_tuning", {"target_modules": ["norm"]}),
    "logits": ("ia3", {"target_modules": ["lm_head"], "feedforward_modules": []}),
    "adaption": ("adaption_prompt", {"adapter_len": 19, "adapter_layers": 1}),
    "loha": ("loha", {"target_modules": ["q_proj", "lm_head"]}),
}
MIX = [("both", 0.5), ("tokens", -0.75), ("norm", 1.0), ("loha", -1.0)]
# The prompt's step, then one uncaptured step, one captured step, and one replayed step.
NUM_TOKENS = 4
# Device memory for one adapter and a little more.
LITTLE = 853_000


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, (method, keys)) in enumerate(ADAPTERS.items()):
        save_adapter(twin("llama").model, make_config(method, **keys), root / name, seed=seed)
    return root


@contextlib.asynccontextmanager
async def serving(
    root: Path, capture: FakeCapture | None, *adapters: str, **more: Any
) -> AsyncIterator[EngineHarness]:
    with patch.object(executor, "capture_for", lambda device: capture):
        async with serve(
            "llama",
            root,
            adapters=adapters,
            gpu=True,
            kv_cache_bytes=4 << 20,
            max_num_seqs=8,
            **more,
        ) as harness:
            yield harness


def asked(*mix: tuple[str, float], seed: int = 0) -> Request:
    refs = [AdapterRef(name=name, weight=weight) for name, weight in mix]
    return make_request(prompt_of(5, seed), *refs, max_tokens=NUM_TOKENS)


async def test_captured_and_uncaptured_steps_have_the_same_bits(root: Path) -> None:
    names = [name for name in ADAPTERS if name != "adaption"]
    requests = [asked((name, 1.0), seed=number) for number, name in enumerate(names)]
    requests += [asked(*MIX, seed=6), asked(seed=7)]
    assert len(requests) == 8, "all of them in one step"
    capture = FakeCapture()
    async with serving(root, capture, *names) as harness:
        captured = await harness.run_all(requests)
        assert capture.num_captures >= 1
        assert capture.num_replays >= 1
        before = capture.num_captures
        again = await harness.run_all(requests[::-1])
        assert capture.num_captures == before, "which rows have which adapters is in the tables"
        # Run the mix, and a request with its own vocabulary rows, alone.
        alone = {number: await harness.run(requests[number]) for number in (0, 6)}
    async with serving(root, None, *names) as harness:
        plain = await harness.run_all(requests)
    assert [answer.bits for answer in alone.values()] == [captured[n].bits for n in alone]
    for request, *answers in zip(requests, captured, again[::-1], plain, strict=True):
        mix = [(ref.name, ref.weight) for ref in request.adapters]
        assert len({answer.bits for answer in answers}) == 1, mix
        if len(mix) == 1:
            model = load_adapter(twin("llama").model, root / mix[0][0])
            check_greedy(answers[0], model, list(request.prompt_token_ids), mix[0][0])
    assert len({answer.token_ids for answer in captured}) == len(requests)


async def test_operators_without_a_kernel_run_beside_the_others(root: Path) -> None:
    capture = FakeCapture()
    requests = [asked(("adaption", 1.0)), asked(("adaption", 0.5), ("both", 1.0)), asked()]
    async with serving(root, capture, "adaption", "both") as harness:
        together = await harness.run_all(requests)
        assert capture.num_captures == 0
        alone = [await harness.run(request) for request in requests]
        assert capture.num_captures == 1, "of the row without it"
    assert [answer.bits for answer in together] == [answer.bits for answer in alone]
    model = load_adapter(twin("llama").model, root / "adaption")
    check_greedy(together[0], model, list(requests[0].prompt_token_ids), "adaption")


async def test_captured_steps_survive_changes_of_adapters(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters are evicted, unloaded, and replaced by others in their place or under their name."""
    for name in ("tokens", "both"):
        shutil.copytree(root / name, tmp_path / name)
    requests = [asked((name, 1.0), seed=2) for name in ("tokens", "both")]
    async with serving(root, None, "tokens", "both", "saved") as harness:
        expected = [(await harness.run(request)).bits for request in requests]
        other = (await harness.run(asked(("saved", 1.0), seed=2))).bits
    entered: list[str] = []
    insert, capture = GpuStore._insert, FakeCapture()

    def noted(store: GpuStore, adapter: Resident) -> None:
        entered.append(adapter.key)
        insert(store, adapter)

    room = {"adapter_device_bytes": LITTLE}
    async with serving(tmp_path, capture, "tokens", "both", **room) as harness:
        monkeypatch.setattr(GpuStore, "_insert", noted)
        for _ in range(2):
            assert [(await harness.run(request)).bits for request in requests] == expected
        before = capture.num_captures
        assert before >= 1
        assert len(entered) == 4, "each leaves for the other"
        harness.registry.unload("tokens", "DRAIN", 0)
        shutil.rmtree(tmp_path / "tokens")
        shutil.copytree(root / "saved", tmp_path / "tokens")
        harness.registry.load("tokens", "tokens")
        assert (await harness.run(requests[0])).bits == other
        assert (await harness.run(requests[1])).bits == expected[1]
        assert capture.num_captures == before, "the same graphs serve those that come"
