"""Adapters with a head: training, PEFT's layout, and equal results in the server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.bases.tiny_models import tiny_tokenizer
from builders.training import resolve_tiny, write_jsonl
from safetensors.torch import load_file
from said import says
from servers.engine_harness import EngineHarness, make_request
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import AutoModelForSequenceClassification

from turret.clients.evaluate import label_figures, macro_f1_of_sets, micro_f1_of_sets
from turret.server.engine.scheduling.request import Pooling
from turret.training.batches import make_batch
from turret.training.classifier import ClassifierLoss, MultiLabelLoss, label_scores, make_loss
from turret.training.engine import attach
from turret.training.examples import Example, encode_prompt, read_examples
from turret.training.memory import estimate_memory
from turret.training.report import render_report
from turret.training.run import read_metrics
from turret.training.settings import DataConfig
from turret.training.trainer import Trainer
from turret.training.words import ConfigError, DataError

CLASSIFY = Pooling(classifies=True)
FRUIT, TOOLS = ("apple", "pear", "plum", "fig"), ("saw", "axe", "drill", "file")


def write_things(path: Path) -> Path:
    rows = [
        {"prompt": f"{number} {thing}", "completion": label}
        for number in range(5)
        for label, things in (("tool", TOOLS), ("fruit", FRUIT))
        for thing in things
    ]
    return write_jsonl(path, rows)


async def scores_of(
    model: Path, root: Path, rows: Sequence[Any], labels: tuple[str, ...]
) -> torch.Tensor:
    """The served head's scores of each example, ``[examples, labels]``."""
    found = []
    async with EngineHarness.start(model, root, adapters=["adapter"]) as harness:
        for (example,) in rows:
            answer = await harness.run(
                make_request(example.tokens[:-1], "adapter", pooling=CLASSIFY)
            )
            assert answer.head is not None
            assert answer.head.labels == labels
            found.append(torch.tensor(answer.pooled))
    return torch.stack(found)


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
    method: str, tiny_llama: Path, tmp_path: Path
) -> None:
    write_things(tmp_path / "train.jsonl")
    name = f"run.output={method}"
    resolved = resolve_tiny(tmp_path, tiny_llama, *RUN, f"method.name={method}", name)
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
    labels = ("fruit", "tool")
    scores = await scores_of(tiny_llama, result.folder.path, resolved.dataset.validation, labels)
    right = [example.tokens[-1] for (example,) in resolved.dataset.validation]
    loss = torch.nn.functional.cross_entropy(scores, torch.tensor(right))
    assert float(loss) == pytest.approx(rows[-1]["loss"], rel=2e-3)
    found = scores.argmax(1)
    assert float((found == torch.tensor(right)).float().mean()) == pytest.approx(
        rows[-1]["accuracy"]
    )
    told = [resolved.dataset.labels[int(number)] for number in found]
    assert [sample["after"] for sample in samples] == told[: len(samples)]


def test_the_loss_is_the_cross_entropy_of_the_last_state(tiny_llama: Path, tmp_path: Path) -> None:
    write_things(tmp_path / "train.jsonl")
    resolved = resolve_tiny(tmp_path, tiny_llama, *RUN, "base.weights=nf4-dense")
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
    tiny_llama: Path, tmp_path: Path
) -> None:
    path = tmp_path / "train.jsonl"
    write_things(path)
    for override, error in (
        ("data.loss_on=all", "data.loss_on"),
        ("method.name=learned_fusion", "data.task"),
    ):
        with pytest.raises(ConfigError, match=error):
            resolve_tiny(tmp_path, tiny_llama, *RUN, override)
    rows = [{"prompt": str(n), "completion": "same"} for n in range(4)]
    write_jsonl(path, rows)
    with pytest.raises(DataError, check=says("LABEL_COUNT", found=1)):
        resolve_tiny(tmp_path, tiny_llama, *RUN)
    write_jsonl(path, [*rows, {"text": "no label"}])
    with pytest.raises(DataError, check=says("NO_LABEL")):
        resolve_tiny(tmp_path, tiny_llama, *RUN, "data.validation_fraction=0")
    write_jsonl(path, [*rows, {"prompt": "x", "completion": "other"}])
    write_jsonl(tmp_path / "held.jsonl", [{"prompt": "y", "completion": "third"}])
    with pytest.raises(DataError, check=says("UNKNOWN_LABEL", value="third")):
        resolve_tiny(tmp_path, tiny_llama, *RUN, "data.validation=held.jsonl")


def test_a_label_that_occurs_only_in_validation_data_counts(
    tiny_llama: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": str(n), "completion": f"label {n}"} for n in range(4)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    dataset = resolve_tiny(tmp_path, tiny_llama, *RUN).dataset
    assert dataset.labels == tuple(f"label {n}" for n in range(4))
    found = {example.tokens[-1] for (example,) in (*dataset.train, *dataset.validation)}
    assert found == {0, 1, 2, 3}


def test_a_truncated_text_keeps_its_label(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "word " * 90 + str(n), "completion": "ab"[n % 2]} for n in range(6)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    resolved = resolve_tiny(tmp_path, tiny_llama, *RUN, "data.too_long=truncate")
    for (example,) in resolved.dataset.train:
        assert len(example.tokens) == 65
        assert example.tokens[-1] in (0, 1)
        assert example.learned == (*[False] * 64, True)
    assert resolved.dataset.num_truncated == 6


# Adapters with any number of labels: training as in transformers, and serving.


WORDS = {"fruit": ("apple", "pear"), "tool": ("saw", "axe"), "loud": ("BANG", "CRASH")}
LABELS = tuple(sorted(WORDS))
RUN_ON_SETS = (
    "data.task=classification",
    "base.dtype=float32",
    "run.steps=40",
    "run.validate_every=40",
)


def write_sets(path: Path) -> Path:
    """Write examples with every set of labels (even the empty one), from words for each label."""
    rows = []
    for number in range(40):
        held = [label for bit, label in enumerate(LABELS) if number >> bit & 1]
        text = " ".join([str(number), *(WORDS[label][number // 8 % 2] for label in held)])
        rows.append({"prompt": text, "labels": held[::-1]})
    return write_jsonl(path, rows)


def held(flags: list[bool]) -> tuple[str, ...]:
    return tuple(label for label, holds in zip(LABELS, flags, strict=True) if holds)


async def test_a_trained_head_for_sets_of_labels_is_served_as_it_was_trained(
    tiny_llama: Path, tmp_path: Path
) -> None:
    write_sets(tmp_path / "train.jsonl")
    resolved = resolve_tiny(tmp_path, tiny_llama, *RUN_ON_SETS, "data.validation_fraction=0.2")
    assert (resolved.dataset.labels, resolved.dataset.is_multi_label) == (LABELS, True)
    result = Trainer(resolved).run()
    first, last = (r for r in read_metrics(result.folder.metrics) if r["kind"] == "validation")
    assert last["loss"] < first["loss"]
    config = json.loads((result.folder.adapter / "adapter_config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    assert config["id2label"] == {str(number): label for number, label in enumerate(LABELS)}
    validation = resolved.dataset.validation
    scores = await scores_of(tiny_llama, result.folder.path, validation, LABELS)
    sets = [example.labels or () for (example,) in validation]
    holds = torch.tensor([[float(number in each) for number in range(3)] for each in sets])
    loss = binary_cross_entropy_with_logits(scores, holds)
    assert float(loss) == pytest.approx(last["loss"], rel=2e-3)
    pairs = [
        (held(found), held(wanted))
        for found, wanted in zip((scores > 0).tolist(), holds.bool().tolist(), strict=True)
    ]
    assert last["accuracy"] == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    assert last["micro_f1"] == pytest.approx(micro_f1_of_sets(pairs))
    assert last["macro_f1"] == pytest.approx(macro_f1_of_sets(pairs))
    figures = label_figures(pairs)
    assert last["label_f1"] == pytest.approx({name: f.f1 for name, f in figures.items()})
    samples = [json.loads(line) for line in result.folder.samples.read_text().splitlines()]
    told = [", ".join(found) or "no label" for found, _ in pairs]
    assert [sample["after"] for sample in samples] == told[: len(samples)]


def test_the_loss_on_sets_is_that_of_transformers(tiny_llama: Path, tmp_path: Path) -> None:
    write_sets(tmp_path / "train.jsonl")
    resolved = resolve_tiny(tmp_path, tiny_llama, *RUN_ON_SETS, "base.weights=full")
    attached = attach(resolved).eval()
    loss = make_loss(resolved, attached)
    assert isinstance(loss, MultiLabelLoss)
    rows = resolved.dataset.train[:9]
    batch = make_batch(rows, pad=0, is_packed=False)
    assert batch.num_targets == 9
    oracle = AutoModelForSequenceClassification.from_pretrained(
        tiny_llama, num_labels=3, problem_type="multi_label_classification", dtype=torch.float32
    ).eval()
    oracle.score.weight.data = attached.score.weight.data
    total, parts = 0.0, []
    with torch.no_grad():
        for (example,) in rows:
            assert example.labels is not None
            holds = [[float(number in example.labels) for number in range(3)]]
            ids = torch.tensor([example.tokens[:-1]])
            parts.append(float(oracle(input_ids=ids, labels=torch.tensor(holds)).loss))
        total = float(loss(batch))
    # An adapter that is not trained yet changes nothing.
    assert total == pytest.approx(sum(parts), rel=1e-5)
    assert loss.of_targets(batch).tolist() == pytest.approx(parts, rel=1e-5)
    scores = label_scores(loss, rows, LABELS, 4, 0)
    assert set(scores) == {"accuracy", "macro_f1", "micro_f1", "label_f1"}
    assert estimate_memory(resolved).num_parameters > 0


def test_labels_are_read_in_both_shapes(tmp_path: Path) -> None:
    turns = [{"role": "assistant", "content": "b"}, {"role": "user", "content": "a"}]
    rows = [{"messages": turns, "labels": ["x"]}, {"prompt": "", "labels": []}]
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    assert read_examples(path) == [
        Example(path, 1, messages=tuple(turns), labels=("x",)),
        Example(path, 2, prompt="", labels=()),
    ]


def test_a_conversation_is_rendered_unchanged() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}"
    )
    turns = tuple({"role": role, "content": role} for role in ("user", "assistant", "user"))
    example = Example(Path("train.jsonl"), 1, messages=turns, labels=())
    item = encode_prompt(tokenizer, example, DataConfig(train="train.jsonl"))
    assert tokenizer.decode(list(item.tokens)) == "<u>user<a>assistant<u>user<a>"
    assert [role for role, _ in item.turns] == ["user", "assistant", "user"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "labels": ["b" * 257]}, "TOO_MANY_CHARACTERS"),
        ({"prompt": "a", "completion": "b"}, "MIXED_LABELS"),
    ],
)
def test_an_invalid_line_is_reported(
    tiny_llama: Path, tmp_path: Path, row: dict, reason: str
) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": "a", "labels": ["c"]}, row])
    with pytest.raises(DataError, match=r"train.jsonl:2: labels: ") as caught:
        resolve_tiny(tmp_path, tiny_llama, *RUN_ON_SETS)
    assert caught.value.problem.reason == reason


def test_labels_that_are_not_learned_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [{"prompt": f"{n}", "labels": []} for n in "abc"])
    with pytest.raises(DataError, check=says("LABEL_COUNT", found=0)):
        resolve_tiny(tmp_path, tiny_llama, *RUN_ON_SETS)
    place = r"jsonl:1: labels: "
    with pytest.raises(DataError, match=place, check=says("LABELS_NEED_CLASSIFICATION")):
        resolve_tiny(tmp_path, tiny_llama)
    write_jsonl(path, [{"prompt": f"{n}", "completion": n} for n in "abc"])
    write_jsonl(tmp_path / "held.jsonl", [{"prompt": "d", "labels": ["a"]}])
    with pytest.raises(DataError, match=f"held.{place}", check=says("MIXED_LABELS")):
        resolve_tiny(tmp_path, tiny_llama, *RUN_ON_SETS, "data.validation=held.jsonl")
    write_jsonl(path, [{"prompt": f"{n}", "labels": [n]} for n in "abc"])
    write_jsonl(tmp_path / "held.jsonl", [{"prompt": "d", "labels": ["a", "d"]}])
    with pytest.raises(DataError, check=says("UNKNOWN_LABEL", value="d")):
        resolve_tiny(tmp_path, tiny_llama, *RUN_ON_SETS, "data.validation=held.jsonl")
