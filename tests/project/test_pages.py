"""Pages match the code: their generated tables, and the names and numbers in them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import base_of, linear_modules, lower_adapter, tiny_llama
from builders.methods import make_config, save_adapter
from checkout import ROOT
from pages import operations
from pages.adapter_costs import cost_cells
from pages.generated import PAGES, with_part
from peft import PeftType
from safetensors.torch import load_file, save_file

from turret.server import errors
from turret.server.adapters.checkpoint import adapter_root
from turret.server.adapters.methods.loha import highest_rank
from turret.server.api import checkpoints, futures, limits
from turret.server.api import tenants as sessions
from turret.server.api.admin import MAX_UPLOADS
from turret.server.api.uploads import IDLE_SECONDS, MAX_CHUNK_BYTES, UPLOAD_FILES
from turret.server.api.violations import MAX_VIOLATIONS
from turret.server.http.tinker import ROUTES, wire
from turret.server.metrics import MAX_ADAPTER_LABELS
from turret.training.examples import read_examples
from turret.training.words import DataError
from turret.v1 import adapters_pb2

ADAPTERS, LIFECYCLE, OPERATIONS, SECURITY, TENANTS = (
    (ROOT / "docs" / f"{name}.md").read_text()
    for name in ("adapters", "lifecycle", "operations", "security", "tenants")
)
# Rendering this part takes long, because it writes an adapter of every method.
LONG = ("docs/adapters.md", "costs")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        pytest.param(path, name, marks=pytest.mark.long if (path, name) == LONG else ())
        for path, parts in PAGES.items()
        for name in parts
    ],
)
def test_a_generated_part_matches_the_code(path: str, name: str) -> None:
    page = (ROOT / path).read_text(encoding="utf-8")
    assert page == with_part(page, name, PAGES[path][name]()), "run `make pages`"


def test_some_costs_match_the_operators() -> None:
    """Checks the cheapest method of each operator."""
    names = ("lora", "loha", "lokr", "c3a", "oft", "road", "ia3", "glora", "supertuning", "osf")
    for name, cells in cost_cells(names).items():
        rows = [line for line in ADAPTERS.splitlines() if line.endswith(cells)]
        assert any(f"`{name}`" in row for row in rows), (name, "run `make pages`")


def test_the_loha_bounds_on_the_page_are_correct() -> None:
    assert "width 576 up to rank 16, of width 4096 up to rank 45" in " ".join(ADAPTERS.split())
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


def test_every_type_of_peft_is_on_the_page() -> None:
    assert [kind for kind in PeftType if f"| `{kind.value}` | " not in ADAPTERS] == []


def test_every_error_that_is_raised_is_explained() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    kinds = [kind for kind in kinds if issubclass(kind, errors.TurretError)]
    leaves = [kind for kind in kinds if not kind.__subclasses__()]
    assert {kind.__name__ for kind in leaves} <= operations.meanings().keys()


def test_the_numbers_on_the_page_are_correct() -> None:
    page = " ".join(f"{OPERATIONS} {LIFECYCLE} {SECURITY}".split())
    assert (MAX_UPLOADS, IDLE_SECONDS) == (8, 60.0)
    assert "may pause for one minute" in page
    assert "At most 8 uploads" in page
    assert f"first {MAX_ADAPTER_LABELS} registered adapters" in page


def test_the_calls_on_the_page_exist() -> None:
    service = adapters_pb2.DESCRIPTOR.services_by_name["Adapters"]
    named = set(re.findall(r"`(\w+Adapters?)`", LIFECYCLE))
    assert len(named) >= 7
    assert named <= set(service.methods_by_name)


def test_every_test_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`(tests/[\w/.]+)(?:::(\w+))?`", SECURITY))
    assert len(named) > 40
    for path, test in named:
        assert (ROOT / path).exists(), path
        if test:
            assert f"def {test}(" in (ROOT / path).read_text(), f"{path}::{test}"


def test_limits_that_are_written_twice_are_equal() -> None:
    assert adapter_root.MAX_PATH_CHARS == limits.MAX_PATH_CHARS
    assert len(UPLOAD_FILES) == limits.MAX_UPLOAD_FILES
    assert MAX_CHUNK_BYTES == 1 << 20
    assert f"lists at most {MAX_VIOLATIONS} violations" in SECURITY


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_the_files_it_names_exist(page: str) -> None:
    named = set(
        re.findall(
            r"`((?:server|kernels|clients|fleet|training|tests|bench)/[\w/.]+)`",
            (ROOT / page).read_text(),
        )
    )
    assert len(named) > 30
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_every_call_is_listed() -> None:
    for route in ROUTES:
        assert f"`{route.method} {route.path}`" in TENANTS, route.path


def test_the_limits_match_the_code() -> None:
    assert f"{sessions.MAX_SESSIONS} sessions" in TENANTS
    assert f"{sessions.MAX_MODELS} models" in TENANTS
    assert f"{sessions.MAX_SAMPLERS} samplers" in TENANTS
    assert f"{checkpoints.MAX_CHECKPOINTS} checkpoints" in TENANTS
    assert f"{futures.MAX_FUTURES:,} results" in TENANTS
    assert (sessions.SESSION_SECONDS, futures.RESULT_SECONDS) == (300.0, 600.0)
    for loss in wire.LOSSES:
        assert f"`{loss}`" in TENANTS


def test_the_error_on_the_page_is_about_that_line_and_field(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^error: /data/(train\.jsonl:7: \S+: )", page, re.MULTILINE)
    roles = [{"role": role, "content": "a"} for role in ("user", "assistant", "tool")]
    path = tmp_path / "train.jsonl"
    path.write_text("\n" * 6 + json.dumps({"messages": roles}), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_examples(path)
    assert str(caught.value).startswith(f"{tmp_path}/{shown}")
