"""LoRA's variants by config switch: results of PEFT's own classes, and rejections."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders.adapters import (
    base_of,
    edit_config,
    edit_tensors,
    linear_modules,
    lower_adapter,
    make_qalora,
    read_adapter,
    refused_fields,
    save_tiny,
    tiny_llama,
)
from builders.methods import drawing
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora.variants import QALoraLinearVariant
from said import says

from turret.server.adapters.base import BaseModule
from turret.server.adapters.methods import method_for
from turret.server.adapters.peft_format import reading as dora_gain_module
from turret.server.errors import AdapterMismatchError

Q = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{Q}"


def save_qalora(root: Path, group: int, **changes: Any) -> Path:
    """Save a LoRA with first factors for pooled inputs, which PEFT creates only on GPTQ layers."""
    directory = save_tiny(root, target_modules=["q_proj", "down_proj"], **changes)
    make_qalora(directory, group)
    return directory


@drawing(20)
@given(group=st.sampled_from([1, 2, 8, 32]), rank=st.integers(1, 9), alpha=st.sampled_from([1, 6]))
def test_drawn_qaloras_match_pefts_own_class(group: int, rank: int, alpha: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check_qalora(Path(folder), group, rank, alpha)


def check_qalora(root: Path, group: int, rank: int, alpha: int) -> None:
    model = tiny_llama(dtype=torch.float64)
    save_qalora(root, group, r=rank, lora_alpha=alpha)
    checkpoint = read_adapter(root)
    assert method_for(checkpoint).name == "qalora"
    lowered = lower_adapter(root, base_of(model))
    for path, operators in lowered.operators.modules.items():
        inputs = linear_modules(model)[path].in_features
        factors = [
            SimpleNamespace(weight=checkpoint.tensors[f"{path}.lora_{factor}.weight"].double())
            for factor in "AB"
        ]
        module = SimpleNamespace(
            lora_A={"a": factors[0]},
            lora_B={"a": factors[1]},
            lora_dropout={"a": torch.nn.Identity()},
            scaling={"a": alpha / rank},
            qalora_group_size={"a": group},
            training=False,
            in_features=inputs,
        )
        x = torch.randn(2, 5, inputs, dtype=torch.float64)
        zero = torch.zeros(2, 5, len(factors[1].weight), dtype=torch.float64)
        expected = QALoraLinearVariant.forward(module, active_adapter="a", x=x, result=zero)  # type: ignore[arg-type]
        assert operators.low_rank is not None
        found = x @ operators.low_rank.a.T @ operators.low_rank.b
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert expected.abs().max() > 0.01
    assert len(lowered.operators.modules) == 4


def test_qalora_groups_must_divide_the_inputs(tmp_path: Path) -> None:
    directory = save_qalora(tmp_path, 8)
    edit_config(directory, qalora_group_size=7)
    with pytest.raises(AdapterMismatchError, check=says("NOT_DIVISIBLE", by=7)):
        lower_adapter(tmp_path, base_of(tiny_llama()))
    edit_config(directory, qalora_group_size=...)
    assert refused_fields(tmp_path) == {"qalora_group_size"}


def test_tensors_used_only_in_training_are_dropped_and_need_their_key(tmp_path: Path) -> None:
    base = base_of(tiny_llama())
    for method, key, part in (
        ("velora", "velora_config", "lora_velora_embed"),
        ("monteclora", "monteclora_config", "lora_monteclora_sampler.std_prior"),
    ):
        # Use one module, because PEFT takes a while to create MonteCLoRA's sampler.
        directory = save_tiny(tmp_path, method, target_modules=["layers.0.self_attn.q_proj"])
        checkpoint = read_adapter(tmp_path)
        assert f"{Q}.{part}" in checkpoint.tensors
        assert method_for(checkpoint).name == "lora"
        (module,) = lower_adapter(tmp_path, base).operators.modules.values()
        low_rank = module.low_rank
        assert low_rank is not None
        assert torch.equal(low_rank.a, checkpoint.tensors[f"{Q}.lora_A.weight"])
        assert torch.equal(low_rank.b.T, checkpoint.tensors[f"{Q}.lora_B.weight"] * 1.5)
        edit_config(directory, **{key: None})
        assert f"{Q}.{part}" in refused_fields(tmp_path)


@pytest.mark.parametrize("key", ["use_qalora", "use_bdlora", "kasa_config", "velora_config"])
def test_variants_cannot_be_combined(key: str, tmp_path: Path) -> None:
    directory = save_tiny(tmp_path, "dora", target_modules=["q_proj"])
    values = {"use_qalora": True, "use_bdlora": {"nblocks": 1, "match_strict": False}}
    if key == "kasa_config":
        diagonals = {
            KEY.replace("layers.0", f"layers.{n}") + ".lora_diag": torch.ones(4) for n in (0, 1)
        }
        edit_tensors(directory, lambda tensors: {**tensors, **diagonals})
    edit_config(directory, **{key: values.get(key, {})})
    if key.endswith("_config"):
        edit_config(directory, **{key: {"beta": 1.0} if key[0] == "k" else {"scale": 1.0}})
    assert key in refused_fields(tmp_path)


def test_kasa_needs_its_diagonal_and_a_rank_below_the_weights(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path, "kasa", target_modules=["k_proj"])
    edit_tensors(directory, lambda t: {n: x for n, x in t.items() if "lora_diag" not in n})
    assert refused_fields(tmp_path) == {
        f"model.layers.{layer}.self_attn.k_proj.lora_diag" for layer in (0, 1)
    }
    save_tiny(tmp_path, "lora", r=32, target_modules=["k_proj"])
    edit_config(directory, kasa_config={"beta": 1e-4, "gamma": 1e-3})

    def add_diagonal(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        more = {n.replace("lora_A.weight", "lora_diag"): torch.ones(32) for n in tensors}
        return {**{n: t for n, t in more.items() if "lora_diag" in n}, **tensors}

    edit_tensors(directory, add_diagonal)
    with pytest.raises(AdapterMismatchError, check=says("NOT_IN_RANGE", most=31, value=32)):
        lower_adapter(tmp_path, base_of(tiny_llama()))


def test_block_diagonal_factors_must_fit_their_config(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path, "bd_lora")
    lists = {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["q_proj"]}
    for value in ({"nblocks": 3}, {"nblocks": 2, **lists}, {"nblocks": 2, "match": 1}, True):
        edit_config(directory, use_bdlora=value)
        # Without a list of names, the factors are not blocked.
        fields = refused_fields(tmp_path)
        assert "use_bdlora" in fields or f"{Q}.lora_B.weight" in fields


def test_a_conv1d_flag_warns(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path)
    base = base_of(tiny_llama())
    assert lower_adapter(tmp_path, base).warnings == ()
    edit_config(directory, fan_in_fan_out=True)
    (warning,) = lower_adapter(tmp_path, base).warnings
    assert warning.reason == "NO_CONV1D"


class _Rows:
    """A weight that is read where it is, as on a device whose steps must not be delayed."""

    def __init__(self, weight: torch.Tensor, beside: list[bool], most: int) -> None:
        self.shape, self.dtype, self.device = weight.shape, weight.dtype, weight.device
        self._weight, self._beside, self._most = weight, beside, most

    def __getitem__(self, rows: slice) -> torch.Tensor:
        assert self._beside, "on the stream of the steps"
        assert rows.stop - rows.start <= self._most, "more than a block"
        return self._weight[rows]


# A decomposition needs the whole weight, DoRA's norms only blocks of it.
@pytest.mark.parametrize(("kind", "most"), [("dora", 24), ("kasa", 1 << 20), ("osf", 1 << 20)])
def test_the_base_is_read_in_blocks_on_its_device_beside_the_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, most: int
) -> None:
    monkeypatch.setattr(dora_gain_module, "_ROWS_PER_BLOCK", 24)
    save_tiny(tmp_path, kind)
    plain, beside = base_of(tiny_llama()), list[bool]()

    @contextlib.contextmanager
    def entered() -> Iterator[None]:
        beside.append(True)
        yield
        beside.clear()

    def copied() -> torch.Tensor:
        raise AssertionError("a whole weight on the host")

    def by_blocks(module: BaseModule) -> BaseModule:
        weight = module.dequantize()
        return replace(module, dequantize=copied, served=lambda: _Rows(weight, beside, most))

    modules = {name: by_blocks(module) for name, module in plain.modules.items()}
    found = lower_adapter(tmp_path, replace(plain, modules=modules, beside=entered)).operators
    expected = lower_adapter(tmp_path, plain).operators
    for name, module in expected.modules.items():
        assert module.operators
        for operator, other in zip(module.operators, found.modules[name].operators, strict=True):
            for one, two in zip(operator.tensors(), other.tensors(), strict=True):
                torch.testing.assert_close(two, one)


def test_a_weight_is_decomposed_on_the_host_if_the_device_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path, "kasa")
    base, svd = base_of(tiny_llama()), torch.linalg.svd
    expected = lower_adapter(tmp_path, base).operators.modules[Q].low_rank
    refused = list[int]()

    def second_try(weight: torch.Tensor, **keywords: Any) -> Any:
        if len(refused) % 2 == 0:
            refused.append(0)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        refused.append(1)
        return svd(weight, **keywords)

    monkeypatch.setattr(torch.linalg, "svd", second_try)
    found = lower_adapter(tmp_path, base).operators.modules[Q].low_rank
    assert refused
    assert expected is not None
    assert found is not None
    torch.testing.assert_close(found.a, expected.a)
    torch.testing.assert_close(found.b, expected.b)
