"""docs/adapters.md matches the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import base_of, linear_modules, lower_adapter, tiny_llama
from builders.methods import make_config, save_adapter
from checkout import ROOT
from pages.adapter_costs import ELSEWHERE, cost_rows
from pages.adapters_page import COSTS, PAGE, rendered
from peft import PeftType
from safetensors.torch import load_file, save_file

from turret.server.adapters.methods import METHODS
from turret.server.adapters.methods.structured.loha import highest_rank


def test_the_tables_match_the_code() -> None:
    page = PAGE.read_text()
    assert page == rendered(page), "run `make pages`"


@pytest.mark.long
def test_the_costs_match_the_operators() -> None:
    page = PAGE.read_text()
    assert page == rendered(page, COSTS), "run `make pages`"


def test_some_costs_match_the_operators() -> None:
    """Checks the cheapest method of each operator."""
    names = ("lora", "loha", "lokr", "c3a", "oft", "road", "ia3", "glora", "supertuning", "osf")
    lines = set(PAGE.read_text().splitlines())
    for name, row in cost_rows(names).items():
        assert row in lines, (name, "run `make pages`")


def test_the_page_lists_the_cost_of_every_method() -> None:
    page = PAGE.read_text()
    table = page.partition("<!-- generated: costs -->")[2].partition("<!-- end: costs -->")[0]
    told = set(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE))
    assert told | ELSEWHERE == METHODS.keys()
    assert not told & ELSEWHERE


def test_the_loha_bounds_on_the_page_are_correct() -> None:
    assert "width 576 up to rank 16, of width 4096 up to rank 45" in " ".join(
        PAGE.read_text().split()
    )
    assert (highest_rank(576, 576), highest_rank(4096, 4096)) == (16, 45)


def _converter() -> Any:
    page = (ROOT / "docs" / "bring-your-adapter.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (code,) = (block for block in blocks if "convert_lycoris" in block)
    scope: dict[str, Any] = {}
    exec(code, scope)
    return scope["convert_lycoris"]


@pytest.mark.parametrize(
    ("method", "changes", "is_whole"),
    [
        ("loha", {"r": 3, "alpha": 5}, False),
        ("lokr", {"r": 2, "alpha": 3}, False),
        ("lokr", {"r": 2, "alpha": 3, "decompose_both": True}, False),
        ("lokr", {"r": 32, "alpha": 3}, True),
    ],
)
def test_the_converter_on_the_page_preserves_the_adapters_function(
    method: str, changes: dict[str, Any], is_whole: bool, tmp_path: Path
) -> None:
    model = tiny_llama()
    base = base_of(model)
    save_adapter(model, make_config(method, **changes), tmp_path / "peft")
    flat: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(tmp_path / "peft" / "adapter_model.safetensors").items():
        path, _, role = name.removeprefix("base_model.model.").rpartition(".")
        prefix = "lycoris_" + path.replace(".", "_")
        flat[f"{prefix}.{role}"] = tensor
        # LyCORIS ignores alpha if both factors are whole.
        flat[f"{prefix}.alpha"] = torch.tensor(float(changes["alpha"]))
    save_file(flat, tmp_path / "lycoris.safetensors")
    paths = list(linear_modules(model))
    _converter()(tmp_path / "lycoris.safetensors", tmp_path / "a", paths, base.name)
    before = lower_adapter(tmp_path, base, "peft").operators.modules
    after = lower_adapter(tmp_path, base).operators.modules
    assert before.keys() == after.keys() == set(paths)
    for path in paths:
        tensors = list(zip(before[path].tensors(), after[path].tensors(), strict=True))
        # The scale is in the first factor.
        scale = changes["r"] / changes["alpha"] if is_whole else 1.0
        torch.testing.assert_close(tensors[0][0] * scale, tensors[0][1])
        assert all(torch.equal(one, other) for one, other in tensors[1:])


def test_every_type_is_on_the_page() -> None:
    page = PAGE.read_text()
    for kind in PeftType:
        assert f"| `{kind.value}` | " in page, kind
    for name in METHODS:
        assert f"` | {name} | " in page, name
