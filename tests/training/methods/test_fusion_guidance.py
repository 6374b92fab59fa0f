"""The penalty on gates that deviate from the component that, on its own, answers an example best.

The gates are recomputed from dense matrices in float64, and the components' answers by PEFT, one
example at a time without padding. Faults that were planted in ``training/fusion.py``, and how many
tests failed for each: the worst component used as the best (4), another example's component (4),
always the first component (4), padding and positions after the last target counted (3), no guidance
in the penalty (3), rows identified by their tokens without the learned ones (1), or with their
padding (1).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.methods import load_adapter, make_config, save_adapter
from builders.mixes.fusions import fusion_oracle
from builders.training import resolve_tiny, write_jsonl
from method_oracle import prompt_of, twin
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from turret.training.batches import IGNORED, TrainingBatch, make_batch, pack_rows
from turret.training.engine import attach
from turret.training.examples import Encoded
from turret.training.fusion import FusionLoss, FusionModel, read_components
from turret.training.loss import LossFunction
from turret.training.trainer import Trainer
from turret.training.words import ConfigError

GUIDANCE = 0.7
NAMES = ("a", "b")


@dataclass(frozen=True)
class Fused:
    """A fusion with gates that are neither flat nor saturated, and a copy in float64."""

    model: FusionModel
    oracle: Any
    modules: Any
    components: list[Any]

    def loss(self, guidance: float = GUIDANCE) -> FusionLoss:
        head = self.model.get_base_model().get_output_embeddings()
        return FusionLoss(self.model, head, "cpu", guidance)


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Fused:
    root = tmp_path_factory.mktemp("fused")
    base = twin("qwen2").model
    for seed, name in enumerate(NAMES):
        config = make_config("lora", target_modules=["q_proj", "v_proj", "down_proj"])
        save_adapter(base, config, root / name, seed=seed, strength=0.6)
    made = read_components({name: root / name for name in NAMES}, base)
    # Use a separate copy of the base, because fusion layers stay in their model.
    model = FusionModel(load_adapter(base, root / "a").unload(), made, d_k=6)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in model.layers.values():
            layer.key.copy_(torch.randn(layer.key.shape, generator=generator))
    (root / "f").mkdir()
    (root / "f/adapter_config.json").write_text(json.dumps(model.fusion_config()))
    save_file(model.fusion_state(), root / "f/adapter_model.safetensors")
    oracle, modules = fusion_oracle(base, root, "f")
    return Fused(model, oracle, modules, [load_adapter(base, root / name) for name in NAMES])


def examples() -> list[Encoded]:
    """Examples of many lengths; some learn their end, some a middle part."""
    made = []
    for number in range(10):
        tokens = tuple(prompt_of(9 + 5 * number, number))
        start, stop = len(tokens) // 2, len(tokens) - (3 if number % 3 == 0 else 0)
        learned = tuple(start <= i < stop for i in range(len(tokens)))
        made.append(Encoded(tokens, learned))
    return made


@torch.no_grad()
def answer_loss(model: Any, batch: TrainingBatch) -> float:
    """The cross entropy of one example's targets."""
    logits = model(input_ids=batch.tokens).logits[0].double()
    return float(cross_entropy(logits, batch.targets[0], reduction="sum", ignore_index=IGNORED))


def expected_loss(fused: Fused, given: list[Encoded]) -> tuple[float, list[int]]:
    """The loss in float64, and the best component of each example."""
    losses, penalties, best, num_targets = 0.0, [], [], 0
    for example in given:
        batch = make_batch([(example,)], pad=0, is_packed=False)
        alone = [answer_loss(model, batch) for model in fused.components]
        best.append(alone.index(min(alone)))
        for module in fused.modules.values():
            module.gates.clear()
        losses += answer_loss(fused.oracle, batch)
        read = int((batch.targets[0] != IGNORED).nonzero().max()) + 1
        gates = torch.stack([module.gates[0][:read] for module in fused.modules.values()])
        penalties.append(-gates[..., best[-1]].log())
        num_targets += batch.num_targets
    mean = torch.cat(penalties, 1).mean().item()
    assert mean > 0.2
    return losses + GUIDANCE * num_targets * mean, best


@pytest.mark.parametrize("is_packed", [False, True])
def test_the_loss_is_that_of_dense_matrices_and_of_peft(fused: Fused, is_packed: bool) -> None:
    given = examples()
    expected, best = expected_loss(fused, given)
    assert set(best) == {0, 1}
    rows = pack_rows(given, 120) if is_packed else [(example,) for example in given]
    assert not is_packed or len(rows) < len(given) / 2
    loss = fused.loss()
    assert loss(make_batch(rows, pad=0, is_packed=is_packed)).item() == pytest.approx(
        expected, rel=1e-5
    )


def test_targets_are_computed_once_per_example_for_any_padding(fused: Fused) -> None:
    given, loss, calls = examples(), fused.loss(), 0
    ask = loss.of_targets

    def counted(batch: TrainingBatch) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return ask(batch)

    loss.of_targets = counted  # type: ignore[method-assign]
    for pair in ([given[0], given[1]], [given[2], given[9]], [given[9], given[0]], given[:3]):
        expected, _ = expected_loss(fused, pair)
        batch = make_batch([(example,) for example in pair], pad=0, is_packed=False)
        assert loss(batch).item() == pytest.approx(expected, rel=1e-5)
    # Two calls with new examples, for two components each.
    assert calls == 4
    tokens = given[9].tokens
    other = Encoded(
        tokens, tuple(0 < i < 4 or learned for i, learned in enumerate(given[9].learned))
    )
    loss(make_batch([(other,)], pad=0, is_packed=False))
    loss(make_batch([(Encoded(tokens[:20], (False, *[True] * 19)),)], pad=0, is_packed=False))
    assert calls == 8


def test_without_gradient_or_guidance_it_is_the_cross_entropy(fused: Fused) -> None:
    batch = make_batch([(example,) for example in examples()], pad=0, is_packed=False)
    plain = LossFunction(fused.model, fused.model.get_base_model().get_output_embeddings(), "cpu")
    with torch.no_grad():
        assert fused.loss()(batch).item() == plain(batch).item()
    assert fused.loss(0.0)(batch).item() == plain(batch).item()
    assert fused.loss()(batch).item() > 1.01 * plain(batch).item()
    assert all(layer.log_gates is None for layer in fused.model.layers.values())


@pytest.fixture(scope="module")
def run_folder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two adapters, each trained on one half of the examples."""
    folder = tmp_path_factory.mktemp("guided")
    halves = [
        [{"prompt": f"{verb} {number}:", "completion": word} for number in range(12)]
        for verb, word in (("say", "yes"), ("never hum", "no"))
    ]
    write_jsonl(folder / "train.jsonl", [row for pair in zip(*halves, strict=True) for row in pair])
    for name, half in zip(NAMES, halves, strict=True):
        write_jsonl(folder / f"{name}.jsonl", half)
        settings = (f"data.train={name}.jsonl", f"run.output={name}", "run.steps=30")
        Trainer(resolve_tiny(folder, tiny_llama, *settings, "optimizer.learning_rate=0.02")).run()
    return folder


def resolve_fusion(folder: Path, model: Path, *overrides: str) -> Any:
    components = "method.components=['a=a/adapter', 'b=b/adapter']"
    common = ("method.name=learned_fusion", components, "base.dtype=float32")
    return resolve_tiny(folder, model, *common, *overrides)


def mean_best_gate(resolved: Any, model: Any) -> float:
    """The mean probability of the best component's gate over the training examples."""
    loss = resolved.method.loss(model, resolved.config.method, "cpu")
    batch = make_batch(resolved.dataset.train, pad=0, is_packed=False)
    best = loss._best_components(batch)
    assert 0.2 < best.float().mean() < 0.8
    with torch.no_grad(), model.watching_gates() as gates:
        model(input_ids=batch.tokens)
    return float(
        torch.stack(gates).exp().gather(-1, best.expand(len(gates), -1, -1)[..., None]).mean()
    )


def test_guidance_moves_the_gates_to_the_best_component(run_folder: Path, tiny_llama: Path) -> None:
    found = {}
    for guidance in (0.0, 2.0):
        output = f"run.output=guided-{guidance}"
        resolved = resolve_fusion(
            run_folder,
            tiny_llama,
            f"method.guidance={guidance}",
            output,
            "run.steps=30",
            "optimizer.learning_rate=0.02",
        )
        model = attach(resolved)
        before = mean_best_gate(resolved, model)
        assert before == pytest.approx(0.5)
        Trainer(resolved).run()
        saved = load_file(run_folder / f"guided-{guidance}/adapter/adapter_model.safetensors")
        for path, layer in model.layers.items():
            for role, parameter in (("query", layer.query), ("key", layer.key)):
                parameter.data.copy_(saved[f"base_model.model.{path}.fusion_{role}.weight"])
        found[guidance] = mean_best_gate(resolved, model)
    assert found[2.0] > found[0.0] + 0.1


def test_checkpointed_layers_give_the_same_gradients(run_folder: Path, tiny_llama: Path) -> None:
    gradients = []
    for setting in ("false", "true"):
        resolved = resolve_fusion(
            run_folder, tiny_llama, f"run.gradient_checkpointing={setting}", "method.guidance=1.0"
        )
        model = attach(resolved).train()
        batch = make_batch(resolved.dataset.train[:5], pad=0, is_packed=False)
        resolved.method.loss(model, resolved.config.method, "cpu")(batch).backward()
        gradients.append([layer.key.grad for layer in model.layers.values()])
    assert all(grad is not None and grad.abs().max() > 0 for grad in gradients[0])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_negative_guidance_is_refused(run_folder: Path, tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"^method\.guidance: "):
        resolve_fusion(run_folder, tiny_llama, "method.guidance=-0.1")
