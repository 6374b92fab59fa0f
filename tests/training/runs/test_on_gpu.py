"""What a run does on a GPU, tested without one: its choices per card and its restored states."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.optim.adamw import PagedAdamW8bit
from builders.training import resolve_tiny
from torch.utils._python_dispatch import TorchDispatchMode

from turret.training import engine
from turret.training.base_model import find_base, load_model
from turret.training.memory import estimate_memory
from turret.training.mixture import ExpertModules
from turret.training.plan import Plan
from turret.training.run.checkpoint import restore_checkpoint, save_checkpoint

GIB = 1 << 30


@pytest.mark.parametrize(("major", "dtype"), [(7, "float32"), (8, "bfloat16")])
def test_bfloat16_is_not_emulated(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, major: int, dtype: str
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    card = SimpleNamespace(major=major)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    # torch can emulate bfloat16 on every card.
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    base = resolve_tiny(tmp_path, tiny_llama).config.base
    assert (base.device, base.dtype) == ("cuda", dtype)


def on_cuda(folder: Path, model: Path, dtype: str) -> Any:
    resolved = resolve_tiny(folder, model, f"base.dtype={dtype}")
    config = resolved.config
    return replace(resolved, config=replace(config, base=replace(config.base, device="cuda")))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_multiplied_as_fast_as_the_base(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
):
    class LoadedError(Exception):
        pass

    def load(*args: Any) -> None:
        raise LoadedError

    monkeypatch.setattr(engine, "load_model", load)
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, dtype == "float32"
    try:
        with pytest.raises(LoadedError):
            engine.attach(on_cuda(tmp_path, tiny_llama, dtype))
        assert matmul.allow_tf32 is (dtype != "float32")
    finally:
        matmul.allow_tf32 = before


def test_the_estimate_includes_the_memory_of_cuda(tiny_llama: Path, tmp_path: Path):
    resolved = on_cuda(tmp_path, tiny_llama, "bfloat16")
    estimate = estimate_memory(resolved)
    assert estimate.process == GIB
    # torch reports only its own memory, without that of the CUDA process.
    plan = Plan(resolved, (), estimate)
    assert "+0.0%" in plan.compared(estimate.total - GIB)


class PagingOptimizer(PagedAdamW8bit):
    """Records the optimizer states whose memory can be moved to the host."""

    def __init__(self, parameter: torch.nn.Parameter) -> None:
        super().__init__([parameter], lr=1e-2)
        self.paged: list[torch.Tensor] = []

    def get_state_buffer(self, p: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        self.paged.append(torch.zeros_like(p, dtype=dtype))
        return self.paged[-1]


def test_states_are_paged_again_after_a_resume(tmp_path: Path):
    def run(steps: int, parameter: torch.nn.Parameter, optimizer: PagingOptimizer) -> None:
        for _ in range(steps):
            parameter.grad = parameter.detach().sin()
            optimizer.step()

    torch.manual_seed(0)
    first = torch.nn.Parameter(torch.randn(64, 128))
    second = torch.nn.Parameter(torch.zeros(64, 128))
    before, after = PagingOptimizer(first), PagingOptimizer(second)
    run(2, first, before)
    save_checkpoint(tmp_path, 2, {"a": first}, before)
    run(2, first, before)
    (path,) = tmp_path.iterdir()
    assert restore_checkpoint(path, {"a": second}, after) == 2
    states = after.state[second]
    assert [states["state1"], states["state2"]] == after.paged
    run(2, second, after)
    assert torch.equal(first, second)


def test_a_run_continues_with_fewer_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    parameters = {"a": torch.nn.Parameter(torch.zeros(4))}
    optimizer = torch.optim.AdamW(parameters.values())
    states = [torch.tensor([n], dtype=torch.uint8) for n in range(2)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    save_checkpoint(tmp_path, 1, parameters, optimizer)
    found: dict[int, int] = {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, device: found.update({device: int(state)})
    )
    restore_checkpoint(next(tmp_path.iterdir()), parameters, optimizer)
    assert found == {0: 0}


class Operations(TorchDispatchMode):
    """The operations that run within the context."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_experts_wait_once_for_the_device(tiny_model: Any):
    """Operations whose result has a size that only the device knows make the host wait."""
    folder = tiny_model("qwen3_moe")
    model = load_model(find_base(folder), "nf4-dense", torch.float32, "cpu")
    experts = next(m for m in model.modules() if isinstance(m, ExpertModules))
    x = torch.randn(5, model.config.hidden_size)
    chosen = torch.tensor([[0, 2], [2, 0], [1, 2], [4, 0], [2, 4]])
    weights = torch.rand(5, 2)
    with Operations() as operations, torch.no_grad():
        found = experts(x, chosen, weights)
    assert not operations.names & {"nonzero", "_local_scalar_dense", "masked_select", "bincount"}
    for row in range(5):
        alone = [experts._one(int(e), x[row : row + 1])[0] for e in chosen[row]]
        exact = sum(w * y for w, y in zip(weights[row], alone, strict=True))
        torch.testing.assert_close(found[row], exact)
