"""Adapters to fuse on a tiny model, the fused files, and PEFT's own weighted adapters."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import base_of, linear_modules, tiny_llama
from builders.methods import load_adapter, make_config, quiet, save_adapter
from builders.registries import WAIT_SECONDS
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from turret.server.adapters.adapter import AdapterRef
from turret.server.adapters.base import Allowed
from turret.server.adapters.combination import Combination, FuseResult
from turret.server.adapters.fuser import Fuser
from turret.server.adapters.module_fuser import FusedModule, ModuleFuser
from turret.server.adapters.registry import AdapterRegistry
from turret.server.adapters.state_dir import StateDir
from turret.server.basics.work import Cancellation
from turret.server.errors import TurretError

TENSORS = "adapter_model.safetensors"
Deltas = Mapping[str, torch.Tensor]


@functools.cache
def model() -> LlamaForCausalLM:
    return tiny_llama()


class Fusions:
    """A registry with its own adapters and a directory for fused ones."""

    def __init__(
        self,
        directory: Path,
        *,
        base: LlamaForCausalLM | None = None,
        dtype: torch.dtype | None = None,
        host_bytes: int = 1 << 28,
        max_rank: int = 64,
        max_upload_bytes: int | None = 1 << 24,
    ) -> None:
        """Without ``max_upload_bytes``, there is no directory for fused adapters."""
        self.root = directory / "root"
        self.state = directory / "state"
        self.base = base or model()
        self._numbers = itertools.count()
        self.registry = AdapterRegistry(
            self.root,
            base_of(self.base, dtype=dtype),
            host_bytes,
            max_rank,
            state=None if max_upload_bytes is None else StateDir(self.state, max_upload_bytes),
            allowed=Allowed(dense=True),
        )
        self.fuser = Fuser(self.registry, host_bytes=host_bytes, max_rank=max_rank)

    def close(self) -> None:
        self.fuser.close()
        self.registry.close()

    def add(self, name: str, method: str = "lora", seed: int = 1, **changes: Any) -> str:
        """Create an adapter with PEFT and register it; returns its name."""
        save_adapter(self.base, make_config(method, **changes), self.root / name, seed=seed)
        self.registry.load(name, name)
        return name

    def start(
        self,
        mix: Mapping[str, float],
        *,
        how: str = "exact",
        name: str | None = None,
        cancellation: Cancellation | None = None,
        **settings: Any,
    ) -> Future[FuseResult]:
        """Start a fusion under a new name; ``settings`` are those of ``Combination``."""
        return self.fuser.start(
            name or f"fused-{next(self._numbers)}",
            [AdapterRef(name=member, weight=weight) for member, weight in mix.items()],
            Combination(name=how, **settings),
            cancellation or Cancellation(),
        )

    def fuse(self, mix: Mapping[str, float], **settings: Any) -> FuseResult:
        """Start a fusion and wait for the result."""
        return self.start(mix, **settings).result(60)

    def directory(self, result: FuseResult) -> Path:
        """The directory of the result's files."""
        return self.state / "files" / f"{result.record.uuid}.{result.record.generation}"

    def deltas(self, result: FuseResult) -> dict[str, torch.Tensor]:
        """``B A`` for every module in the result's file, fp64; alpha equals the rank there."""
        tensors = load_file(self.directory(result) / TENSORS)
        found = {}
        for name, tensor in tensors.items():
            if name.endswith(".lora_A.weight"):
                path = name.removesuffix(".lora_A.weight")
                b = tensors[f"{path}.lora_B.weight"]
                found[path.removeprefix("base_model.model.")] = b.double() @ tensor.double()
        return found

    def exact(self, mix: Mapping[str, float]) -> dict[str, torch.Tensor]:
        """``Σ w ΔW`` with each member loaded by PEFT, fp64."""
        total: dict[str, torch.Tensor] = {}
        for name, weight in mix.items():
            for path, delta in merged_deltas(self.root / name).items():
                total[path] = total.get(path, torch.zeros(())) + weight * delta
        return total


def merged_deltas(directory: Path) -> dict[str, torch.Tensor]:
    """The change of the weights when an adapter is merged, fp64: PEFT's ΔW for any method."""
    base = tiny_llama().double()
    before = {name: linear.weight.detach().clone() for name, linear in linear_modules(base).items()}
    with quiet():
        merged = load_adapter(base, directory).merge_and_unload()  # type: ignore[operator]
    after = linear_modules(merged)
    deltas = {name: after[name].weight.detach() - weight for name, weight in before.items()}
    return {name: delta for name, delta in deltas.items() if delta.any()}


def peft_weighted(
    root: Path, mix: Mapping[str, float], combination: str, *, seed: int = 0, **options: Any
) -> dict[str, torch.Tensor]:
    """The ΔW of ``add_weighted_adapter``, fp64, by module.

    PEFT draws masks from torch's global generator, which is seeded with ``seed`` after the random
    initialisation of the new adapter.
    """
    names = list(mix)
    with quiet():
        peft_model = PeftModel.from_pretrained(tiny_llama(), str(root / names[0]), names[0])
        for name in names[1:]:
            peft_model.load_adapter(str(root / name), name)
        tuner: Any = peft_model.base_model
        inject = tuner.inject_adapter

        def inject_and_seed(*args: Any) -> None:
            inject(*args)
            torch.manual_seed(seed)

        tuner.inject_adapter = inject_and_seed
        tuner.add_weighted_adapter(
            names, list(mix.values()), "fused", combination_type=combination, **options
        )
    layers: dict[str, Any] = dict(peft_model.get_base_model().named_modules())
    return {
        name: layer.get_delta_weight("fused").detach().double()
        for name, layer in layers.items()
        if hasattr(layer, "lora_A") and "fused" in layer.lora_A
    }


def difference(one: Deltas, other: Deltas) -> float:
    """The norm of the difference relative to that of ``other``, over all modules."""
    assert one.keys() == other.keys()
    error = sum(float((one[name] - other[name]).square().sum()) for name in other)
    return (error / sum(float(delta.square().sum()) for delta in other.values())) ** 0.5


def truncated(deltas: Deltas, rank: int) -> dict[str, torch.Tensor]:
    """The best low-rank approximation of each module, fp64."""
    found = {}
    for name, delta in deltas.items():
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        found[name] = left[:, :rank] * values[:rank] @ right[:rank]
    return found


class Turnstile:
    """Stops fusions at their third module until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()
        self.passed = 0
        fuse = ModuleFuser.fuse

        def watched(fuser: ModuleFuser, *args: Any) -> FusedModule:
            self.passed += 1
            if self.passed == 3:
                self.reached.set()
                assert self.opened.wait(WAIT_SECONDS)
            return fuse(fuser, *args)

        monkeypatch.setattr(ModuleFuser, "fuse", watched)

    def wait(self) -> None:
        assert self.reached.wait(WAIT_SECONDS)


def cancellations(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """An event that is set once any work is cancelled."""
    asked, ask = threading.Event(), Cancellation.set

    def noting(cancellation: Cancellation, error: TurretError) -> None:
        ask(cancellation, error)
        asked.set()

    monkeypatch.setattr(Cancellation, "set", noting)
    return asked
