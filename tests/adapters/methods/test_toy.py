"""A method is one file: one written here, in a folder of the test, is discovered and served."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from method_oracle import check_greedy, prompt_of, twin
from safetensors.torch import save_file
from servers.engine_harness import EngineHarness, make_request

from turret.server.adapters import methods

TOY = '''
"""Output flip: ``y = s ⊙ (W x)`` with a sign per output channel."""

import torch

from turret.server.adapters.peft_format.rules import COMMON_RULES
from turret.server.adapters.lowering.finish import finish_modules
from turret.server.adapters.peft_format.module_checkpoint import (
    ModuleFormat,
    read_module_checkpoint,
)
from turret.server.adapters.operators import ModuleOperators
from turret.server.adapters.peft_format.selection_rules import SELECTION_RULES


def _check(name, roles, module, rank, findings):
    findings.check_shape(f"{name}.sign", roles["sign"], (module.out_features,))


class FlipMethod:
    name = "flip"
    peft_types = frozenset({"FLIP"})
    rules = SELECTION_RULES
    form = ModuleFormat(rules=rules, roles={".sign": "sign"}, check=_check, rank_key=None)

    def accepts(self, config):
        return True

    def lower(self, checkpoint, base, max_rank=None):
        found = read_module_checkpoint(checkpoint, base, self.form)
        operators = {
            name: ModuleOperators(gain=roles["sign"].to(torch.float32))
            for name, roles in found.modules.items()
        }
        return finish_modules(
            operators, base, checkpoint.path, ranks=(), base_model="", warnings=()
        )


METHOD = FlipMethod()
'''


async def test_a_method_in_one_file_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "more_methods"
    folder.mkdir()
    (folder / "flip.py").write_text(TOY)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(folder)])
    monkeypatch.setattr(methods, "METHODS", methods._discover())
    assert "flip" in methods.METHODS

    base = twin("llama")
    root = tmp_path / "adapters"
    (root / "a").mkdir(parents=True)
    paths = [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)]
    signs = torch.where(torch.arange(128) % 3 == 0, -1.0, 1.0)
    config = {"peft_type": "FLIP", "target_modules": ["down_proj"]}
    (root / "a" / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {f"base_model.model.{path}.sign": signs.clone() for path in paths},
        root / "a" / "adapter_model.safetensors",
    )
    oracle = copy.deepcopy(base.model)
    with torch.no_grad():
        for path in paths:
            oracle.get_submodule(path).weight.mul_(signs[:, None])
    prompt = prompt_of(9)
    async with EngineHarness.start(base.folder, root, adapters=["a"]) as harness:
        answer = await harness.run(make_request(prompt, "a"))
        plain = await harness.run(make_request(prompt))
        assert harness.registry.get("a").method == "flip"
    check_greedy(answer, oracle, prompt, "flip")
    assert plain.token_ids != answer.token_ids
