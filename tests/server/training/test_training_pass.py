"""The gradients of adapters, compared with those of PEFT on the served weights, on both paths."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.bases.tiny_models import ARCHITECTURES, MIXTURES, OTHER_ARCHITECTURES
from builders.methods import ALL, make_config, save_adapter
from counted_steps import listed_launches
from gradient_oracle import Base, check, texts_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from turret.kernels.rows import transposed_in_pieces
from turret.server.training.training_pass import Segment, TrainingPass, largest_pass

METHODS = (
    *("lora", "rslora", "dora", "kasa", "bd_lora", "velora", "monteclora", "loha", "lokr", "ia3"),
    *("beft", "vera", "pvera", "delora", "miss", "gralora", "hra", "oft", "boft", "road"),
    *("hira", "deft", "peanut", "glora", "shira", "waveft", "prompt_tuning"),
)
GPU_METHODS = ("lora", "dora", "ia3", "loha", "lokr", "oft", "miss", "prompt_tuning")
# Without a GPU, its kernels are interpreted, or not launched on tensors without values.
META = torch.device("meta")
pytestmark = pytest.mark.usefixtures("coarse_tiles")


@pytest.mark.parametrize(
    ("method", "gpu"), [*((m, False) for m in METHODS), *((m, True) for m in GPU_METHODS)]
)
def test_gradients_match_peft(method: str, gpu: bool, tmp_path: Path) -> None:
    base = Base("llama", torch.float32, gpu=gpu)
    peft_model = save_adapter(base.twin.model, make_config(method), tmp_path / "a", strength=0.1)
    check(base, peft_model, base.learner(tmp_path / "a"), texts_of(1), 2e-4)


@pytest.mark.parametrize(
    ("architecture", "gpu"),
    [
        *((name, False) for name in sorted({*ARCHITECTURES, *OTHER_ARCHITECTURES} - {*MIXTURES})),
        *((name, True) for name in sorted({*ARCHITECTURES} - {*MIXTURES})),
    ],
)
def test_gradients_of_every_architecture(architecture: str, gpu: bool, tmp_path: Path) -> None:
    base = Base(architecture, torch.float32, gpu=gpu)
    config = make_config("lora", target_modules=[*ALL, "lm_head", "qkv_proj", "gate_up_proj"])
    peft_model = save_adapter(base.twin.model, config, tmp_path / "a", strength=0.1)
    check(base, peft_model, base.learner(tmp_path / "a"), texts_of(1), 2e-4)


def test_gradients_in_bfloat16(tmp_path: Path) -> None:
    base = Base("llama", torch.bfloat16)
    peft_model = save_adapter(base.twin.model, make_config("dora"), tmp_path / "a", strength=0.1)
    check(base, peft_model, base.learner(tmp_path / "a"), texts_of(1), 3e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_have_the_same_bits_beside_any_others(dtype: torch.dtype, tmp_path: Path) -> None:
    base = Base("llama", dtype)
    methods = ("lora", "dora", "ia3", "loha", "lokr", "oft")
    for number, method in enumerate(methods):
        config = make_config(method)
        save_adapter(base.twin.model, config, tmp_path / method, seed=number, strength=0.1)

    def grads(*names: str) -> dict[str, dict[str, torch.Tensor | None]]:
        work = [(base.learner(tmp_path / name), texts_of(methods.index(name))) for name in names]
        base.run(work)
        return {
            name: {key: p.grad for key, p in learner.parameters.items()}
            for name, (learner, _) in zip(names, work, strict=True)
        }

    together = grads(*methods)
    for name in methods:
        for key, grad in grads(name)[name].items():
            other = together[name][key]
            assert grad is not None
            assert other is not None
            assert torch.equal(grad, other), (name, key)


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
            # The size of the result depends on values.
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
