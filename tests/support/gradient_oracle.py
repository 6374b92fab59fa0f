"""Adapters in training on tiny models, and PEFT's gradients of the same adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from builders.adapters import read_adapter
from builders.methods import quiet
from method_oracle import prompt_of, twin

from turret.server.adapters.device.cpu import CpuStore
from turret.server.adapters.device.reference import ReferenceStore
from turret.server.models.decoding.decoder import Decoder
from turret.server.models.describe import describe_base, describe_projections
from turret.server.models.loader import load_decoder
from turret.server.models.model_source import ModelSource, resolve_model
from turret.server.models.sources.check import default_cache_dir
from turret.server.training.learner import Learner
from turret.server.training.training_pass import Segment, TrainingPass

LENGTHS = (37, 6, 12)
CPU = torch.device("cpu")


class Base:
    """A tiny model as it is served, on the gpu path or on a path for CPUs."""

    def __init__(
        self,
        architecture: str,
        dtype: torch.dtype,
        *,
        gpu: bool = False,
        device: torch.device = CPU,
    ) -> None:
        self.twin = twin(architecture, dtype)
        self.source: ModelSource = resolve_model(self.twin.folder, default_cache_dir())
        self.decoder: Decoder = load_decoder(self.source, dtype=dtype, device=device, gpu=gpu)
        self.layout = describe_projections(self.decoder.arch)
        kind = CpuStore if dtype == torch.bfloat16 and not gpu else ReferenceStore
        self.store = kind(self.layout, dtype, device, 1 << 30)

    def learner(self, folder: Path) -> Learner:
        checkpoint = read_adapter(folder.parent, folder.name)
        # Alongside an adapter of the head, PEFT saves the base's own weights.
        tensors = {n: each for n, each in checkpoint.tensors.items() if ".base_layer." not in n}
        return Learner(checkpoint.config, tensors, describe_base(self.decoder, self.source))

    def run(self, work: Sequence[tuple[Learner, list[list[int]]]]) -> list[float]:
        """Return each learner's mean loss, and set the gradients of its parameters."""
        segments = [Segment(learner.served, learner.leaves, texts) for learner, texts in work]
        losses = []
        with torch.no_grad():
            one = TrainingPass(self.decoder, self.layout, self.store, segments)
            one.forward()
            grad = torch.zeros(one.hidden.shape)
            for number, (_, texts) in enumerate(work):
                # The last token of a text has no target.
                targets = torch.tensor([token for text in texts for token in [*text[1:], 0]])
                weights = torch.tensor(
                    [1.0 * (n > 0) for t in texts for n in reversed(range(len(t)))]
                )
                weights /= weights.sum()
                _, parts, grad[one.rows[number]] = one.targets(
                    number, targets, lambda rows, lp, weights=weights: -weights[rows] * lp
                )
                losses.append(float(parts.sum()))
            one.backward(grad)
        for learner, _ in work:
            learner.collect()
        return losses


def mean_loss(logits: Sequence[torch.Tensor], texts: Sequence[Sequence[int]]) -> torch.Tensor:
    total = torch.zeros(())
    for rows, text in zip(logits, texts, strict=True):
        targets = torch.tensor(text[1:])
        total = total + torch.nn.functional.cross_entropy(rows[:-1], targets, reduction="sum")
    return total / sum(len(text) - 1 for text in texts)


def texts_of(seed: int) -> list[list[int]]:
    return [prompt_of(length, seed + n) for n, length in enumerate(LENGTHS)]


def canonical(name: str) -> str:
    if name.startswith("prompt_encoder."):
        return "prompt_embeddings"
    return name.replace("base_model.model.", "").replace(".default", "").removesuffix(".weight")


def check(base: Base, peft_model: Any, learner: Learner, texts: list[list[int]], tolerance: float):
    (loss,) = base.run([(learner, texts)])
    peft_model.train(False)
    with quiet():
        expected = mean_loss(
            # The positions of soft tokens come first.
            [peft_model(input_ids=torch.tensor([text])).logits[0, -len(text) :] for text in texts],
            texts,
        )
        expected.backward()
    assert abs(loss - expected.item()) <= tolerance * abs(expected.item()), (loss, expected)
    theirs = {
        canonical(name): p.grad
        for name, p in peft_model.named_parameters()
        if p.requires_grad and p.grad is not None
    }
    assert theirs
    ours = {canonical(name): p.grad for name, p in learner.parameters.items()}
    missing = theirs.keys() - ours.keys()
    assert not missing, sorted(missing)[:4]
    for name, grad in theirs.items():
        own = ours[name]
        assert own is not None, name
        error = (own.reshape(-1) - grad.reshape(-1)).norm() / (grad.norm() + 1e-6)
        assert error <= tolerance, (name, error, own.norm(), grad.norm())
