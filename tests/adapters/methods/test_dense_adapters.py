"""Adapters of whole matrices: rejected unless allowed, and counted against the budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import base_of, lower_adapter, tiny_llama
from builders.facts import resident
from builders.methods import make_config, save_adapter
from method_oracle import prompt_of, serve, twin
from peft import LoHaConfig, LoKrConfig
from safetensors.torch import save_file
from said import says
from servers.engine_harness import make_request
from torch.utils._python_dispatch import TorchDispatchMode

from turret.kernels.cpu import library
from turret.server.adapters.adapter import Source
from turret.server.adapters.base import Allowed, BaseModel, BaseModule, BaseVocabulary
from turret.server.adapters.device import ProjectionLayout, SliceShape, StepMembers
from turret.server.adapters.device.cpu import CpuStore
from turret.server.adapters.device.reference import ReferenceStore
from turret.server.adapters.loader import AdapterLoader
from turret.server.errors import BudgetExceededError
from turret.server.models.decoding.adapted_linear import AdaptedLinear

# Methods and changes to their configs; each adapts two modules in both layers.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "FOURIERFT": ("fourierft", {}),
    "RANDLORA": ("randlora", {}),
    "OSF": ("osf", {}),
    "FROD": ("frod", {}),
    "MISS": ("miss", {"init_weights": "bat"}),
}
TARGETS = {"target_modules": ["gate_proj", "up_proj"]}
# Two modules in two layers, 64 -> 128, in fp32.
NEEDED = 2 * 2 * 64 * 128 * 4


def loader(
    root: Path, kind: str, host_bytes: int = 1 << 30, allowed: Allowed | None = None
) -> AdapterLoader:
    method, changes = KINDS[kind]
    save_adapter(tiny_llama(), make_config(method, **TARGETS, **changes), root / "a")
    base = base_of(tiny_llama())
    if allowed is None:
        return AdapterLoader(root, base, host_bytes, 128)
    return AdapterLoader(root, base, host_bytes, 128, allowed=allowed)


@pytest.mark.parametrize("kind", KINDS)
def test_dense_adapters_are_refused_with_the_flag_and_their_size(kind: str, tmp_path: Path) -> None:
    reader = loader(tmp_path, kind)
    with pytest.raises(BudgetExceededError) as caught:
        reader.lower(reader.read(Source("a")))
    assert says("DENSE_NOT_ALLOWED", method=kind, flag="--allow-dense-adapters")(caught.value)
    assert caught.value.metadata["bytes"] == str(NEEDED)


@pytest.mark.parametrize("kind", KINDS)
def test_allowed_dense_adapters_report_their_size(kind: str, tmp_path: Path) -> None:
    reader = loader(tmp_path, kind, allowed=Allowed(dense=True))
    loaded = reader.lower(reader.read(Source("a")))
    assert loaded.operators.num_bytes == loaded.facts.bytes_host == NEEDED
    warnings: Any = loaded.facts.warnings
    assert [t.params for t in warnings if t.reason == "LARGE_UPDATES"] == [{"bytes": NEEDED}]


def test_dense_updates_over_the_host_budget_are_never_built(
    tmp_path: Path, monkeypatch: Any
) -> None:
    reader = loader(tmp_path, "FOURIERFT", NEEDED - 1, Allowed(dense=True))
    monkeypatch.setattr("torch.fft.ifft2", lambda *_: pytest.fail("the update was built"))
    with pytest.raises(BudgetExceededError, check=says("OVER_HOST_MEMORY", bytes=NEEDED)):
        reader.lower(reader.read(Source("a")))


def test_low_rank_factors_need_no_permission(tmp_path: Path) -> None:
    save_adapter(tiny_llama(), make_config("miss", **TARGETS), tmp_path / "a")
    reader = AdapterLoader(tmp_path, base_of(tiny_llama()), 1 << 30, 128)
    loaded = reader.lower(reader.read(Source("a")))
    warnings: Any = loaded.facts.warnings
    assert "LARGE_UPDATES" not in [warning.reason for warning in warnings]


async def test_dense_adapters_count_against_the_device_budget(tmp_path: Path) -> None:
    base = twin("qwen2")
    for name in ("first", "second"):
        config = make_config("fourierft", target_modules=["q_proj"])
        save_adapter(base.model, config, tmp_path / name, seed=len(name))
    async with serve(base, tmp_path, adapters=["first", "second"]) as harness:
        needed = harness.registry.get("first").facts.bytes_host
        assert needed > 1 << 12
    budget = needed + needed // 2
    async with serve(
        base, tmp_path, adapters=["first", "second"], adapter_device_bytes=budget
    ) as harness:
        requests = [make_request(prompt_of(5), name) for name in ("first", "second")]
        answers = await harness.run_all(requests)
        assert answers[0].token_ids != answers[1].token_ids
        on_device = [harness.registry.get(name).bytes_device for name in ("first", "second")]
        assert sorted(on_device) == [0, needed]
    async with serve(base, tmp_path, adapter_device_bytes=needed // 2) as harness:
        with pytest.raises(BudgetExceededError, check=says("OVER_DEVICE_MEMORY", bytes=needed)):
            harness.registry.load("first", "first")


# LoHa and LoKr at a real size: neither loading nor serving makes a tensor as large as a weight.


SIZE = 2048
NAME = "model.layers.0.self_attn.o_proj"
ROWS = 6


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements in a result of any torch operation."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def base(dtype: torch.dtype) -> BaseModel:
    def dequantize() -> torch.Tensor:
        raise AssertionError("the base weight is not needed")

    return BaseModel(
        name="big",
        model_type="llama",
        digest="0" * 64,
        dtype=dtype,
        modules={NAME: BaseModule(NAME, SIZE, SIZE, None, dequantize)},
        other_modules=frozenset(),
        vocabulary=BaseVocabulary(torch.zeros(1, SIZE), torch.zeros(1, SIZE), is_tied=False),
        num_layers=1,
        hidden_size=SIZE,
        num_kv_heads=8,
        head_dim=64,
    )


def write(directory: Path, config: Any, tensors: dict[str, torch.Tensor]) -> None:
    directory.mkdir(parents=True)
    config = {k: v if not isinstance(v, set) else sorted(v) for k, v in config.to_dict().items()}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    named = {f"base_model.model.{NAME}.{role}": tensor for role, tensor in tensors.items()}
    save_file(named, directory / "adapter_model.safetensors")


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape) / shape[-1] ** 0.5


FACTORED: dict[str, tuple[Any, dict[str, tuple[int, int]]]] = {
    "loha": (
        LoHaConfig(r=8, alpha=8, target_modules=["o_proj"]),
        {
            "hada_w1_a": (SIZE, 8),
            "hada_w1_b": (8, SIZE),
            "hada_w2_a": (SIZE, 8),
            "hada_w2_b": (8, SIZE),
        },
    ),
    "lokr": (
        LoKrConfig(r=64, alpha=64, target_modules=["o_proj"]),
        {"lokr_w1": (32, 32), "lokr_w2": (64, 64)},
    ),
    # The second factor has a quarter of the weight's size in each dimension, so its own factors are
    # kept.
    "lokr-factors": (
        LoKrConfig(r=8, alpha=8, decompose_factor=4, target_modules=["o_proj"]),
        {"lokr_w1": (4, 4), "lokr_w2_a": (512, 8), "lokr_w2_b": (8, 512)},
    ),
}


def dense_delta(kind: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    if kind == "loha":
        w1a, w1b, w2a, w2b = tensors.values()
        return (w1a @ w1b) * (w2a @ w2b)
    second = tensors.get("lokr_w2")
    if second is None:
        second = tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]
    return torch.kron(tensors["lokr_w1"], second)


STORES = [
    pytest.param(ReferenceStore, torch.float32, 1e-4, id="torch"),
    pytest.param(
        *(CpuStore, torch.bfloat16, 2e-2),
        id="cpu",
        marks=pytest.mark.skipif(library() is None, reason="there is no C compiler"),
    ),
]


@pytest.mark.parametrize(("store", "dtype", "bound"), STORES)
@pytest.mark.parametrize("kind", FACTORED)
def test_no_tensor_is_as_large_as_a_weight(
    kind: str, store: Any, dtype: torch.dtype, bound: float, tmp_path: Path
) -> None:
    config, shapes = FACTORED[kind]
    tensors = {role: random(*shape) for role, shape in shapes.items()}
    write(tmp_path / "a", config, tensors)
    x = random(ROWS, SIZE).to(dtype)
    layout = ProjectionLayout(1, {"o": (SliceShape("self_attn.o_proj", SIZE, SIZE),)})
    nothing: Any = lambda x, ahead: torch.zeros_like(x)  # noqa: E731
    with LargestTensor() as largest:
        operators = lower_adapter(tmp_path, base(dtype)).operators
        pack = store(layout, dtype, torch.device("cpu"), 1 << 30)
        pack.prepare([resident("a", operators)])
        # Half of the rows are single rows, half of them form a segment.
        half = ROWS // 2
        members = StepMembers([[("a", 1.0)]] * half, [(half, ROWS, [("a", 1.0)])])
        y = AdaptedLinear(0, "o", nothing, None)(x, pack.step(members))
    expected = x.float() @ dense_delta(kind, tensors).T
    assert float((y.float() - expected).abs().max()) < bound * float(expected.abs().max())
    # A quarter of a weight's elements would already be a tile of ΔW.
    assert largest.elements <= SIZE * SIZE // 8, largest.elements
    stored = sum(tensor.numel() for tensor in tensors.values())
    assert operators.num_bytes <= 4 * stored


def test_a_dense_update_is_detected() -> None:
    with LargestTensor() as largest:
        dense = random(SIZE, 8) @ random(8, SIZE)
    assert largest.elements == dense.numel() == SIZE * SIZE
