"""One batch with every method and mixes across them: each request gets the bits it gets alone."""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.methods import ALL, load_adapter, make_config, save_adapter
from builders.mixes.fusions import save_fusion
from builders.mixes.routers import write_router
from method_oracle import check_close, oracle_logprobs, prompt_of, twin
from servers.engine_harness import Answer, EngineHarness, make_request
from torch import nn

from turret.kernels.cpu import native
from turret.server.adapters.ref import AdapterRef
from turret.server.engine.scheduling.request import Request

ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {}),
    "rslora": ("rslora", {"r": 9, "target_modules": ["q_proj", "down_proj"]}),
    "dora": ("dora", {}),
    "loha": ("loha", {}),
    "loha-wide": ("loha", {"r": 6, "target_modules": ["q_proj", "gate_proj", "o_proj"]}),
    "lokr": ("lokr", {}),
    "lokr-whole": ("lokr", {"r": 64, "alpha": 80, "target_modules": ["k_proj", "up_proj"]}),
    "ia3": ("ia3", {"feedforward_modules": ["down_proj", "v_proj"]}),
    "adalora": ("adalora", {}),
    "vera": ("vera", {}),
    "prefix": ("prefix_tuning", {"num_virtual_tokens": 21}),
    "prompt": ("prompt_tuning", {"num_virtual_tokens": 7}),
    "p-tuning": ("p_tuning", {"num_virtual_tokens": 17}),
}
# Components, target modules, d_k.
FUSIONS = {
    "fusion": (("lora", "rslora"), ("q_proj", "v_proj", "o_proj", "down_proj"), 8),
    "fusion-3": (("vera", "adalora", "lora"), ("k_proj", "v_proj", "gate_proj", "up_proj"), 21),
}
# Experts, of any method with low-rank updates.
ROUTERS = {"router": ("lora", "vera")}
NAMES = (*ADAPTERS, *FUSIONS, *ROUTERS)
FUSION_MIXES: list[list[tuple[str, float]]] = [
    [("fusion", 1.0)],
    [("fusion", 0.4)],
    [("fusion-3", 1.0)],
    [("loha", 0.3), ("fusion", 0.7), ("fusion-3", -0.5), ("lora", 0.2)],
    [("fusion-3", 1.0), ("fusion", 1.0), ("router", 0.6), ("dora", 1.0)],
    [("router", 1.0)],
    [("prompt", 1.0), ("fusion", 0.0)],
    [("prefix", 1.0), ("fusion-3", 0.8)],
]
MIXES: list[list[tuple[str, float]]] = [
    [("lokr", 0.5), ("loha", 0.7)],
    [("lora", 0.7), ("loha", 0.3), ("dora", -0.4)],
    [("loha-wide", 1.2), ("loha", -0.5), ("lokr-whole", 0.25), ("vera", 1.0)],
    [("ia3", 0.5), ("adalora", 1.5), ("rslora", 0.0)],
    [("dora", 0.0)],
    [("prefix", 1.0), ("lora", 0.5), ("lokr", -1.0)],
    [("loha", 0.5), ("prompt", 1.0)],
]


def save_all(architecture: str, root: Path) -> None:
    for seed, (name, (method, keys)) in enumerate(ADAPTERS.items()):
        save_adapter(twin(architecture).model, make_config(method, **keys), root / name, seed=seed)
    for seed, (name, (components, targets, d_k)) in enumerate(FUSIONS.items()):
        model = twin(architecture).model
        save_fusion(model, root, name, components, targets, d_k=d_k, seed=seed, strength=40.0)
    for name, experts in ROUTERS.items():
        write_router(root, name, experts, ALL, top_k=1, rng_seed=5)


def make_requests() -> list[Request]:
    mixes = [[(name, 1.0)] for name in ADAPTERS] + MIXES + FUSION_MIXES + [[]]
    requests = []
    for number, mix in enumerate(mixes):
        refs = [AdapterRef(name=name, weight=weight) for name, weight in mix]
        # Some prompts are one short segment, some are cut into chunks.
        prompt = prompt_of((3, 11, 29, 70)[number % 4], number)
        requests.append(make_request(prompt, *refs, max_tokens=6 + number % 5))
    return requests


async def staggered(harness: EngineHarness, requests: list[Request]) -> list[Answer]:
    """Starts a request whenever another one, already running, has made a token."""
    tasks: list[asyncio.Task[Answer]] = []
    done = asyncio.Event()

    def start_next(_count: int = 0) -> None:
        if len(tasks) < len(requests):
            run = harness.run(requests[len(tasks)], on_token=start_next)
            tasks.append(asyncio.ensure_future(run))
        else:
            done.set()

    for _ in range(4):
        start_next()
    await done.wait()
    return list(await asyncio.gather(*tasks))


@pytest.mark.parametrize("formulation", ["float32", "bfloat16", "bfloat16 by torch"])
@pytest.mark.parametrize("architecture", ["llama", pytest.param("qwen2", marks=pytest.mark.long)])
async def test_each_request_gets_the_bits_it_gets_alone(
    architecture: str, formulation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype, _, by_torch = formulation.partition(" ")
    if by_torch:
        monkeypatch.setattr(native, "library", lambda: None)
    save_all(architecture, tmp_path)
    folder, requests = twin(architecture).folder, make_requests()

    def engine() -> Any:
        return EngineHarness.start(folder, tmp_path, dtype=dtype, adapters=NAMES)

    alone = []
    for request in requests:
        async with engine() as harness:
            alone.append(await harness.run(request))
    async with engine() as harness:
        together = await harness.run_all(requests)
        late = await staggered(harness, requests[::-1])
    for request, one, two, three in zip(requests, alone, together, late[::-1], strict=True):
        names = [(ref.name, ref.weight) for ref in request.adapters]
        assert two.bits == one.bits, names
        assert three.bits == one.bits, names
    base = next(a for a, r in zip(alone, requests, strict=True) if not r.adapters)
    assert len({answer.token_ids[:3] for answer in together}) > len(requests) // 2
    zero = requests.index(next(r for r in requests if [a.weight for a in r.adapters] == [0.0]))
    async with engine() as harness:
        plain = await harness.run(make_request(requests[zero].prompt_token_ids, max_tokens=6))
    assert alone[zero].token_ids[:6] == plain.token_ids[:6]
    assert base.token_ids


class _SumOfDeltas(nn.Module):
    """``base(x) + Σ w (adapted(x) − base(x))`` of one module in several PEFT models."""

    def __init__(self, base: nn.Module, parts: list[tuple[nn.Module, float]]) -> None:
        super().__init__()
        self._base, self._weights = base, [weight for _, weight in parts]
        self._parts = nn.ModuleList(part for part, _ in parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plain = self._base(x)
        changes = zip(self._parts, self._weights, strict=True)
        return plain + sum(weight * (part(x) - plain) for part, weight in changes)


def mixed_oracle(architecture: str, root: Path, mix: list[tuple[str, float]]) -> nn.Module:
    """A model whose modules sum the deltas of PEFT's own modules in output space."""
    model = copy.deepcopy(twin(architecture).model)
    loaded = [(load_adapter(model, root / name), weight) for name, weight in mix]
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    ]
    for name in names:
        parent, _, leaf = name.rpartition(".")
        parts = [(m.get_submodule(f"base_model.model.{name}"), weight) for m, weight in loaded]
        base = model.get_submodule(name)
        setattr(model.get_submodule(parent), leaf, _SumOfDeltas(base, parts))
    return model.eval()


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
async def test_mixes_sum_what_peft_adds(architecture: str, tmp_path: Path) -> None:
    save_all(architecture, tmp_path)
    soft = {"prefix", "prompt", "p-tuning"}
    mixes = [mix for mix in MIXES if not soft & {name for name, _ in mix}]
    prompt = prompt_of(31)
    async with EngineHarness.start(
        twin(architecture).folder, tmp_path, adapters=list(ADAPTERS)
    ) as harness:
        for mix in mixes:
            refs = [AdapterRef(name=name, weight=weight) for name, weight in mix]
            answer = await harness.run(make_request(prompt, *refs, score=True))
            rows = oracle_logprobs(mixed_oracle(architecture, tmp_path, mix), prompt)
            expected = [float(rows[i, token]) for i, token in enumerate(prompt[1:])]
            found = [p for p in answer.prompt_logprobs[1:] if p is not None]
            check_close(found, expected, f"{mix}")
