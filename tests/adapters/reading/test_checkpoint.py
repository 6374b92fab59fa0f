"""Paths, files and values that the reader rejects before it interprets anything."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import (
    edit_config,
    edit_tensors,
    lora_config,
    read_adapter,
    refusal_of,
    refused_fields,
    tiny_llama,
)
from builders.methods import save_adapter
from said import says

from turret.server.adapters.adapter import CONFIG_FILE, TENSORS_FILE
from turret.server.adapters.checkpoint.reader import DTYPES, all_finite
from turret.server.errors import AdapterCheckpointError, BudgetExceededError

Q = "model.layers.0.self_attn.q_proj"
PREFIX = "base_model.model."


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with one good adapter, ``a``."""
    save_adapter(tiny_llama(), lora_config(), tmp_path / "a")
    return tmp_path


# Paths


@pytest.mark.parametrize(
    "path", ["", "..", "../a", "a/../../a", "/etc", "a/..", "a\\b", "a\0b", "a\nb", "x" * 2000]
)
def test_paths_outside_the_root_are_refused(root: Path, path: str) -> None:
    error = refusal_of(root, path)
    assert error.violations[0][0] == "path"


def test_a_missing_directory_a_file_and_a_fifo_are_refused(root: Path) -> None:
    assert says("NO_SUCH_PATH")(refusal_of(root, "nothing"))
    assert says("NOT_A_DIRECTORY")(refusal_of(root, f"a/{CONFIG_FILE}"))
    (root / "loop").symlink_to(root / "loop")
    assert says("NO_SUCH_PATH")(refusal_of(root, "loop"))
    (root / "a" / TENSORS_FILE).unlink()
    os.mkfifo(root / "a" / TENSORS_FILE)
    assert says("NOT_A_FILE")(refusal_of(root))


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "model.pth"])
def test_pickles_are_refused_by_name(root: Path, name: str) -> None:
    (root / "a" / TENSORS_FILE).rename(root / "a" / name)
    error = refusal_of(root)
    assert error.violations[0][0] == name
    assert says("PICKLE")(error)


# The safetensors file


def write_raw(root: Path, header: Any, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    (root / "a" / TENSORS_FILE).write_bytes(struct.pack("<Q", size) + text + data)


def entry(shape: list[Any], begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BAD_FILES: dict[str, Callable[[Path], Any]] = {
    "too short": lambda root: (root / "a" / TENSORS_FILE).write_bytes(b"abc"),
    "header length": lambda root: write_raw(root, {}, b"", length=1 << 60),
    "past the end": lambda root: write_raw(root, {}, b"", length=100),
    "not json": lambda root: write_raw(root, b"{nope", b""),
    "not utf-8": lambda root: write_raw(root, b'{"\xff": 1}', b""),
    "a list": lambda root: write_raw(root, [], b""),
    "nested": lambda root: write_raw(root, b'{"a":' + b"[" * 200_000, b""),
    "twice": lambda root: write_raw(
        root, b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', b"1234"
    ),
    "dtype": lambda root: write_raw(root, {"a": entry([4], 0, 4, "F8_E4M3")}, b"1234"),
    "dtype type": lambda root: write_raw(root, {"a": entry([4], 0, 4, [])}, b"1234"),
    "wrong size": lambda root: write_raw(root, {"a": entry([2], 0, 4)}, b"1234"),
    "negative": lambda root: write_raw(root, {"a": entry([-1, -1], 0, 4)}, b"1234"),
    "huge": lambda root: write_raw(root, {"a": entry([1 << 40], 0, 1 << 42)}, b"1234"),
    "many dims": lambda root: write_raw(root, {"a": entry([1] * 5, 0, 4)}, b"1234"),
    "bool shape": lambda root: write_raw(root, {"a": entry([True], 0, 4)}, b"1234"),
    "float offset": lambda root: write_raw(root, {"a": entry([1], 0, 4.0)}, b"1234"),
    "extra key": lambda root: write_raw(root, {"a": {**entry([1], 0, 4), "x": 1}}, b"1234"),
    "hole": lambda root: write_raw(root, {"a": entry([1], 4, 8)}, b"12345678"),
    "overlap": lambda root: write_raw(
        root, {"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, b"1234"
    ),
    "trailing": lambda root: write_raw(root, {"a": entry([1], 0, 4)}, b"12345678"),
    "truncated": lambda root: write_raw(root, {"a": entry([2], 0, 8)}, b"1234"),
    "metadata": lambda root: write_raw(
        root, {"__metadata__": 3, "a": entry([1], 0, 4)}, b"1234"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_FILES)
def test_malformed_tensor_files_are_refused_before_any_tensor_is_read(
    root: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    BAD_FILES[kind](root)
    monkeypatch.setattr(torch, "frombuffer", lambda *a, **k: pytest.fail("read a tensor"))
    with pytest.raises(AdapterCheckpointError) as caught:
        read_adapter(root)
    assert caught.value.violations[0][0] == TENSORS_FILE


def test_the_size_limit_is_checked_before_any_tensor_is_read(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = sum(t.numel() for t in read_adapter(root).tensors.values())
    assert read_adapter(root, max_elements=total)
    monkeypatch.setattr(torch, "frombuffer", lambda *a, **k: pytest.fail("read a tensor"))
    with pytest.raises(BudgetExceededError, check=says("OVER_HOST_MEMORY")) as caught:
        read_adapter(root, max_elements=total - 1)
    assert caught.value.metadata["elements"] == str(total)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_every_tensor_with_nan_or_inf_is_named(root: Path, value: float) -> None:
    names = [f"{PREFIX}{Q}.lora_{side}.weight" for side in "AB"]

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        for name in names:
            tensors[name].view(-1)[-1] = value

    edit_tensors(root / "a", poison)
    assert refused_fields(root) == set(names)


def test_tensors_do_not_alias_the_file(root: Path) -> None:
    checkpoint = read_adapter(root)
    before = {name: tensor.clone() for name, tensor in checkpoint.tensors.items()}
    path = root / "a" / TENSORS_FILE
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert all(torch.equal(before[name], t) for name, t in checkpoint.tensors.items())


def test_digest_covers_config_and_weights_and_nothing_else(root: Path) -> None:
    digest = read_adapter(root).digest
    config = json.loads((root / "a" / CONFIG_FILE).read_text())
    reordered = dict(reversed(list(config.items())))
    (root / "a" / CONFIG_FILE).write_text(json.dumps(reordered, indent=7))
    (root / "a" / "README.md").write_text("changed")
    assert read_adapter(root).digest == digest
    edit_config(root / "a", lora_alpha=11)
    changed = read_adapter(root).digest
    assert changed != digest
    edit_config(root / "a", lora_alpha=config["lora_alpha"])
    assert read_adapter(root).digest == digest
    path = root / "a" / TENSORS_FILE
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 0x80]))  # the sign of the last weight
    assert read_adapter(root).digest not in (digest, changed)
    path.write_bytes(content)
    assert read_adapter(root).digest == digest


def test_two_spellings_of_one_tensor_are_refused(root: Path) -> None:
    name = f"{PREFIX}{Q}.lora_A.weight"
    twin = f"{PREFIX}{Q}.lora_A.default.weight"
    edit_tensors(root / "a", lambda tensors: {**tensors, twin: tensors[name].clone()})
    assert says("DUPLICATE_TENSOR")(refusal_of(root))


@pytest.mark.parametrize("escape", [r"\ud800", r"\uDC00 x", r"\udc00\ud800"])
@pytest.mark.parametrize(
    ("key", "template"),
    [
        ("base_model_name_or_path", '"%s"'),
        ("rank_pattern", '{"%s": 4}'),
        ("target_modules", '["q_proj", "%s"]'),
        ("loftq_config", '{"a": [[{"b": "%s"}]]}'),
    ],
)
def test_half_a_surrogate_pair_is_refused_by_key(
    root: Path, key: str, template: str, escape: str
) -> None:
    config = json.loads((root / "a" / CONFIG_FILE).read_text())
    config.pop(key, None)
    text = json.dumps(config)[:-1] + f', "{key}": {template % escape}}}'
    (root / "a" / CONFIG_FILE).write_text(text)
    error = refusal_of(root)
    assert [field for field, _ in error.violations] == [CONFIG_FILE]
    assert says("JSON_HALF_CHARACTER", key=key)(error)


def test_half_a_surrogate_pair_in_a_key_or_a_tensors_name_is_refused(root: Path) -> None:
    write_raw(root, rb'{"\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234")
    assert says("JSON_HALF_CHARACTER")(refusal_of(root))
    (root / "a" / CONFIG_FILE).write_text(r'{"r": 1, "\udfff": 2}')
    assert says("JSON_HALF_CHARACTER")(refusal_of(root))


def test_a_complete_surrogate_pair_is_accepted(root: Path) -> None:
    edit_config(root / "a", base_model_name_or_path="org/🦙 äöü")
    assert r"\ud83e" in (root / "a" / CONFIG_FILE).read_text()
    assert read_adapter(root).config["base_model_name_or_path"] == "org/🦙 äöü"


@pytest.mark.parametrize("key", ["base_model_name_or_path", "revision"])
def test_names_have_a_maximum_length(root: Path, key: str) -> None:
    edit_config(root / "a", **{key: "x" * 512})
    assert read_adapter(root).config[key] == "x" * 512
    edit_config(root / "a", **{key: "x" * 513})
    ((field, why),) = refusal_of(root).violations
    assert (field, why.reason, why.params["found"]) == (key, "TOO_MANY_CHARACTERS", 513)


def test_keys_have_a_maximum_length(root: Path) -> None:
    edit_config(root / "a", **{"k" * 513: 1})
    error = refusal_of(root)
    assert error.violations[0][0] == CONFIG_FILE
    assert says("JSON_KEY_TOO_LONG")(error)
    assert len(str(error)) < 300


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"r": NaN}', '{"r": 1, "r": 2}', "\ufeff{}", "x" * (1 << 21)]
)
def test_malformed_configs_are_refused(root: Path, text: str) -> None:
    (root / "a" / CONFIG_FILE).write_text(text)
    assert refusal_of(root).violations[0][0] == CONFIG_FILE


# A NaN or Inf is found at any position; the largest finite values are accepted.


@pytest.mark.parametrize(
    "dtype", [d for name in DTYPES.values() if (d := getattr(torch, name)).is_floating_point]
)
@pytest.mark.parametrize("size", [1, 2, 7, 63, 64, 65, 1000])
def test_a_non_finite_value_is_found_at_every_position(dtype: torch.dtype, size: int) -> None:
    limits = torch.finfo(dtype)
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensor[0], tensor[-1] = limits.max, limits.min
    assert all_finite(tensor)
    for place in range(size):
        for value in (float("nan"), float("inf"), float("-inf")):
            changed = tensor.clone()
            changed[place] = value
            assert not all_finite(changed), (place, value)


def test_shapes_do_not_matter() -> None:
    assert all_finite(torch.empty(0, 3))
    assert all_finite(torch.tensor(1.0))
    assert not all_finite(torch.tensor(float("nan")))
    assert not all_finite(torch.full((3, 4), float("inf")).T[1:])
