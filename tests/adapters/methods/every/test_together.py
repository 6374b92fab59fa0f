"""All methods on one server: compared with PEFT, alone and mixed, with the bits of each request.

Methods with very different code paths have several variants here; ``test_drawn_configs.py`` covers
the other settings.

``OLDER`` and ``VARIANTS`` are compared with PEFT one by one, and the mixes ``SUMS`` with the sums
of PEFT's changes. Requests for any method or for ``MIXES``, which include ``SUMS``, get the bits
that they get alone.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.bases.tiny_models import ARCHITECTURES
from builders.methods import ALL, make_config, save_adapter
from builders.mixes.every_method import TASKS, save_every_method
from builders.mixes.fusions import save_fusion
from builders.mixes.routers import write_router
from method_oracle import check_methods, check_mixes, prompt_of, serve, twin
from servers.engine_harness import Answer, EngineHarness, make_request

from turret.kernels import cpu as native
from turret.server.adapters.methods import METHODS
from turret.server.engine.scheduling.request import Request

Variants = dict[str, tuple[str, dict[str, Any]]]
Mix = list[tuple[str, float]]

# The older methods, in several forms.
OLDER: Variants = {
    "lora-plain": ("lora", {"r": 8, "lora_alpha": 16}),
    "lora-attention": ("lora", {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]}),
    "lora-rslora": ("rslora", {"r": 6, "lora_alpha": 4}),
    "lora-dora": ("dora", {"r": 4, "lora_alpha": 8}),
    "lora-dora-rslora": ("dora", {"r": 5, "use_rslora": True, "target_modules": ["k_proj"]}),
    "lora-patterns": (
        "lora",
        {
            "r": 4,
            "rank_pattern": {"q_proj": 7, "layers.1.mlp.down_proj": 2},
            "alpha_pattern": {"v_proj": 20, r".*\.0\.self_attn\.q_proj": 1},
        },
    ),
    "lora-bias": ("lora", {"r": 4, "lora_alpha": 10, "lora_bias": True}),
    "loha-plain": ("loha", {}),
    "loha-attention": ("loha", {"r": 5, "target_modules": ["q_proj", "v_proj"], "alpha": 2.5}),
    "loha-patterns": (
        "loha",
        {"rank_pattern": {"o_proj": 6, "v_proj": 1}, "alpha_pattern": {"o_proj": 9}},
    ),
    "loha-one-layer": ("loha", {"layers_to_transform": [1]}),
    "lokr-factors": ("lokr", {}),
    # The rank exceeds half of the sizes: PEFT keeps both factors whole, but still divides by the
    # rank.
    "lokr-whole": ("lokr", {"r": 64, "alpha": 80}),
    "lokr-both": ("lokr", {"decompose_both": True, "r": 1}),
    "lokr-factor-4": ("lokr", {"decompose_factor": 4, "r": 3}),
    "lokr-mixed": (
        "lokr",
        {"rank_pattern": {"q_proj": 16}, "target_modules": ["q_proj", "up_proj"]},
    ),
    "ia3-inputs": ("ia3", {"target_modules": ALL, "feedforward_modules": ["down_proj", "q_proj"]}),
    "ia3-outputs": ("ia3", {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []}),
    "ia3-default": ("ia3", {"target_modules": None, "feedforward_modules": None}),
    "adalora-pruned": ("adalora", {}),
    "adalora-bias": ("adalora", {"bias": "lora_only", "target_modules": ["q_proj", "down_proj"]}),
    "vera-saved": ("vera", {}),
    "vera-drawn-again": ("vera", {"save_projection": False, "r": 11}),
    "vera-narrow": ("vera", {"target_modules": ["k_proj"], "bias": "vera_only"}),
}
# A method's own name stands for its usual config.
VARIANTS: Variants = {
    "rs-bd-lora": ("bd_lora", {"use_rslora": True}),
    "kasa": ("kasa", {}),
    "velora": ("velora", {}),
    "conv1d": ("lora", {"fan_in_fan_out": True}),
    "parameters": (
        "lora",
        {"target_modules": [], "target_parameters": ["q_proj.weight", "down_proj.weight"]},
    ),
    "beft": ("beft", {}),
    "ln_tuning": ("ln_tuning", {}),
    "final-norm": ("ln_tuning", {"target_modules": ["model.norm"]}),
    "pvera": ("pvera", {}),
    "vblora": ("vblora", {}),
    "vblora-kept": ("vblora", {"save_only_topk_weights": True, "topk": 3}),
    "unilora": ("unilora", {}),
    "unilora-saved": ("unilora", {"save_indices": True, "target_modules": ["q_proj", "up_proj"]}),
    "tied-tinylora": ("tinylora", {"weight_tying": 0.5}),
    "delora": ("delora", {}),
    "miss": ("miss", {}),
    "miss-mini": ("miss", {"r": 7, "mini_r": 4, "init_weights": "mini"}),
    "gralora": ("gralora", {}),
    "hra": ("hra", {}),
    "hra-orthonormal": ("hra", {"apply_GS": True, "r": 3}),
    "deft-alpha": ("deft", {"alpha": 6}),
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
    # Methods with their own operators.
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
# Methods for mixes with the variants above; other tests compare them with PEFT one by one.
OTHERS: Variants = {
    "lora": ("lora", {}),
    "lora-some": ("lora", {"target_modules": ["q_proj", "gate_proj", "down_proj"]}),
    "rslora": ("rslora", {"r": 9, "target_modules": ["q_proj", "down_proj"]}),
    "dora": ("dora", {}),
    "loha": ("loha", {}),
    "loha-wide": ("loha", {"r": 6, "target_modules": ["q_proj", "gate_proj", "o_proj"]}),
    "lokr": ("lokr", {}),
    "lokr-whole": ("lokr", {"r": 64, "alpha": 80, "target_modules": ["k_proj", "up_proj"]}),
    "ia3-values": ("ia3", {"feedforward_modules": ["down_proj", "v_proj"]}),
    "norms": ("ln_tuning", {"target_modules": ["input_layernorm", "post_attention_layernorm"]}),
    "adalora": ("adalora", {}),
    "vera": ("vera", {}),
    "prefix": ("prefix_tuning", {"num_virtual_tokens": 21}),
    "prompt": ("prompt_tuning", {"num_virtual_tokens": 7}),
    "p-tuning": ("p_tuning", {"num_virtual_tokens": 17}),
}
KNOWN = {**OLDER, **VARIANTS, **OTHERS}
# Components, target modules, d_k.
FUSIONS = {
    "fusion": (("lora", "rslora"), ("q_proj", "v_proj", "o_proj", "down_proj"), 8),
    "fusion-3": (("vera", "adalora", "lora"), ("k_proj", "v_proj", "gate_proj", "up_proj"), 21),
}
# Experts, of any method with low-rank updates.
ROUTERS = {"router": ("lora", "vera")}
# Mixes for which PEFT's modules return the change of each member.
SUMS: list[Mix] = [
    [("lokr", 0.5), ("loha", 0.7)],
    [("lora", 0.7), ("loha", 0.3), ("dora", -0.4)],
    [("lora", 1.0), ("lora-rslora", 1.0)],
    [("dora", 0.7), ("lora-dora-rslora", 0.4), ("lora-bias", -0.3), ("lora-patterns", 0.25)],
    [("lora", 0.0), ("lora-bias", 1.5)],
    [("loha-wide", 1.2), ("loha", -0.5), ("lokr-whole", 0.25), ("vera", 1.0)],
    [("ia3-values", 0.5), ("adalora", 1.5), ("rslora", 0.0)],
    [("dora", 0.0)],
    [("oft", 0.5)],
    [("boft", 0.7)],
    [("oft", 0.5), ("boft", 0.7)],
    [("boft", 1.0), ("boft-number", -0.4)],
    [("dora", 0.6), ("oft-exact", 0.8)],
    [("ia3-values", 0.5), ("boft", 0.5), ("lora-some", 1.0)],
    [("oft", 1.0), ("oft-shared", 0.5), ("lokr", 0.5)],
    [("road", 0.5), ("road-4", 0.7)],
    [("road", 0.6), ("boft", 0.4), ("dora", 0.5)],
    [("c3a", 0.5), ("c3a-sizes", -0.5), ("ia3-values", 1.0)],
    [("hira", 0.5), ("hira-ranks", 0.7), ("oft", 0.5)],
    [("glora-lora", 0.6), ("hira", 1.0), ("road-2", 0.5), ("c3a", 1.0)],
]
MIXES: list[Mix] = [
    *SUMS,
    [("prefix", 1.0), ("lora", 0.5), ("lokr", -1.0)],
    [("loha", 0.5), ("prompt", 1.0)],
    [("p-tuning", 1.0)],
    [("norms", 1.0)],
    [("norms", 0.6), ("oft", 0.7)],
    [("norms", 0.5), ("dora", 0.5)],
    [("hra", 0.5), ("miss", 0.7), ("ln_tuning", 0.4)],
    [("glora", 0.6), ("beft", -1.0), ("gralora", 0.5)],
    [("ln_tuning", 1.0), ("deft", 0.3), ("vblora", 1.0)],
    [("cartridge", 1.0), ("kasa", 0.5), ("peanut", 0.25), ("supertuning-supra", 0.7)],
    [("shira", 1.0), ("waveft", -0.5), ("glora", 0.3), ("supertuning", 0.5)],
    [("fourierft", 1.0), ("osf", -0.5), ("glora", 0.3), ("miss-bat", 0.4)],
    [("randlora", 0.5), ("frod", 0.5), ("ln_tuning", 0.4), ("shira", 0.5)],
    [("cpt", 1.0), ("delora", 1.0), ("unilora", -0.5), ("tinylora", 0.5)],
    [("fusion", 1.0)],
    [("fusion", 0.4)],
    [("fusion-3", 1.0)],
    [("loha", 0.3), ("fusion", 0.7), ("fusion-3", -0.5), ("lora", 0.2)],
    [("fusion-3", 1.0), ("fusion", 1.0), ("router", 0.6), ("dora", 1.0)],
    [("router", 1.0)],
    [("prompt", 1.0), ("fusion", 0.0)],
    [("prefix", 1.0), ("fusion-3", 0.8)],
]
# The token that invokes the aLoRA.
INVOCATION = 7


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
async def test_older_methods_match_peft(architecture: str, tmp_path: Path) -> None:
    await check_methods(architecture, tmp_path, OLDER, lengths=(140, 6, 1))


@pytest.mark.parametrize("architecture", sorted({*ARCHITECTURES} - {"llama", "qwen2"}))
async def test_other_architectures(architecture: str, tmp_path: Path) -> None:
    """The prompts also cross a tile of attention (128) and a window (24)."""
    others = ("loha-plain", "lokr-factors", "ia3-inputs", "adalora-pruned", "vera-saved")
    some = {name: how for name, how in OLDER.items() if "lora-" in name[:5] or name in others}
    await check_methods(architecture, tmp_path, some, lengths=(140, 17, 1))


@pytest.mark.parametrize(
    "architecture",
    ["qwen2", *(pytest.param(a, marks=pytest.mark.long) for a in ("llama", "mistral", "qwen3"))],
)
async def test_newer_methods_match_peft(architecture: str, tmp_path: Path) -> None:
    await check_methods(architecture, tmp_path, VARIANTS)


def save_all(architecture: str, root: Path) -> list[str]:
    """Save an adapter of every method and of every variant in a mix; returns the loading order."""
    model = twin(architecture).model
    names = save_every_method(model, root)
    mixed = {name for mix in MIXES for name, _ in mix} | {"rslora"}
    more = {name: how for name, how in KNOWN.items() if name in mixed - {*names}}
    for seed, (name, (method, keys)) in enumerate(more.items()):
        save_adapter(model, make_config(method, **keys), root / name, seed=seed)
    for seed, (name, (components, targets, d_k)) in enumerate(FUSIONS.items()):
        save_fusion(model, root, name, components, targets, d_k=d_k, seed=seed, strength=40.0)
    for name, experts in ROUTERS.items():
        write_router(root, name, experts, ALL, top_k=1, rng_seed=5)
    return [*names, *more, *FUSIONS, *ROUTERS]


def make_requests() -> list[Request]:
    """Requests for each method, the mixes and the base."""
    requests = []
    for number, mix in enumerate([*([(name, 1.0)] for name in sorted(METHODS)), *MIXES, []]):
        # Some prompts are one short segment, some are cut into chunks.
        prompt = prompt_of((3, 11, 29, 70)[number % 4], number)
        prompt += [INVOCATION, *prompt_of(2, number)]
        requests.append(make_request(prompt, *mix, max_tokens=4 + number % 3))
    return requests


async def staggered(harness: EngineHarness, requests: list[Request]) -> list[Answer]:
    """Start a request whenever another running one has produced a token."""
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
    names, requests = save_all(architecture, tmp_path), make_requests()

    @asynccontextmanager
    async def started() -> AsyncIterator[EngineHarness]:
        async with serve(architecture, tmp_path, dtype=dtype, max_num_seqs=64) as harness:
            served = {
                name: harness.registry.load(name, name, task=TASKS.get(name)).facts.method
                for name in names
            }
            # The folders have the names of the served methods, and none is missing.
            assert {name: served[name] for name in METHODS} == {name: name for name in METHODS}
            yield harness

    # Use several servers, so that caches of the first one cannot answer for the others.
    async with started() as harness:
        alone = [await harness.run(request) for request in requests]
        plain = [
            await harness.run(make_request(request.prompt_token_ids, max_tokens=4))
            for request in requests
        ]
    async with started() as harness:
        together = await harness.run_all(requests)
    async with started() as harness:
        late = await staggered(harness, requests[::-1])
    for request, one, two, three, base in zip(
        requests, alone, together, late[::-1], plain, strict=True
    ):
        mix = [(ref.name, ref.weight) for ref in request.adapters]
        assert two.bits == one.bits, mix
        assert three.bits == one.bits, mix
        changed = one.logprobs[0] != base.logprobs[0]
        assert changed == any(weight for _, weight in mix), mix


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
async def test_mixes_sum_what_peft_adds(architecture: str, tmp_path: Path) -> None:
    base = twin(architecture)
    names = sorted({name for mix in SUMS for name, _ in mix})
    for seed, name in enumerate(names):
        method, keys = KNOWN[name]
        save_adapter(base.model, make_config(method, **keys), tmp_path / name, seed=seed)
    async with serve(base, tmp_path, adapters=names) as harness:
        await check_mixes(harness, base.model, tmp_path, SUMS)


# An adapter's tensors are freed with the adapter, without the garbage collector.


@contextmanager
def tensors_in_cycles() -> Iterator[list[torch.Size]]:
    """At the end of the context, the list holds the shape of each tensor in a dead cycle."""
    found: list[torch.Size] = []
    gc.collect()
    gc.disable()
    try:
        yield found
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found += [kept.shape for kept in gc.garbage if issubclass(type(kept), torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


async def test_no_method_leaves_tensors_in_cycles(tmp_path: Path) -> None:
    names = save_every_method(twin("llama").model, tmp_path)
    async with serve("llama", tmp_path) as harness:
        with tensors_in_cycles() as found:
            for name in names:
                harness.registry.load(name, name, task=TASKS.get(name))
            for name in reversed(names):
                harness.registry.unload(name)
        assert not found
