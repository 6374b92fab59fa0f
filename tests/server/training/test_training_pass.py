"""The gradients of adapters, compared with those of PEFT on the served weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders.bases.tiny_models import ARCHITECTURES, MIXTURES, OTHER_ARCHITECTURES
from builders.methods import ALL, make_config, save_adapter
from gradient_oracle import Base, check, texts_of

METHODS = (
    *("lora", "rslora", "dora", "kasa", "bd_lora", "velora", "monteclora", "loha", "lokr", "ia3"),
    *("beft", "vera", "pvera", "delora", "miss", "gralora", "hra", "oft", "boft", "road"),
    *("hira", "deft", "peanut", "glora", "shira", "waveft", "prompt_tuning"),
)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_match_peft(method: str, tmp_path: Path) -> None:
    base = Base("llama", torch.float32)
    peft_model = save_adapter(base.twin.model, make_config(method), tmp_path / "a", strength=0.1)
    check(base, peft_model, base.learner(tmp_path / "a"), texts_of(1), 2e-4)


@pytest.mark.parametrize(
    "architecture", sorted({*ARCHITECTURES, *OTHER_ARCHITECTURES} - {*MIXTURES})
)
def test_gradients_of_every_architecture(architecture: str, tmp_path: Path) -> None:
    base = Base(architecture, torch.float32)
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
