"""LoHa and LoKr at a real size: neither loading nor serving makes a tensor like the weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import lower_adapter
from builders.facts import resident
from peft import LoHaConfig, LoKrConfig
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from turret.kernels.cpu.native import library
from turret.server.adapters.base import BaseModel, BaseModule, BaseVocabulary
from turret.server.adapters.device.cpu.store import CpuStore
from turret.server.adapters.device.reference import ReferenceStore
from turret.server.adapters.device.store import ProjectionLayout, SliceShape, StepMembers
from turret.server.models.decoding.adapted_linear import AdaptedLinear

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


KINDS: dict[str, tuple[Any, dict[str, tuple[int, int]]]] = {
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
@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_is_as_large_as_a_weight(
    kind: str, store: Any, dtype: torch.dtype, bound: float, tmp_path: Path
) -> None:
    config, shapes = KINDS[kind]
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
