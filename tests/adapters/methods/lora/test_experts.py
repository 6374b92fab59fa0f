"""LoRA on the experts of a mixture, in both forms of its keys, compared with PEFT."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from builders.adapters import edit_config, edit_tensors
from builders.bases.published_models import EXPERTS
from builders.methods import load_adapter, make_config, save_adapter
from method_oracle import check_oracles, found_scores, prompt_of, serve, twin
from safetensors.torch import save_file
from said import fields_of, says
from servers.engine_harness import make_request

from turret.server.adapters.adapter import AdapterRef
from turret.server.basics.work import Cancellation
from turret.server.errors import BudgetExceededError, InvalidRequestError, TurretError

PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PREFIX = "base_model.model.model.layers"


def save_old(architecture: str, folder: Path, **changes: Any) -> Path:
    """Save a LoRA on experts that are modules, each with its own factors."""
    config = twin(architecture).model.config
    block, *leaves = EXPERTS[architecture]
    generator = torch.Generator().manual_seed(0)
    hidden, rank = config.hidden_size, 4
    inner = getattr(config, "moe_intermediate_size", config.intermediate_size)
    tensors = {}

    def put(name: str, out: int, into: int) -> None:
        a = torch.randn(rank, into, generator=generator) / into**0.5
        b = torch.randn(out, rank, generator=generator) / rank**0.5
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, 0.5 * b

    for layer in range(config.num_hidden_layers):
        prefix = f"{PREFIX}.{layer}"
        put(f"{prefix}.self_attn.q_proj", hidden, hidden)
        if layer in getattr(config, "mlp_only_layers", ()):
            for leaf, shape in zip(leaves, ((192, 128), (192, 128), (128, 192)), strict=True):
                put(f"{prefix}.mlp.{leaf}", *shape)
                # PEFT's conversion omits the layers with an MLP.
                tensors[f"{prefix}.mlp.{leaf}.lora_B.weight"].zero_()
            continue
        put(f"{prefix}.{block}.gate", config.num_local_experts, hidden)
        for expert in range(config.num_local_experts):
            for leaf in leaves:
                out, into = (hidden, inner) if leaf in ("down_proj", "w2") else (inner, hidden)
                put(f"{prefix}.{block}.experts.{expert}.{leaf}", out, into)
    targets = ["q_proj", "gate", *leaves]
    values = make_config("lora", target_modules=targets, r=rank, **changes).to_dict()
    folder.mkdir()
    values = {**values, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(values, default=str))
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def save_new(architecture: str, folder: Path, **changes: Any) -> Path:
    """Save a LoRA on parameters of three dimensions, as PEFT does."""
    chosen = {"target_modules": ["q_proj"], "target_parameters": PARAMETERS, **changes}
    save_adapter(twin(architecture).model, make_config("lora", **chosen), folder, seed=3)
    return folder


async def check(architecture: str, root: Path, name: str) -> None:
    """Compare scores and greedy answers, in fp32."""
    base = twin(architecture)
    oracle = load_adapter(base.model, root / name)
    await check_oracles(base, root, [name], [(name, oracle)], lengths=(30,))


@pytest.mark.parametrize("architecture", EXPERTS)
async def test_experts_as_modules(architecture: str, tmp_path: Path) -> None:
    # There is no reference for rsLoRA: PEFT's conversion doubles rank and alpha, so its scaling is
    # √2 too large.
    save_old(architecture, tmp_path / "a")
    await check(architecture, tmp_path, "a")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"target_parameters": [*PARAMETERS, "mlp.gate.weight"], "use_rslora": True},
        {"target_parameters": ["mlp.experts.down_proj"], "target_modules": []},
        {"target_parameters": ["gate_up_proj"], "layers_to_transform": [0]},
        {"rank_pattern": {r".*experts\.down_proj": 3, "q_proj": 5}, "alpha_pattern": {"q_proj": 9}},
        {"target_modules": r".*\.[qv]_proj", "target_parameters": ["mlp.gate.weight", *PARAMETERS]},
    ],
    ids=["both", "router", "down", "gate_up", "patterns", "regex"],
)
async def test_experts_as_parameters(changes: dict[str, Any], tmp_path: Path) -> None:
    save_new("qwen3_moe", tmp_path / "a", **changes)
    await check("qwen3_moe", tmp_path, "a")


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"target_parameters": ["mlp.router.weight", "experts.gate_up_proj"]},
        {"target_parameters": ["experts.down_proj"], "rank_pattern": {r".*down_proj": 3}},
        # The parameters of OpenAI's own recipe, in a few layers.
        {
            "target_modules": "all-linear",
            "target_parameters": ["1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"],
        },
    ],
    ids=["both", "router", "down", "recipe"],
)
async def test_experts_with_transposed_weights(changes: dict[str, Any], tmp_path: Path) -> None:
    """gpt-oss has ``[experts, in, out]`` weights, alternating gates and ups, and a router bias."""
    save_new("gpt_oss", tmp_path / "a", **changes)
    await check("gpt_oss", tmp_path, "a")


async def test_experts_as_modules_of_4bit_checkpoints(tmp_path: Path) -> None:
    """In 4-bit checkpoints of gpt-oss, experts are modules, and PEFT adapts them as such."""
    save_new("gpt_oss", tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    count = twin("gpt_oss").model.config.num_local_experts
    modules = {".base_layer": "gate_up_projs", "": "down_projs"}

    def take_apart(tensors: dict[str, torch.Tensor]) -> None:
        for layer, (inner, module) in itertools.product(range(2), modules.items()):
            folder = f"{PREFIX}.{layer}.mlp.experts"
            a = tensors.pop(f"{folder}{inner}.lora_A.weight").chunk(count)
            b = tensors.pop(f"{folder}{inner}.lora_B.weight")
            for e in range(count):
                tensors[f"{folder}.{module}.{e}.lora_A.weight"] = a[e].clone()
                tensors[f"{folder}.{module}.{e}.lora_B.weight"] = b[:, e::count].contiguous()

    names = [f"{module}.{e}" for module in modules.values() for e in range(count)]
    targets = {"target_modules": ["q_proj", *names], "target_parameters": None}
    edit_tensors(tmp_path / "old", take_apart)
    edit_config(tmp_path / "old", **targets)
    prompt = prompt_of(30)
    async with serve("gpt_oss", tmp_path, adapters=["new", "old"]) as harness:
        requests = [make_request(prompt, name, score=True) for name in ("new", "old", None)]
        new, old, plain = await harness.run_all(requests)
    assert old.bits == new.bits
    assert old.bits != plain.bits


async def test_a_mix_is_the_sum_of_its_updates(tmp_path: Path) -> None:
    """An update at weight 2 equals one with twice the scaling.

    A row's bits do not depend on the batch.
    """
    save_new("olmoe", tmp_path / "one")
    save_new("olmoe", tmp_path / "two", lora_alpha=12)
    save_old("olmoe", tmp_path / "old")
    base = twin("olmoe")
    names = ["one", "two", "old"]
    async with serve(base, tmp_path, adapters=names) as harness:
        prompt = prompt_of(20)
        mixes = (["two"], [("one", 2.0)], ["one", "old"], ["old", "one"], [])
        requests = [make_request(prompt, *mix, score=True) for mix in mixes]
        found = [*map(found_scores, await harness.run_together_and_alone(requests))]
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[2], found[3], rtol=1e-4, atol=1e-4)
        assert (found[2] - found[0]).abs().max() > 0.05


Tensors = dict[str, torch.Tensor]
FIELD = "model.layers.1.mlp.experts."


def unchanged(tensors: Tensors) -> None:
    """Only the config is changed."""


def lose(tensors: Tensors) -> None:
    del tensors[f"{PREFIX}.1.mlp.experts.lora_A.weight"]


def overflow(tensors: Tensors) -> None:
    for name in [name for name in tensors if "experts.lora_B" in name]:
        tensors[name] = torch.full_like(tensors[name], 3e38)


def add_loha(tensors: Tensors) -> None:
    tensors[f"{PREFIX}.1.mlp.experts.3.up_proj.hada_w1_a"] = torch.ones(2, 2)


# An edit of the tensors, changes of the config, and the reported field.
REFUSALS: dict[str, tuple[Callable[[Tensors], None], dict[str, Any], str]] = {
    "missing": (lose, {}, f"{FIELD}lora_A.weight"),
    "not targeted": (
        *(unchanged, {"target_parameters": ["gate_up_proj"]}),
        f"{FIELD}base_layer.lora_A.weight",
    ),
    "rank": (unchanged, {"r": 5}, f"{FIELD}lora_B.weight"),
    "dora": (unchanged, {"use_dora": True}, "use_dora"),
    "infinite": (overflow, {}, f"{FIELD}down_proj"),
    "another method": (add_loha, {"peft_type": "LOHA"}, f"{FIELD}3.up_proj.hada_w1_a"),
}


@pytest.mark.parametrize("case", REFUSALS)
async def test_inconsistent_files_are_rejected(case: str, tmp_path: Path) -> None:
    change, config, field = REFUSALS[case]
    edit_config(save_new("qwen3_moe", tmp_path / "a"), **config)
    edit_tensors(tmp_path / "a", change)
    async with serve("qwen3_moe", tmp_path, adapters=[]) as harness:
        with pytest.raises(TurretError) as refused:
            harness.registry.load("a", "a")
    assert field in fields_of(refused.value)


async def test_a_rank_over_the_limit_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    save_old("qwen3_moe", tmp_path / "modules")
    save_new("qwen3_moe", tmp_path / "parameters")
    async with serve("qwen3_moe", tmp_path, adapters=[]) as harness:
        for name in ("modules", "parameters"):
            edit_config(tmp_path / name, r=1 << 40)
            with pytest.raises(BudgetExceededError, check=says("RANK_OVER_LIMIT", rank=1 << 40)):
                harness.registry.load(name, name)
        # The pattern's rank is within the limit, but no tensor has this rank.
        edit_config(tmp_path / "modules", r=4, rank_pattern={"up_proj": 100})
        large = patch.object(torch, "zeros", side_effect=AssertionError("as the config says"))
        with pytest.raises(TurretError, check=says("WRONG_SHAPE")), large:
            harness.registry.load("modules", "modules")


async def test_updates_of_experts_are_not_merged_or_fused(tmp_path: Path) -> None:
    save_new("olmoe", tmp_path / "a")
    async with serve("olmoe", tmp_path, adapters=["a"]) as harness:
        with pytest.raises(
            InvalidRequestError, check=says("NOT_MERGEABLE", parts="update of experts")
        ):
            harness.merger.merge([AdapterRef(name="a")], None, Cancellation())
