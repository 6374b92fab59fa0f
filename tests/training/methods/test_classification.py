"""Adapters with a head: training, PEFT's layout, and equal results in the server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from builders.bases.tiny_models import save_tiny_model
from builders.training import resolve_tiny, write_jsonl
from safetensors.torch import load_file
from said import says
from servers.engine_harness import EngineHarness, make_request

from turret.clients.evaluation.evaluate import macro_f1_of_sets
from turret.server.engine.scheduling.request import Pooling
from turret.training.batches import make_batch
from turret.training.classifier import ClassifierLoss, label_scores, make_loss
from turret.training.engine import attach
from turret.training.errors import ConfigError, DataError
from turret.training.report import render_report
from turret.training.run.folder import read_metrics
from turret.training.trainer import Trainer

CLASSIFY = Pooling(classifies=True)
FRUIT, TOOLS = ("apple", "pear", "plum", "fig"), ("saw", "axe", "drill", "file")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return save_tiny_model("llama", tmp_path / "model")


def write_things(path: Path) -> Path:
    rows = [
        {"prompt": f"{number} {thing}", "completion": label}
        for number in range(5)
        for label, things in (("tool", TOOLS), ("fruit", FRUIT))
        for thing in things
    ]
    return write_jsonl(path, rows)


RUN = ("data.task=classification", "base.dtype=float32", "run.steps=40", "run.validate_every=20")


@pytest.mark.parametrize(
    "method",
    [
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ("dora", "ia3", "loha", "hra", "shira")
        ),
        "lora",
    ],
)
async def test_a_trained_head_is_served_as_it_was_trained(
    method: str, model: Path, tmp_path: Path
) -> None:
    write_things(tmp_path / "train.jsonl")
    name = f"run.output={method}"
    resolved = resolve_tiny(tmp_path, model, *RUN, f"method.name={method}", name)
    assert resolved.dataset.labels == ("fruit", "tool")
    result = Trainer(resolved).run()
    rows = [r for r in read_metrics(result.folder.metrics) if r["kind"] == "validation"]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert set(rows[-1]) >= {"accuracy", "macro_f1"}
    config = json.loads((result.folder.adapter / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert set(config["modules_to_save"]) >= {"score", "classifier"}
    assert config["id2label"] == {"0": "fruit", "1": "tool"}
    head = load_file(result.folder.adapter / "adapter_model.safetensors")
    assert head["base_model.model.score.weight"].shape[0] == 2
    page = render_report(result.folder)
    for key, name in (("accuracy", "accuracy"), ("macro_f1", "macro F1")):
        figures = f"{rows[0][key]:.3f} → {rows[-1][key]:.3f}"
        assert f"<dt>{name}</dt><dd>{figures}</dd>" in page
    assert "nats per example; thin" in page
    assert "base model</th>" not in page
    samples = [json.loads(line) for line in result.folder.samples.read_text().splitlines()]
    served = []
    root = result.folder.path
    async with EngineHarness.start(model, root, adapters=["adapter"]) as harness:
        for (example,) in resolved.dataset.validation:
            request = make_request(example.tokens[:-1], "adapter", pooling=CLASSIFY)
            answer = await harness.run(request)
            assert answer.head is not None
            assert answer.pooled is not None
            assert answer.head.labels == ("fruit", "tool")
            served.append(torch.tensor(answer.pooled))
    right = [example.tokens[-1] for (example,) in resolved.dataset.validation]
    loss = torch.nn.functional.cross_entropy(torch.stack(served), torch.tensor(right))
    assert float(loss) == pytest.approx(rows[-1]["loss"], rel=2e-3)
    found = torch.stack(served).argmax(1)
    assert float((found == torch.tensor(right)).float().mean()) == pytest.approx(
        rows[-1]["accuracy"]
    )
    told = [resolved.dataset.labels[int(number)] for number in found]
    assert [sample["after"] for sample in samples] == told[: len(samples)]


def test_the_loss_is_the_cross_entropy_of_the_last_state(model: Path, tmp_path: Path) -> None:
    write_things(tmp_path / "train.jsonl")
    resolved = resolve_tiny(tmp_path, model, *RUN, "base.weights=nf4-dense")
    trained = attach(resolved).eval()
    loss = make_loss(resolved, trained)
    assert isinstance(loss, ClassifierLoss)
    rows = resolved.dataset.train[:7]
    batch = make_batch(rows, pad=0, is_packed=False)
    assert batch.num_targets == 7
    total = 0.0
    with torch.no_grad():
        for (example,) in rows:
            ids = torch.tensor([example.tokens[:-1]])
            states = trained(input_ids=ids, output_hidden_states=True).hidden_states[-1]
            logits = trained.score(states[0, -1].float())
            total -= float(logits.log_softmax(-1)[example.tokens[-1]])
        assert float(loss(batch)) == pytest.approx(total, rel=1e-4)
    pairs = [(found, right) for (found,), (right,) in loss.labels(batch)]
    assert [label for _, label in pairs] == [example.tokens[-1] for (example,) in rows]
    scores = label_scores(loss, rows, resolved.dataset.labels, 3, 0)
    assert scores["accuracy"] == sum(found == right for found, right in pairs) / 7
    sets = [((str(found),), (str(right),)) for found, right in pairs]
    assert scores["macro_f1"] == macro_f1_of_sets(sets)
    assert 0 < scores["macro_f1"] < 1


def test_an_error_names_the_setting_that_does_not_fit_classification(
    model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "train.jsonl"
    write_things(path)
    for override, error in (
        ("data.loss_on=all", "data.loss_on"),
        ("method.name=learned_fusion", "data.task"),
    ):
        with pytest.raises(ConfigError, match=error):
            resolve_tiny(tmp_path, model, *RUN, override)
    rows = [{"prompt": str(n), "completion": "same"} for n in range(4)]
    write_jsonl(path, rows)
    with pytest.raises(DataError, check=says("LABEL_COUNT", found=1)):
        resolve_tiny(tmp_path, model, *RUN)
    write_jsonl(path, [*rows, {"text": "no label"}])
    with pytest.raises(DataError, check=says("NO_LABEL")):
        resolve_tiny(tmp_path, model, *RUN, "data.validation_fraction=0")
    write_jsonl(path, [*rows, {"prompt": "x", "completion": "other"}])
    write_jsonl(tmp_path / "held.jsonl", [{"prompt": "y", "completion": "third"}])
    with pytest.raises(DataError, check=says("UNKNOWN_LABEL", value="third")):
        resolve_tiny(tmp_path, model, *RUN, "data.validation=held.jsonl")


def test_a_label_that_occurs_only_in_validation_data_counts(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": str(n), "completion": f"label {n}"} for n in range(4)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    dataset = resolve_tiny(tmp_path, model, *RUN).dataset
    assert dataset.labels == tuple(f"label {n}" for n in range(4))
    found = {example.tokens[-1] for (example,) in (*dataset.train, *dataset.validation)}
    assert found == {0, 1, 2, 3}


def test_a_truncated_text_keeps_its_label(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "word " * 90 + str(n), "completion": "ab"[n % 2]} for n in range(6)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    resolved = resolve_tiny(tmp_path, model, *RUN, "data.too_long=truncate")
    for (example,) in resolved.dataset.train:
        assert len(example.tokens) == 65
        assert example.tokens[-1] in (0, 1)
        assert example.learned == (*[False] * 64, True)
    assert resolved.dataset.num_truncated == 6
