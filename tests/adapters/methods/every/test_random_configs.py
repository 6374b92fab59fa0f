"""Random configs that PEFT accepts, for every method that adapts linear modules."""

from __future__ import annotations

import functools
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import (
    apply_operators,
    base_of,
    linear_modules,
    lower_adapter,
    tiny_llama,
)
from builders.methods import ALL, load_adapter, make_config, quiet, save_adapter
from transformers import LlamaForCausalLM

from turret.server.adapters.base import BaseModel
from turret.server.adapters.operators.adapter_operators import ModuleOperators

METHODS = ("lora", "rslora", "dora", "loha", "lokr", "ia3", "adalora", "vera")
# The number of configs per method.
NUM_CONFIGS = [10, pytest.param(50, marks=pytest.mark.long)]
# Up to this rank, every module of the model is cheaper in rank space than dense.
MAX_LOHA_RANK = 4


@functools.cache
def model() -> tuple[LlamaForCausalLM, BaseModel]:
    built = tiny_llama(attention_bias=True, dtype=torch.float64)
    return built, base_of(built)


def random_targets(draw: random.Random) -> dict[str, Any]:
    """Target keys in one of PEFT's forms."""
    some = draw.sample(ALL, draw.randint(1, len(ALL)))
    kind = draw.randrange(5)
    if kind == 0:
        return {"target_modules": "all-linear"}
    if kind == 1:
        return {"target_modules": rf".*\.layers\.{draw.randrange(2)}\..*({'|'.join(some)})"}
    if kind == 2:
        exact = f"model.layers.{draw.randrange(2)}.mlp.{draw.choice(ALL[4:])}"
        return {"target_modules": [exact, *some]}
    return {"target_modules": some}


def random_selection(draw: random.Random, *, has_layers: bool) -> dict[str, Any]:
    keys = random_targets(draw)
    targets = keys["target_modules"]
    if has_layers and isinstance(targets, list) and draw.random() < 0.4:
        keys["layers_to_transform"] = draw.choice([0, 1, [1], [0, 1]])
        if draw.random() < 0.5:
            keys["layers_pattern"] = draw.choice(["layers", ["h", "layers"]])
    # The pattern does not match o_proj in layer 1, so that some module is always adapted.
    if draw.random() < 0.3 and (not isinstance(targets, list) or len(targets) > 2):
        keys["exclude_modules"] = draw.choice(
            [["layers.0.self_attn.q_proj"], r".*\.0\.mlp\.up_proj", ["layers.1.mlp.up_proj"]]
        )
    return keys


def random_patterns(draw: random.Random, alpha: Any, ranks: int) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    names = ("q_proj", r"layers\.1\..*", r"mlp\.(up|down)_proj", "^model.layers.0.mlp.gate_proj")
    # PEFT uses the first matching key, but sorts the keys when it saves them.
    if draw.random() < 0.5:
        chosen = sorted(draw.sample(names, 2))
        keys["rank_pattern"] = {name: draw.randint(1, ranks) for name in chosen}
    if draw.random() < 0.5:
        keys["alpha_pattern"] = {name: alpha() for name in sorted(draw.sample(names, 2))}
    return keys


def random_config(method: str, draw: random.Random) -> dict[str, Any]:
    """Keys for ``make_config``."""

    def alpha() -> float:
        return draw.choice([1, 3, 8, 2.5])

    keys = random_selection(draw, has_layers=method != "ia3")
    if method in ("lora", "rslora", "dora"):
        keys |= {"r": draw.randint(1, 9), "lora_alpha": alpha()}
        keys |= random_patterns(draw, alpha, 9)
        keys["bias"] = draw.choice(["none", "none", "all", "lora_only"])
        keys["lora_bias"] = method != "dora" and draw.random() < 0.3
    elif method == "loha":
        keys |= {"r": draw.randint(1, MAX_LOHA_RANK), "alpha": alpha()}
        keys |= random_patterns(draw, alpha, MAX_LOHA_RANK)
    elif method == "lokr":
        keys |= {"r": draw.randint(1, 12), "alpha": alpha()}
        keys |= random_patterns(draw, alpha, 12)
        keys["decompose_both"] = draw.random() < 0.5
        keys["decompose_factor"] = draw.choice([-1, -1, 2, 4, 8])
    elif method == "ia3":
        keys.pop("exclude_modules", None)
        targets = keys["target_modules"]
        is_list = isinstance(targets, list)
        keys["feedforward_modules"] = (
            draw.sample(targets, draw.randint(0, len(targets)))
            if is_list
            else draw.choice([r".*\.(down|up)_proj", targets])
        )
    elif method == "adalora":
        keys |= {"init_r": draw.randint(2, 9), "lora_alpha": draw.choice([1, 8, 32])}
        keys["bias"] = draw.choice(["none", "all", "lora_only"])
    else:
        keys |= {"r": draw.randint(1, 24), "save_projection": draw.random() < 0.7}
        keys["projection_prng_key"] = draw.randrange(1 << 20)
        keys["bias"] = draw.choice(["none", "all", "vera_only"])
        keys.pop("exclude_modules", None)
    return keys


@torch.no_grad()
def module_error(path: str, peft_linear: torch.nn.Module, operators: ModuleOperators) -> float:
    """The largest error of a module's output, relative to the output's largest value."""
    linear = linear_modules(model()[0])[path]
    generator = torch.Generator().manual_seed(len(path))
    x = torch.randn(5, linear.in_features, generator=generator, dtype=torch.float64)
    expected = peft_linear(x)
    found = apply_operators(linear, [(operators, 1.0)], x)
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("num_configs", NUM_CONFIGS)
@pytest.mark.parametrize("method", METHODS)
def test_random_configs_compute_what_peft_computes(
    method: str, num_configs: int, tmp_path: Path
) -> None:
    draw = random.Random(method)
    plain, base = model()
    num_moved = 0
    for number in range(num_configs):
        keys = random_config(method, draw)
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            directory = Path(folder) / "a"
            save_adapter(plain, make_config(method, **keys), directory, seed=number)
            lowered = lower_adapter(Path(folder), base)
            oracle = load_adapter(plain, directory)
        for path, linear in linear_modules(plain).items():
            operators = lowered.operators.modules.get(path, ModuleOperators())
            error = module_error(path, oracle.get_submodule(f"base_model.model.{path}"), operators)
            # Gains, biases and redrawn tensors are fp32.
            assert error < 1e-6, (keys, path, error)
            x = torch.ones(1, linear.in_features, dtype=torch.float64)
            with torch.no_grad():
                change = apply_operators(linear, [(operators, 1.0)], x) - linear(x)
            num_moved += bool(change.abs().max() > 1e-3)
    # The adapters must have an effect.
    assert num_moved > 3 * num_configs


def test_quiet_hides_warnings_only_inside() -> None:
    import warnings

    with quiet():
        warnings.warn("hidden", stacklevel=1)
    with pytest.raises(UserWarning, match="shown"):
        warnings.warn("shown", stacklevel=1)
