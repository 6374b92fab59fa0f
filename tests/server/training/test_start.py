"""The tensors with which training starts, compared with those of PEFT."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import peft
import pytest
import torch
from builders.methods import ALL, copy_of, quiet
from gradient_oracle import Base, check, texts_of
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file

from turret.server.models.describe import describe_base
from turret.server.training import METHODS, AdamParams, LearnerConfig
from turret.server.training.learner import Learner, new_adapter, num_bytes

PREFIX = "base_model.model."


def started(base: Base, method: str, rank: int = 4, targets: Sequence[str] = ALL) -> Learner:
    """An adapter in training on every linear module."""
    described = describe_base(base.decoder, base.source)
    modules = [name for name in described.modules if name.rpartition(".")[2] in targets]
    config = LearnerConfig(method=method, rank=rank, seed=1, alpha=6.0)
    size = num_bytes(config, modules, described)
    learner = Learner(*new_adapter(config, modules, described), described)
    # The parameters, their gradients and moments.
    assert size >= 16 * sum(p.numel() for p in learner.parameters.values())
    return learner


@pytest.mark.parametrize("method", METHODS)
def test_training_starts_as_in_peft(method: str, tmp_path: Path) -> None:
    base = Base("llama", torch.float32)
    learner = started(base, method)
    learner.save(tmp_path, with_optimizer=False)
    keys = json.loads((tmp_path / "adapter_config.json").read_text())
    config = PEFT_TYPE_TO_CONFIG_MAPPING[keys["peft_type"]](**keys)
    with quiet():
        # PEFT's own start with the config that the server has written.
        theirs = peft.get_peft_model(copy_of(base.twin.model), config)
        expected = peft.get_peft_model_state_dict(theirs)
    ours = load_file(tmp_path / "adapter_model.safetensors")
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        found = ours[name]
        assert found.shape == tensor.shape, name
        if "magnitude" in name:
            torch.testing.assert_close(found, tensor.float())
        elif tensor.unique().numel() == 1:
            assert found.equal(tensor), name
        else:
            # Both are random, with zero mean.
            assert found.std() == pytest.approx(tensor.std().item(), rel=0.35), name
            assert found.abs().max() == pytest.approx(tensor.abs().max().item(), rel=0.5), name
    with quiet():
        peft.set_peft_model_state_dict(theirs, ours)
        ids = torch.tensor([texts_of(1)[0]])
        with torch.no_grad():
            own, plain = theirs(input_ids=ids).logits, base.twin.model(input_ids=ids).logits
    if method != "prompt_tuning":
        # The new adapter does not change the answers of the base yet.
        torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-4)
    check(base, theirs, learner, texts_of(1), 2e-3)


@pytest.mark.parametrize("method", METHODS)
def test_steps_are_those_of_torch(method: str) -> None:
    """One call changes all tensors, with the same bits as torch's changes of one at a time."""
    base = Base("llama", torch.bfloat16)
    learner = started(base, method, rank=3)
    theirs = [p.detach().clone().requires_grad_() for p in learner.parameters.values()]
    adam = AdamParams(learning_rate=3e-2, weight_decay=0.1, grad_clip_norm=0.5)
    optimizer = torch.optim.AdamW(
        theirs, lr=3e-2, betas=(adam.beta1, adam.beta2), eps=adam.eps, weight_decay=0.1, fused=True
    )
    for step in range(3):
        base.run([(learner, texts_of(step))])
        for own, parameter in zip(theirs, learner.parameters.values(), strict=True):
            assert parameter.grad is not None
            own.grad = parameter.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(theirs, adam.grad_clip_norm)
        optimizer.step()
        # ``run`` has collected the gradients. The step collects them again, so reset them first.
        for parameter in learner.parameters.values():
            assert parameter.grad is not None
            parameter.grad.zero_()
        assert learner.step(adam) == {"grad_norm": float(norm)}
        for own, parameter in zip(theirs, learner.parameters.values(), strict=True):
            assert torch.equal(own, parameter)


def test_the_feedforward_modules_of_ia3_scale_their_inputs() -> None:
    base = Base("llama", torch.float32)
    learner = started(base, "ia3", targets=("k_proj", "down_proj"))
    assert learner.config["feedforward_modules"] == ["down_proj"]
    shapes = {name.split(".")[-2]: p.shape for name, p in learner.parameters.items()}
    module = base.twin.model.model.layers[0]
    assert shapes["down_proj"] == (1, module.mlp.down_proj.in_features)
    assert shapes["k_proj"] == (module.self_attn.k_proj.out_features, 1)
