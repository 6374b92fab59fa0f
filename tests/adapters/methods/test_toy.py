"""A method is one file: one written here, in a folder of the test, is discovered and served."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import base_of, read_adapter, tiny_llama
from method_oracle import check_greedy, prompt_of, twin
from safetensors.torch import save_file
from servers.engine_harness import EngineHarness, make_request

from turret.server.adapters import methods
from turret.server.adapters.source import CONFIG_FILE, TENSORS_FILE
from turret.server.errors import BudgetExceededError

TOY = '''
"""Output flip: ``y = s ⊙ (W x)`` with a sign per output channel."""

import torch

from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.lowered import Method
from turret.server.adapters.operators.adapter_operators import ModuleOperators
from turret.server.adapters.peft_format.module_checkpoint import (
    ModuleFormat,
    read_module_checkpoint,
)
from turret.server.adapters.peft_format.config.selection_rules import SELECTION_RULES


def _check(name, roles, module, rank, findings):
    findings.check_shape(f"{name}.sign", roles["sign"], (module.out_features,))


FORMAT = ModuleFormat(
    rules=SELECTION_RULES, roles={".sign": "sign"}, check=_check, rank_key=None
)


def lower(checkpoint, base, max_rank=None, *_):
    found = read_module_checkpoint(checkpoint, base, FORMAT, max_rank)
    operators = {
        name: ModuleOperators(gain=roles["sign"].to(torch.float32))
        for name, roles in found.modules.items()
    }
    return finish(checkpoint, base, operators, found=found, depends_on_base=False)


METHOD = Method("flip", {"FLIP"}, SELECTION_RULES, lower)
'''

# It says nothing about the server's limit on ranks.
RANKED_TOY = '''
"""Two factors without a scale."""

from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.low_rank import fold
from turret.server.adapters.lowering.lowered import Method
from turret.server.adapters.operators.adapter_operators import ModuleOperators
from turret.server.adapters.peft_format.module_checkpoint import (
    ModuleFormat,
    read_module_checkpoint,
)
from turret.server.adapters.peft_format.config.selection_rules import (
    PATTERN_RULES,
    RANK,
    SELECTION_RULES,
)

RULES = {**SELECTION_RULES, **PATTERN_RULES, "r": RANK}


def _check(name, roles, module, rank, findings):
    findings.check_shape(f"{name}.down", roles["down"], (rank, module.in_features))
    findings.check_shape(f"{name}.up", roles["up"], (module.out_features, rank))


FORMAT = ModuleFormat(
    rules=RULES, roles={".down": "down", ".up": "up"}, check=_check, has_patterns=True
)


def lower(checkpoint, base, max_rank=None, *_):
    found = read_module_checkpoint(checkpoint, base, FORMAT, max_rank)
    operators = {
        name: ModuleOperators(fold(roles["down"], roles["up"], 1.0, base.dtype))
        for name, roles in found.modules.items()
    }
    return finish(checkpoint, base, operators, found=found, depends_on_base=False)


METHOD = Method("plain", {"PLAIN"}, RULES, lower)
'''


def serve(name: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a method into a folder that methods are discovered in."""
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
    serve("flip", TOY, tmp_path, monkeypatch)
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
    async with EngineHarness.start(base.folder, root, adapters=["a"]) as harness:
        answer = await harness.run(make_request(prompt, "a"))
        plain = await harness.run(make_request(prompt))
        assert harness.registry.get("a").facts.method == "flip"
    check_greedy(answer, oracle, prompt, "flip")
    assert plain.token_ids != answer.token_ids


def test_a_method_cannot_forget_the_limit_on_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve("plain", RANKED_TOY, tmp_path, monkeypatch)
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
    name, lowered = methods.lower_checkpoint(checkpoint, base, 5)
    assert (name, lowered.ranks) == ("plain", (2, 5))
    with pytest.raises(BudgetExceededError, match="rank 5, the server allows 4"):
        methods.lower_checkpoint(checkpoint, base, 4)
