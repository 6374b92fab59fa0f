"""The fusion layer in training: the paper's formula, its gradients, and serving of the result."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from builders.adapters import linear_modules, read_adapter
from builders.methods import make_config, save_adapter
from builders.mixes.fusions import DenseFusion
from builders.training import resolve_tiny, write_jsonl, write_words
from method_oracle import check_score, oracle_logprobs, prompt_of, serve, twin
from safetensors.torch import save_file
from said import says
from servers.engine_harness import EngineHarness, make_request
from torch import nn

from turret.server.adapters.operators.low_rank import LowRank
from turret.server.errors import AdapterCheckpointError
from turret.training.engine import attach
from turret.training.fusion import FusionLayer, FusionModel, read_components
from turret.training.settings.resolve import Resolved
from turret.training.trainer import Trainer
from turret.training.words import ConfigError

INNER, OUT, D_K = 24, 16, 5


def layers() -> tuple[FusionLayer, DenseFusion]:
    """The layer in float64, and the same function with dense updates; one component is absent."""
    torch.manual_seed(0)
    base = nn.Linear(INNER, OUT).double()
    updates = [
        LowRank(torch.randn(3, INNER), torch.randn(3, OUT) / 4),
        None,
        LowRank(torch.randn(8, INNER), torch.randn(8, OUT) / 4),
    ]
    layer = FusionLayer(base, updates, D_K).double()
    with torch.no_grad():
        layer.key.copy_(torch.randn(D_K, OUT) / 4)
    deltas = torch.stack(
        [torch.zeros(OUT, INNER) if u is None else u.b.double().T @ u.a.double() for u in updates]
    ).double()
    query, key = (t.detach().clone().requires_grad_() for t in (layer.query, layer.key))
    return layer, DenseFusion(base, deltas, query, key)


def test_values_and_gradients_are_those_of_the_dense_formula() -> None:
    layer, dense = layers()
    x = torch.randn(2, 7, INNER, dtype=torch.float64, requires_grad=True)
    twin_x = x.detach().clone().requires_grad_()
    y, expected = layer(x), dense(twin_x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    assert dense.gates[0].std(0).min() > 0.05
    toward = torch.randn_like(y)
    (y * toward).sum().backward()
    (expected * toward).sum().backward()
    pairs = ((layer.query, dense._query), (layer.key, dense._key), (x, twin_x))
    for found, wanted in pairs:
        assert found.grad is not None
        assert wanted.grad is not None
        assert wanted.grad.abs().max() > 1e-3
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-9, atol=1e-10)


def test_training_starts_from_the_mean_of_the_components() -> None:
    layer, dense = layers()
    with torch.no_grad():
        layer.key.zero_()
    x = torch.randn(4, INNER, dtype=torch.float64)
    mean = dense._deltas.mean(0)
    torch.testing.assert_close(layer(x), dense._base(x) + x @ mean.T)


def save(model: FusionModel, directory: Path) -> None:
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(model.fusion_config()))
    save_file(model.fusion_state(), directory / "adapter_model.safetensors")


async def test_the_served_fusion_computes_what_was_trained(tmp_path: Path) -> None:
    base = twin("qwen2")
    for name, method in (("a", "lora"), ("b", "adalora")):
        config = make_config(method, target_modules=["q_proj", "v_proj", "down_proj"])
        save_adapter(base.model, config, tmp_path / name, seed=len(method), strength=0.4)
    directories = {name: tmp_path / name for name in "ab"}
    model = FusionModel(copy.deepcopy(base.model), read_components(directories, base.model), d_k=6)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(model.layers) == 2 * 3 * 2
    optimizer = torch.optim.Adam(trained, lr=0.05)
    tokens = torch.tensor([prompt_of(40)])
    losses = []
    for _ in range(6):
        logits = model(input_ids=tokens).logits[0, :-1]
        loss = nn.functional.cross_entropy(logits, tokens[0, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.98 * losses[0]
    save(model, tmp_path / "f")
    model.eval()
    plain = oracle_logprobs(base.model, prompt_of(30, 1))
    assert (oracle_logprobs(model, prompt_of(30, 1)) - plain).abs().max() > 0.05
    with model.disable_adapter():
        assert torch.equal(oracle_logprobs(model, prompt_of(30, 1)), plain)
    async with serve(base, tmp_path, adapters=["a", "b", "f"]) as harness:
        prompt = prompt_of(30, 1)
        answer = await harness.run(make_request(prompt, "f", score=True))
        check_score(answer, model, prompt, "trained")


def trained(folder: Path, model: Path, name: str, *overrides: str) -> Resolved:
    """Train for some steps into ``folder/name``, in float32."""
    resolved = resolve_tiny(
        folder,
        model,
        "base.dtype=float32",
        "run.adapter_dtype=float32",
        "run.steps=6",
        "optimizer.learning_rate=0.02",
        f"run.output={name}",
        *overrides,
    )
    Trainer(resolved).run()
    return resolved


@pytest.fixture(scope="module")
def components(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished runs, ``a`` and ``b``, each on one half of the words."""
    folder = tmp_path_factory.mktemp("components")
    rows = [json.loads(line) for line in write_words(folder / "all").read_text().splitlines()]
    for name, half in (("a", rows[::2]), ("b", rows[1::2])):
        write_jsonl(folder / f"{name}.jsonl", half)
        targets = "method.targets=['q_proj', 'v_proj', 'down_proj']"
        trained(folder, tiny_llama, name, f"data.train={name}.jsonl", targets)
    write_jsonl(folder / "train.jsonl", rows)
    return folder


BOTH = "method.components=['a=a/adapter', 'b=b/adapter']"


async def test_the_trainer_trains_a_fusion(components: Path, tiny_llama: Path) -> None:
    # Every step sees all examples, so that losses are comparable; the loss is only the cross
    # entropy.
    overrides = ("method.name=learned_fusion", BOTH, "method.guidance=0", "run.batch_size=24")
    resolved = trained(components, tiny_llama, "f", *overrides, "run.steps=10")
    rows = [json.loads(line) for line in (components / "f/metrics.jsonl").read_text().splitlines()]
    steps = [row["loss"] for row in rows if row["kind"] == "step"]
    validations = [row["loss"] for row in rows if row["kind"] == "validation"]
    assert steps[-1] < 0.95 * steps[0]
    assert validations[-1] < 0.95 * validations[0]
    text = (components / "f/samples.jsonl").read_text()
    samples = [json.loads(line) for line in text.splitlines()]
    assert samples
    assert any(sample["before"] != sample["after"] for sample in samples)
    facts = json.loads((components / "f/adapter/provenance.json").read_text())
    digests = {name: read_adapter(components, f"{name}/adapter").digest for name in "ab"}
    assert facts["config"]["method"]["components"] == digests
    async with EngineHarness.start(tiny_llama, components) as harness:
        for name in "abf":
            harness.registry.load(name, f"{name}/adapter")
        total, count = 0.0, 0
        for (example,) in resolved.dataset.validation:
            answer = await harness.run(make_request(example.tokens, "f", score=True))
            pairs = zip(example.learned, answer.prompt_logprobs, strict=True)
            found = [logprob for learned, logprob in pairs if learned and logprob is not None]
            total, count = total - sum(found), count + len(found)
    assert total / count == pytest.approx(validations[-1], rel=1e-4)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("method.d_k=0", "TOO_SMALL"),
        ("method.rank=4", "KEY_UNSUPPORTED_BY"),
        ("method.components=['a=a/adapter']", "ENTRIES_NOT_IN_RANGE"),
        ("method.components=['a/adapter', 'b/adapter']", "SAME_COMPONENT_NAME"),
        ("method.components=['a=a/adapter', 'none']", "FOLDER_MISSING"),
    ],
)
def test_components_that_cannot_be_fused_are_rejected(
    components: Path, tiny_llama: Path, override: str, reason: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_tiny(components, tiny_llama, "method.name=learned_fusion", BOTH, override)
    ((key, text),) = caught.value.violations
    assert (key, text.reason) == (override.partition("=")[0], reason)


def test_a_component_of_another_base_stops_the_run(components: Path, tiny_llama: Path) -> None:
    model = twin("qwen3").model
    save_adapter(model, make_config("lora"), components / "other")
    other = "method.components=['a=a/adapter', 'other']"
    resolved = resolve_tiny(components, tiny_llama, "method.name=learned_fusion", other)
    with pytest.raises(ConfigError, check=says("ADAPTER_MISFIT")):
        attach(resolved)


def test_components_are_read_as_the_server_reads_them(tmp_path: Path) -> None:
    model = twin("llama").model
    save_adapter(model, make_config("lora"), tmp_path / "a")
    save_adapter(model, make_config("dora"), tmp_path / "dora")
    save_adapter(model, make_config("lokr"), tmp_path / "lokr")
    directories = {name: tmp_path / name for name in ("a", "dora", "lokr")}
    with pytest.raises(AdapterCheckpointError) as caught:
        read_components(directories, model)
    found = [(field, why.reason, why.params["component"]) for field, why in caught.value.violations]
    assert found == [("components", "UNFIT_COMPONENT", name) for name in ("dora", "lokr")]
    (component,) = read_components({"a": tmp_path / "a"}, model)
    assert component.operators.modules.keys() == linear_modules(model).keys()
