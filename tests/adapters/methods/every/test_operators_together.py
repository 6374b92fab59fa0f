"""The methods with operators of their own beside the older ones: against PEFT, and their bits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from builders.methods import load_adapter, make_config, save_adapter
from method_oracle import check_close, check_methods, oracle_logprobs, prompt_of, twin
from servers.engine_harness import Answer, EngineHarness, make_request
from torch import Tensor, nn

from turret.kernels.cpu import native
from turret.server.adapters.ref import AdapterRef

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "oft": ("oft", {}),
    "oft-exact": ("oft", {"use_cayley_neumann": False, "oft_block_size": 16}),
    "oft-shared": ("oft", {"block_share": True, "bias": "all"}),
    "oft-number": ("oft", {"oft_block_size": 0, "r": 3, "target_modules": ["v_proj", "down_proj"]}),
    "oft-near": ("oft", {"coft": True, "eps": 2.0, "target_modules": ["q_proj", "up_proj"]}),
    "boft": ("boft", {}),
    "boft-number": ("boft", {"boft_block_size": 0, "boft_block_num": 4}),
    "road": ("road", {}),
    "road-2": ("road", {"variant": "road_2", "group_size": 16}),
    "road-4": ("road", {"variant": "road_4", "group_size": 4}),
    "c3a": ("c3a", {}),
    "c3a-sizes": ("c3a", {"block_size": 8, "block_size_pattern": {"q_proj": 64}}),
    "hira": ("hira", {}),
    "hira-ranks": ("hira", {"r": 7, "rank_pattern": {"q_proj": 2}}),
    "glora-lora": ("glora", {"config_A_B": "lora"}),
}
# Those that the new ones meet in a mix: with gains, input gains of one slice and of all, ranks.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"target_modules": ["q_proj", "gate_proj", "down_proj"]}),
    "dora": ("dora", {}),
    "ia3": ("ia3", {"feedforward_modules": ["down_proj", "v_proj"]}),
    "ln-tuning": ("ln_tuning", {"target_modules": ["input_layernorm", "post_attention_layernorm"]}),
    "lokr": ("lokr", {}),
}
ADAPTERS = {**VARIANTS, **OTHERS}
MIXES: list[list[tuple[str, float]]] = [
    [("oft", 0.5)],
    [("boft", 0.7)],
    [("oft", 0.5), ("boft", 0.7)],
    [("boft", 1.0), ("boft-number", -0.4)],
    [("dora", 0.6), ("oft-exact", 0.8)],
    [("ia3", 0.5), ("boft", 0.5), ("lora", 1.0)],
    [("oft", 1.0), ("oft-shared", 0.5), ("lokr", 0.5)],
    [("road", 0.5), ("road-4", 0.7)],
    [("road", 0.6), ("boft", 0.4), ("dora", 0.5)],
    [("c3a", 0.5), ("c3a-sizes", -0.5), ("ia3", 1.0)],
    [("hira", 0.5), ("hira-ranks", 0.7), ("oft", 0.5)],
    [("glora-lora", 0.6), ("hira", 1.0), ("road-2", 0.5), ("c3a", 1.0)],
]
# Of norms PEFT has no module of the layers' to ask, so these are only compared with themselves.
NORM_MIXES: list[list[tuple[str, float]]] = [
    [("ln-tuning", 1.0)],
    [("ln-tuning", 0.6), ("oft", 0.7)],
    [("ln-tuning", 0.5), ("dora", 0.5)],
]


async def test_scores_and_answers_are_pefts(tmp_path: Path) -> None:
    await check_methods("qwen2", tmp_path, VARIANTS)


@pytest.mark.long
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3"])
async def test_other_architectures(architecture: str, tmp_path: Path) -> None:
    await check_methods(architecture, tmp_path, VARIANTS)


def save_all(root: Path) -> None:
    for seed, (name, (method, changes)) in enumerate(ADAPTERS.items()):
        save_adapter(twin("qwen2").model, make_config(method, **changes), root / name, seed=seed)


@pytest.mark.parametrize("formulation", ["float32", "bfloat16", "bfloat16 by torch"])
async def test_each_gets_the_bits_it_gets_alone(
    formulation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype, _, by_torch = formulation.partition(" ")
    if by_torch:
        monkeypatch.setattr(native, "library", lambda: None)
    save_all(tmp_path)
    requests = []
    mixes = [*([(name, 1.0)] for name in ADAPTERS), *MIXES, *NORM_MIXES, []]
    for number, mix in enumerate(mixes):
        refs = [AdapterRef(name=name, weight=weight) for name, weight in mix]
        prompt = prompt_of((3, 11, 29, 50)[number % 4], number)
        requests.append(make_request(prompt, *refs, max_tokens=4 + number % 3))
    answers: list[list[Answer]] = []
    for is_alone in (True, False):
        # Two servers: what the first one kept must not answer for the second.
        async with EngineHarness.start(
            twin("qwen2").folder, tmp_path, dtype=dtype, adapters=list(ADAPTERS)
        ) as harness:
            if is_alone:
                answers.append([await harness.run(request) for request in requests])
            else:
                answers.append(await harness.run_all(requests))
    for request, alone, together in zip(requests, *answers, strict=True):
        assert alone.bits == together.bits, [(ref.name, ref.weight) for ref in request.adapters]
    assert len({answer.token_ids[:3] for answer in answers[0]}) > len(requests) // 2


class _SumOfDeltas(nn.Module):
    """``base(x) + Σ w (adapted(x) − base(x))`` of one module in several PEFT models."""

    def __init__(self, base: nn.Module, parts: list[tuple[nn.Module, float]]) -> None:
        super().__init__()
        self._base, self._weights = base, [weight for _, weight in parts]
        self._parts = nn.ModuleList(part for part, _ in parts)

    def forward(self, x: Tensor) -> Tensor:
        plain = self._base(x)
        changes = zip(self._parts, self._weights, strict=True)
        # Some of PEFT's modules change what they are given.
        return plain + sum(weight * (part(x.clone()) - plain) for part, weight in changes)


def mixed_oracle(root: Path, mix: list[tuple[str, float]]) -> nn.Module:
    """A model whose modules sum the deltas of PEFT's own modules in output space."""
    model = copy.deepcopy(twin("qwen2").model)
    loaded = [(load_adapter(model, root / name), weight) for name, weight in mix]
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    ]
    for name in linears:
        parent, _, leaf = name.rpartition(".")
        parts = [(m.get_submodule(f"base_model.model.{name}"), weight) for m, weight in loaded]
        own = _SumOfDeltas(model.get_submodule(name), parts)
        setattr(model.get_submodule(parent), leaf, own)
    return model.eval()


async def test_mixes_sum_what_peft_adds(tmp_path: Path) -> None:
    save_all(tmp_path)
    prompt = prompt_of(31)
    async with EngineHarness.start(
        twin("qwen2").folder, tmp_path, adapters=list(ADAPTERS)
    ) as harness:
        for mix in MIXES:
            refs = [AdapterRef(name=name, weight=weight) for name, weight in mix]
            answer = await harness.run(make_request(prompt, *refs, score=True))
            rows = oracle_logprobs(mixed_oracle(tmp_path, mix), prompt)
            expected = [float(rows[i, token]) for i, token in enumerate(prompt[1:])]
            found = [p for p in answer.prompt_logprobs[1:] if p is not None]
            check_close(found, expected, f"{mix}")
