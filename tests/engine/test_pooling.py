"""Pooled final states, compared with transformers and PEFT, and with the same bits in any batch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.bases.tiny_models import save_tiny_model
from builders.methods import load_adapter, make_config, quiet, save_adapter
from builders.random_adapters import AdapterSpec, arch_of, write_adapter
from method_oracle import check_within_peer, oracle_of, prompt_of, serve, twin
from safetensors.torch import load_file
from servers.engine_harness import Asked, EngineHarness, make_request
from servers.gpu_serving import gpu_serving

from turret.server.engine.scheduling.request import FinishReason, Pooling, PoolingKind
from turret.server.engine.scheduling.scheduler import Scheduler

LAST, MEAN = (Pooling(kind=kind, normalize=False) for kind in PoolingKind)
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"r": 8, "lora_alpha": 12}),
    "dora": ("dora", {"r": 4}),
    "prompt": ("prompt_tuning", {"num_virtual_tokens": 5}),
    "prefix": ("prefix_tuning", {"num_virtual_tokens": 20}),
}
# Lengths around the ends of steps (48), blocks (16) and groups of the mean (64).
LENGTHS = (1, 17, 64, 65, 150)


@torch.no_grad()
def states_of(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """Hidden states after the final norm, ``[tokens, hidden]`` fp64, without soft tokens."""
    with quiet():
        answer = model(input_ids=torch.tensor([tokens]), output_hidden_states=True)
    return answer.hidden_states[-1][0, -len(tokens) :].double()


def pooled(states: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    kept = states[-1] if pooling.kind is PoolingKind.LAST else states.mean(0)
    kept = kept[: pooling.dimensions]
    return kept / kept.norm() if pooling.normalize else kept


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, (method, keys)) in enumerate(ADAPTERS.items()):
        save_adapter(twin("qwen3").model, make_config(method, **keys), folder / name, seed=seed)
    return folder


async def test_pooled_states_are_those_of_transformers_and_peft(root: Path) -> None:
    base = twin("qwen3")
    asked = [LAST, MEAN, Pooling(), Pooling(kind=PoolingKind.MEAN, dimensions=24)]
    prompts = [prompt_of(length, length) for length in LENGTHS]
    async with serve(base, root, adapters=list(ADAPTERS), max_num_batched_tokens=48) as harness:
        plain = [states_of(base.model, prompt) for prompt in prompts]
        for name in (None, *ADAPTERS):
            oracle = oracle_of(base.model, root, name)
            for prompt, untouched in zip(prompts, plain, strict=True):
                states = states_of(oracle, prompt)
                assert not name or (states - untouched).abs().max() > 0.05, name
                for pooling in asked:
                    answer = await harness.run(make_request(prompt, name, pooling=pooling))
                    assert answer.finish.reason is FinishReason.STOP
                    assert (answer.token_ids, answer.prompt_logprobs) == ((), ())
                    found = torch.tensor(answer.pooled, dtype=torch.float64)
                    expected = pooled(states, pooling)
                    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


async def test_bfloat16_is_as_exact_as_peft(tmp_path: Path) -> None:
    base = twin("llama", torch.bfloat16)
    half = copy.deepcopy(base.model).to(torch.bfloat16)
    for seed, name in enumerate(("lora", "dora")):
        method, keys = ADAPTERS[name]
        save_adapter(
            base.model, make_config(method, **keys), tmp_path / name, seed=seed, strength=0.3
        )
    prompts = [prompt_of(length, length) for length in (60, 150, 200, 97)]
    async with serve(base, tmp_path, dtype="bfloat16", adapters=("lora", "dora")) as harness:
        for name in (None, "lora", "dora"):
            exact, peer = (oracle_of(model, tmp_path, name) for model in (base.model, half))
            ours, theirs = [], []
            for prompt in prompts:
                expected, other = states_of(exact, prompt), states_of(peer, prompt)
                for pooling in (LAST, MEAN):
                    answer = await harness.run(make_request(prompt, name, pooling=pooling))
                    found = torch.tensor(answer.pooled, dtype=torch.float64)
                    ours.append(found - pooled(expected, pooling))
                    theirs.append(pooled(other, pooling) - pooled(expected, pooling))
            check_within_peer(ours, theirs, f"{name}")


SPECS = (AdapterSpec("a", 3), AdapterSpec("b", 8, is_dora=True), AdapterSpec("c", 2, ("q_proj",)))


def mixed() -> list[Any]:
    """Prompts that are pooled in both ways, alongside prompts that are continued or scored."""
    requests = []
    changes = [{"pooling": LAST}, {"pooling": MEAN}, {"max_tokens": 8}, {"score": True}]
    mixes: list[list[Asked]] = [[], ["a"], ["b"], ["c"], [("a", 0.5), ("b", -1.0)]]
    for number in range(20):
        prompt = prompt_of((3, 70, 9, 130, 40)[number // 4], number)
        requests.append(make_request(prompt, *mixes[number % 5], **changes[number % 4]))
    return requests


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.long), "bfloat16"])
async def test_a_vector_has_the_bits_that_it_has_alone(dtype: str, tmp_path: Path) -> None:
    """The bits are the same for all chunks, and with a part of a prompt in the cache."""
    model = save_tiny_model("smollm3", tmp_path / "model")
    for seed, spec in enumerate(SPECS):
        write_adapter(tmp_path / "adapters", arch_of(model), spec, seed)
    names = [spec.name for spec in SPECS]
    options: dict[str, Any] = {"dtype": dtype, "adapters": names}
    requests = mixed()
    async with EngineHarness.start(
        model, tmp_path / "adapters", max_num_batched_tokens=512, **options
    ) as harness:
        alone = [await harness.run(request) for request in requests]
    assert len({answer.bits for answer in alone}) == len(alone)
    async with EngineHarness.start(
        model, tmp_path / "adapters", max_num_batched_tokens=24, max_num_seqs=8, **options
    ) as harness:
        together = await harness.run_all(requests)
        again = await harness.run_all(requests[::-1])
    assert [answer.bits for answer in together] == [answer.bits for answer in alone]
    assert [answer.bits for answer in again[::-1]] == [answer.bits for answer in alone]
    for request, answer in zip(requests[::-1], again, strict=True):
        cached = answer.finish.usage.cached_tokens
        assert request.pooling is not MEAN or cached == 0
    pairs = zip(requests[::-1], again, strict=True)
    assert any(a.finish.usage.cached_tokens for r, a in pairs if r.pooling is LAST)


async def test_a_mean_that_is_preempted_midway_counts_no_position_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny_model("llama", tmp_path / "model")
    prompt = prompt_of(150, 1)
    async with EngineHarness.start(model, max_num_batched_tokens=512) as harness:
        expected = await harness.run(make_request(prompt, pooling=MEAN))
    begun: list[Any] = []

    def interrupted(self: Scheduler, now: float) -> int:
        late = [s for s in self.running if s.num_computed >= 70 and s not in begun]
        for sequence in late:
            begun.append(sequence)
            self._preempt(sequence, now)
        return len(late)

    monkeypatch.setattr(Scheduler, "_make_room", interrupted)
    async with EngineHarness.start(model, max_num_batched_tokens=24, max_num_seqs=8) as harness:
        found = await harness.run(make_request(prompt, pooling=MEAN))
    assert len(begun) == 1
    assert begun[0].num_preemptions == 1
    assert found.pooled == expected.pooled


@pytest.mark.parametrize(
    "targets", [["q_proj", "down_proj"], r"layers\.[01]\.(self_attn\.q|mlp\.up)_proj", "all-linear"]
)
async def test_adapters_for_the_headless_model_match_peft(targets: Any, tmp_path: Path) -> None:
    """Sentence embedders adapt modules of ``AutoModel``, with names without ``model.``."""
    base = twin("qwen3")
    config = make_config("lora", r=4, target_modules=targets, task_type="FEATURE_EXTRACTION")
    save_adapter(base.model.model, config, tmp_path / "vectors", seed=2)
    names = load_file(tmp_path / "vectors" / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.layers.") for name in names)
    oracle = load_adapter(base.model.model, tmp_path / "vectors")
    prompt = prompt_of(40, 3)
    with torch.no_grad():
        states = oracle(input_ids=torch.tensor([prompt])).last_hidden_state[0].double()
    assert (states - states_of(base.model, prompt)).abs().max() > 0.05
    async with serve(base, tmp_path, adapters=["vectors"]) as harness:
        answer = await harness.run(make_request(prompt, "vectors", pooling=Pooling()))
        found = torch.tensor(answer.pooled, dtype=torch.float64)
        torch.testing.assert_close(found, pooled(states, Pooling()), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter needs CPU tensors")
@pytest.mark.long
async def test_the_gpu_path_pools_like_transformers(root: Path) -> None:
    base = twin("qwen3")
    prompts = [prompt_of(length, length) for length in (20, 5)]
    small: dict[str, Any] = {
        "kv_cache_bytes": 64 << 20,
        "max_num_batched_tokens": 16,
        "max_num_seqs": 8,
    }
    async with gpu_serving(base.folder, root, ["lora"], **small) as harness:
        requests = [
            make_request(prompt, name, pooling=pooling)
            for prompt in prompts
            for name in (None, "lora")
            for pooling in (LAST, MEAN)
        ]
        generated = make_request(prompts[1], max_tokens=4)
        found = (await harness.run_all([generated, *requests]))[1:]
    for request, answer in zip(requests, found, strict=True):
        model = load_adapter(base.model, root / "lora") if request.adapters else base.model
        assert request.pooling is not None
        expected = pooled(states_of(model, request.prompt_token_ids), request.pooling)
        vector = torch.tensor(answer.pooled, dtype=torch.float64)
        torch.testing.assert_close(vector, expected, rtol=1e-4, atol=1e-4)
