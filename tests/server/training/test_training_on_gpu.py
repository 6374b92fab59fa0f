"""Training on the gpu path: its gradients, and which device each operation uses.

Without a GPU, its kernels are interpreted, or not launched on tensors without values.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.bases.tiny_models import ARCHITECTURES, MIXTURES
from builders.methods import ALL, make_config, save_adapter
from counted_steps import listed_launches
from gradient_oracle import Base, check, texts_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from turret.kernels.rows.linear import transposed_in_pieces
from turret.server.training.training_pass import Segment, TrainingPass, largest_pass

META = torch.device("meta")
pytestmark = pytest.mark.usefixtures("coarse_tiles")
METHODS = ("lora", "dora", "ia3", "loha", "lokr", "oft", "miss", "prompt_tuning")


@pytest.mark.parametrize("method", METHODS)
def test_gradients_match_peft(method: str, tmp_path: Path) -> None:
    base = Base("llama", torch.float32, gpu=True)
    peft_model = save_adapter(base.twin.model, make_config(method), tmp_path / "a", strength=0.1)
    check(base, peft_model, base.learner(tmp_path / "a"), texts_of(1), 2e-4)


@pytest.mark.parametrize("architecture", sorted({*ARCHITECTURES} - {*MIXTURES}))
def test_gradients_of_architectures(architecture: str, tmp_path: Path) -> None:
    base = Base(architecture, torch.float32, gpu=True)
    config = make_config("lora", target_modules=[*ALL, "lm_head", "qkv_proj", "gate_up_proj"])
    peft_model = save_adapter(base.twin.model, config, tmp_path / "a", strength=0.1)
    check(base, peft_model, base.learner(tmp_path / "a"), texts_of(1), 2e-4)


def test_small_gradients_are_kept_in_float16() -> None:
    """Most of these numbers are below the smallest number of float16."""
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(70, 48, generator=generator) * 1e-9
    grad[3] = 0.0
    weight = torch.randn(48, 32, generator=generator).half()
    exact = grad.double() @ weight.double()
    found = transposed_in_pieces(grad, weight)
    assert found.dtype == torch.float32
    assert not found[3].any()
    assert float((found - exact).norm() / exact.norm()) < 1e-3


class _OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of two devices, which CUDA refuses too.

    Copies between devices are allowed, and so are indices and single numbers from the host.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "nonzero" and args[0].device == META:
            # Its size depends on values.
            return torch.zeros(args[0].numel(), args[0].dim(), dtype=torch.int64, device=META)
        if name not in ("copy_", "_to_copy", "index", "index_put_"):
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            devices = {t.device for t in tensors if t.dim() or t.device == META}
            assert len(devices) <= 1, (name, devices)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gemma2", "granite", "ministral3"])
def test_a_pass_mixes_no_devices(architecture: str, tmp_path: Path) -> None:
    with_values = Base(architecture, torch.float16, gpu=True)
    base = Base(architecture, torch.float16, gpu=True, device=META)
    config = make_config("lora", target_modules=[*ALL, "lm_head", "qkv_proj", "gate_up_proj"])
    save_adapter(base.twin.model, config, tmp_path / "a")
    save_adapter(base.twin.model, make_config("dora"), tmp_path / "b")
    save_adapter(base.twin.model, make_config("prompt_tuning"), tmp_path / "c")
    segments = []
    for number, name in enumerate("abc"):
        learner = with_values.learner(tmp_path / name)
        segments.append(Segment(learner.served, learner.fresh_leaves(META), texts_of(number)))
    with torch.no_grad(), listed_launches(), _OneDevice():
        one = TrainingPass(base.decoder, base.layout, base.store, segments)
        one.forward()
        grad = torch.zeros(one.hidden.shape, device=META)
        for number, segment in enumerate(segments):
            targets = torch.zeros(sum(map(len, segment.tokens)), dtype=torch.int64, device=META)
            logprobs, losses, grad[one.rows[number]] = one.targets(
                number, targets, lambda rows, logprobs: -logprobs
            )
            assert {logprobs.device, losses.device} == {META}
        one.backward(grad)
        largest_pass(base.decoder, base.layout, base.store)()
    grads = [
        leaf.grad
        for segment in segments
        for leaf in itertools.chain(*segment.leaves.values())
        if leaf.grad is not None
    ]
    assert len(grads) > 2 * len(segments)
    assert {grad.device for grad in grads} == {META}
