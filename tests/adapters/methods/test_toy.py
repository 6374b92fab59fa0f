"""A method is one file: a method in a test's folder is discovered and served.

Its declaration needs no torch, so that adapters can be checked at startup before torch is loaded.
"""

from __future__ import annotations

import asyncio
import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import base_of, read_adapter, sizes_of, tiny_llama
from builders.methods import make_config, save_adapter
from method_oracle import check_greedy, prompt_of, serve, twin
from safetensors.torch import save_file
from said import says
from servers.engine_harness import make_request

from turret.server.adapters import methods
from turret.server.adapters.adapter import CONFIG_FILE, TENSORS_FILE, AdapterRef
from turret.server.adapters.checkpoint.adapter_root import AdapterRoot
from turret.server.adapters.methods.check import check_files
from turret.server.adapters.methods.lower import lower_checkpoint
from turret.server.errors import BudgetExceededError

TOY = '''
"""Output flip: ``y = s ⊙ (W x)`` with a sign per output channel."""

from turret.server.adapters.methods.kit import OUT, Gain, LinearMethod

METHOD = LinearMethod(
    name="flip",
    peft_types={"FLIP"},
    rank=None,
    tensors={"sign": (OUT,)},
    operators=lambda m: Gain(m.tensors["sign"]),
)
'''

# This method does not mention the server's limit on ranks.
RANKED_TOY = '''
"""Two factors without a scale."""

from turret.server.adapters.methods.kit import IN, OUT, LinearMethod, R, low_rank

METHOD = LinearMethod(
    name="plain",
    peft_types={"PLAIN"},
    has_patterns=True,
    tensors={"down": (R, IN), "up": (OUT, R)},
    operators=lambda m: low_rank(m.tensors["down"], m.tensors["up"]),
)
'''


def discover(name: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Add a folder with a method to the folders in which methods are discovered."""
    folder = tmp_path / "more_methods"
    folder.mkdir()
    (folder / f"{name}.py").write_text(code)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(folder)])
    monkeypatch.setattr(methods, "METHODS", methods._discover())
    assert name in methods.METHODS


def save(directory: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    directory.mkdir(parents=True)
    (directory / CONFIG_FILE).write_text(json.dumps(config))
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(named, directory / TENSORS_FILE)


async def test_a_method_in_one_file_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    discover("flip", TOY, tmp_path, monkeypatch)
    base = twin("llama")
    root = tmp_path / "adapters"
    paths = [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)]
    signs = torch.where(torch.arange(128) % 3 == 0, -1.0, 1.0)
    config = {"peft_type": "FLIP", "target_modules": ["down_proj"]}
    save(root / "a", config, {f"{path}.sign": signs.clone() for path in paths})
    oracle = copy.deepcopy(base.model)
    with torch.no_grad():
        for path in paths:
            oracle.get_submodule(path).weight.mul_(signs[:, None])
    prompt = prompt_of(9)
    async with serve(base, root, adapters=["a"]) as harness:
        answer = await harness.run(make_request(prompt, "a"))
        plain = await harness.run(make_request(prompt))
        assert harness.registry.get("a").facts.method == "flip"
    check_greedy(answer, oracle, prompt, "flip")
    assert plain.token_ids != answer.token_ids


def test_a_method_cannot_forget_the_limit_on_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    discover("plain", RANKED_TOY, tmp_path, monkeypatch)
    base = base_of(tiny_llama())
    config = {
        "peft_type": "PLAIN",
        "target_modules": ["q_proj"],
        "r": 2,
        "rank_pattern": {"layers.1.self_attn.q_proj": 5},
    }
    tensors = {}
    for layer, rank in enumerate((2, 5)):
        path = f"model.layers.{layer}.self_attn.q_proj"
        tensors[f"{path}.down"] = torch.randn(rank, 64)
        tensors[f"{path}.up"] = torch.randn(64, rank)
    save(tmp_path / "root" / "a", config, tensors)
    checkpoint = read_adapter(tmp_path / "root")
    name, lowered = lower_checkpoint(checkpoint, base, 5)
    assert (name, lowered.ranks) == ("plain", (2, 5))
    with pytest.raises(BudgetExceededError, check=says("RANK_OVER_LIMIT", rank=5, max_rank=4)):
        lower_checkpoint(checkpoint, base, 4)
    # The limit is also enforced in the check of a header.
    with AdapterRoot(tmp_path / "root").open_directory("a") as directory:
        sizes = sizes_of(base)
        check_files(directory, "a", base=sizes, base_name=None, max_rank=5)
        with pytest.raises(BudgetExceededError, check=says("RANK_OVER_LIMIT", rank=5, max_rank=4)):
            check_files(directory, "a", base=sizes, base_name=None, max_rank=4)


NEW_OPERATOR = '''
"""``Δ(x) = s ⊙ tanh(W x)``: not linear in ``x``, and without a kernel on any path."""

from dataclasses import dataclass

from turret.server.adapters.methods.kit import *
from turret.server.adapters.operators import Operator


@dataclass(frozen=True, slots=True)
class Squashed(Operator):
    name = "squashed"
    has_dense = False

    scale: torch.Tensor

    def add(self, y, x, base, weight):
        y += base.result.float().tanh() * self.scale.float() * weight


METHOD = LinearMethod(
    name="squash",
    peft_types={"SQUASH"},
    rank=None,
    tensors={"scale": (OUT,)},
    operators=lambda m: Squashed(m.tensors["scale"]),
)
'''
_MIX = (AdapterRef(name="squash", weight=0.5), AdapterRef(name="lora", weight=-0.7))


class _Squash(torch.nn.Module):
    """A module of transformers with the new operator."""

    def __init__(self, base: torch.nn.Module, scale: torch.Tensor) -> None:
        super().__init__()
        self.base, self.scale = base, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        return y + self.scale * y.tanh()


@pytest.mark.parametrize(
    ("path", "dtype"), [("torch", "float32"), ("gpu", "float32"), ("cpu", "bfloat16")]
)
@pytest.mark.usefixtures("coarse_tiles")
async def test_an_operator_without_kernels_is_served_and_mixed(
    path: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    discover("squash", NEW_OPERATOR, tmp_path, monkeypatch)
    base = twin("llama", getattr(torch, dtype))
    root = tmp_path / "adapters"
    modules = [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)]
    scale = torch.linspace(-2, 2, 128)
    config = {"peft_type": "SQUASH", "target_modules": ["down_proj"]}
    save(root / "squash", config, {f"{module}.scale": scale.clone() for module in modules})
    save_adapter(base.model, make_config("lora"), root / "lora")
    oracle = copy.deepcopy(base.model)
    for module in modules:
        parent = oracle.get_submodule(module.rpartition(".")[0])
        parent.down_proj = _Squash(parent.down_proj, scale)
    prompt = prompt_of(9)
    requests: list[tuple[AdapterRef | str, ...]] = [("squash",), ("lora",), (), _MIX]
    names = ["squash", "lora"]
    async with serve(base, root, adapters=names, dtype=dtype, gpu=path == "gpu") as harness:
        answers = await asyncio.gather(
            *(harness.run(make_request(prompt, *refs)) for refs in requests)
        )
        alone = [await harness.run(make_request(prompt, *refs)) for refs in requests]
    assert [answer.bits for answer in answers] == [answer.bits for answer in alone]
    assert len({answer.logprobs for answer in answers}) == len(requests)
    if dtype == "float32":
        check_greedy(answers[0], oracle, prompt, "squash")


WITHOUT_TORCH = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] not in {"torch", "numpy", "transformers"}, name

sys.meta_path.insert(0, Refuse())
from turret.server.adapters.methods import METHODS
from turret.server.adapters.methods.check import check_files
print(sum(len(method.rules) + len(method.integers) for method in METHODS.values()))
"""


def test_declarations_need_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, check=True
    )
    known = sum(len(m.rules) + len(m.integers) for m in methods.METHODS.values())
    assert int(done.stdout) == known
