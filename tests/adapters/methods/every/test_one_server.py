"""The methods that need no operator of their own, all on one server, against PEFT's forward.

Those whose code paths differ most have several variants here; ``test_random_configs.py`` and
``test_drawn_configs.py`` try the rest of what their configs can say.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from builders.methods import make_config, save_adapter
from method_oracle import check_methods, prompt_of, twin
from servers.engine_harness import Answer, EngineHarness, make_request

from turret.kernels.cpu import native
from turret.server.adapters.ref import AdapterRef

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bd-lora": ("bd_lora", {"use_rslora": True}),
    "kasa": ("kasa", {}),
    "velora": ("velora", {}),
    "conv1d": ("lora", {"fan_in_fan_out": True}),
    "parameters": (
        "lora",
        {"target_modules": [], "target_parameters": ["q_proj.weight", "down_proj.weight"]},
    ),
    "beft": ("beft", {}),
    "ln-tuning": ("ln_tuning", {}),
    "final-norm": ("ln_tuning", {"target_modules": ["model.norm"]}),
    "pvera": ("pvera", {}),
    "vblora": ("vblora", {}),
    "vblora-kept": ("vblora", {"save_only_topk_weights": True, "topk": 3}),
    "unilora": ("unilora", {}),
    "unilora-saved": ("unilora", {"save_indices": True, "target_modules": ["q_proj", "up_proj"]}),
    "tinylora": ("tinylora", {"weight_tying": 0.5}),
    "delora": ("delora", {}),
    "miss": ("miss", {}),
    "miss-mini": ("miss", {"r": 7, "mini_r": 4, "init_weights": "mini"}),
    "gralora": ("gralora", {}),
    "hra": ("hra", {}),
    "hra-orthonormal": ("hra", {"apply_GS": True, "r": 3}),
    "deft": ("deft", {"alpha": 6}),
    "deft-taken": ("deft", {"para": True, "decomposition_method": "qr"}),
    "peanut": ("peanut", {}),
    "glora": ("glora", {}),
    "shira": ("shira", {}),
    "supertuning": ("supertuning", {}),
    "supertuning-supra": ("supertuning", {"r": 3, "lora_alpha": 5, "select_top": False}),
    "waveft": ("waveft", {}),
    "waveft-wide": ("waveft", {"wavelet_family": "sym4", "n_frequency": 40}),
    "waveft-plain": ("waveft", {"use_idwt": False}),
    "fourierft": ("fourierft", {}),
    "fourierft-head": ("fourierft", {"target_modules": ["v_proj", "lm_head"]}),
    "randlora": ("randlora", {}),
    "randlora-drawn": ("randlora", {"r": 11, "save_projection": False}),
    "osf": ("osf", {}),
    "osf-tail": ("osf", {"effective_rank": 0.75, "rank_pattern": {"q_proj": 5}}),
    "frod": ("frod", {}),
    "miss-bat": ("miss", {"init_weights": "bat"}),
    "cpt": ("cpt", {}),
    "cartridge": ("cartridge", {}),
}
# One of each method, for batches.
BATCH = [
    name
    for name in VARIANTS
    if "-" not in name or name in ("bd-lora", "ln-tuning", "supertuning-supra", "miss-bat")
]
MIXES: list[list[tuple[str, float]]] = [
    [("hra", 0.5), ("miss", 0.7), ("ln-tuning", 0.4)],
    [("glora", 0.6), ("beft", -1.0), ("gralora", 0.5)],
    [("ln-tuning", 1.0), ("deft", 0.3), ("vblora", 1.0)],
    [("cartridge", 1.0), ("kasa", 0.5), ("peanut", 0.25), ("supertuning-supra", 0.7)],
    [("shira", 1.0), ("waveft", -0.5), ("glora", 0.3), ("supertuning", 0.5)],
    [("fourierft", 1.0), ("osf", -0.5), ("glora", 0.3), ("miss-bat", 0.4)],
    [("randlora", 0.5), ("frod", 0.5), ("ln-tuning", 0.4), ("shira", 0.5)],
    [("cpt", 1.0), ("delora", 1.0), ("unilora", -0.5), ("tinylora", 0.5)],
]


async def test_scores_and_answers_are_pefts(tmp_path: Path) -> None:
    await check_methods("qwen2", tmp_path, VARIANTS)


@pytest.mark.long
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3"])
async def test_other_architectures(architecture: str, tmp_path: Path) -> None:
    await check_methods(architecture, tmp_path, VARIANTS)


@pytest.mark.parametrize("formulation", ["float32", "bfloat16", "bfloat16 by torch"])
async def test_each_gets_the_bits_it_gets_alone(
    formulation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype, _, by_torch = formulation.partition(" ")
    if by_torch:
        monkeypatch.setattr(native, "library", lambda: None)
    base = twin("qwen2")
    for seed, name in enumerate(BATCH):
        method, changes = VARIANTS[name]
        save_adapter(base.model, make_config(method, **changes), tmp_path / name, seed=seed)
    requests = []
    for number, mix in enumerate([*([(name, 1.0)] for name in BATCH), *MIXES, []]):
        refs = [AdapterRef(name=name, weight=weight) for name, weight in mix]
        prompt = prompt_of((3, 11, 29, 50)[number % 4], number)
        requests.append(make_request(prompt, *refs, max_tokens=4 + number % 3))
    answers: list[list[Answer]] = []
    for is_alone in (True, False):
        # Two servers: what the first one kept must not answer for the second.
        async with EngineHarness.start(
            base.folder, tmp_path, dtype=dtype, adapters=BATCH
        ) as harness:
            if is_alone:
                answers.append([await harness.run(request) for request in requests])
            else:
                answers.append(await harness.run_all(requests))
    for request, alone, together in zip(requests, *answers, strict=True):
        assert alone.bits == together.bits, [(ref.name, ref.weight) for ref in request.adapters]
    assert len({answer.token_ids[:3] for answer in answers[0]}) > len(requests) // 2
