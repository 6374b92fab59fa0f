"""Adapters with any number of labels: training like in transformers, and serving."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from builders.bases.tiny_models import save_tiny_model, tiny_tokenizer
from builders.training import resolve_tiny, write_jsonl
from said import says
from servers.engine_harness import EngineHarness, make_request
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import AutoModelForSequenceClassification

from turret.clients.evaluation.evaluate import (
    label_figures,
    macro_f1_of_sets,
    micro_f1_of_sets,
)
from turret.server.engine.scheduling.request import Pooling
from turret.training.batches import make_batch
from turret.training.classifier import MultiLabelLoss, label_scores, make_loss
from turret.training.engine import attach
from turret.training.errors import DataError
from turret.training.examples import Example, encode_prompt, read_examples
from turret.training.memory import estimate_memory
from turret.training.run.folder import read_metrics
from turret.training.settings.config import DataConfig
from turret.training.trainer import Trainer

WORDS = {"fruit": ("apple", "pear"), "tool": ("saw", "axe"), "loud": ("BANG", "CRASH")}
LABELS = tuple(sorted(WORDS))
RUN = ("data.task=classification", "base.dtype=float32", "run.steps=40", "run.validate_every=40")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return save_tiny_model("llama", tmp_path / "model")


def write_things(path: Path) -> Path:
    """Write examples with every set of labels (also the empty one), from words for each label."""
    rows = []
    for number in range(40):
        held = [label for bit, label in enumerate(LABELS) if number >> bit & 1]
        text = " ".join([str(number), *(WORDS[label][number // 8 % 2] for label in held)])
        rows.append({"prompt": text, "labels": held[::-1]})
    return write_jsonl(path, rows)


def held(flags: list[bool]) -> tuple[str, ...]:
    return tuple(label for label, holds in zip(LABELS, flags, strict=True) if holds)


async def test_a_trained_head_is_served_as_it_was_trained(model: Path, tmp_path: Path) -> None:
    write_things(tmp_path / "train.jsonl")
    resolved = resolve_tiny(tmp_path, model, *RUN, "data.validation_fraction=0.2")
    assert (resolved.dataset.labels, resolved.dataset.is_multi_label) == (LABELS, True)
    result = Trainer(resolved).run()
    first, last = (r for r in read_metrics(result.folder.metrics) if r["kind"] == "validation")
    assert last["loss"] < first["loss"]
    config = json.loads((result.folder.adapter / "adapter_config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    assert config["id2label"] == {str(number): label for number, label in enumerate(LABELS)}
    served, right = [], []
    async with EngineHarness.start(model, result.folder.path, adapters=["adapter"]) as harness:
        for (example,) in resolved.dataset.validation:
            pooling = Pooling(classifies=True)
            request = make_request(example.tokens[:-1], "adapter", pooling=pooling)
            answer = await harness.run(request)
            assert answer.head is not None
            assert answer.pooled is not None
            assert answer.head.problem_type == "multi_label_classification"
            served.append(torch.tensor(answer.pooled))
            assert example.labels is not None
            right.append([float(number in example.labels) for number in range(3)])
    scores, holds = torch.stack(served), torch.tensor(right)
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


def test_the_loss_is_that_of_transformers(model: Path, tmp_path: Path) -> None:
    write_things(tmp_path / "train.jsonl")
    resolved = resolve_tiny(tmp_path, model, *RUN, "base.weights=full")
    attached = attach(resolved).eval()
    loss = make_loss(resolved, attached)
    assert isinstance(loss, MultiLabelLoss)
    rows = resolved.dataset.train[:9]
    batch = make_batch(rows, pad=0, is_packed=False)
    assert batch.num_targets == 9
    oracle = AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=3, problem_type="multi_label_classification", dtype=torch.float32
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
    ("row", "field", "reason"),
    [
        ({"prompt": "a", "labels": "b"}, "labels", "NOT_A_LIST"),
        ({"prompt": "a", "labels": ["b", 1]}, "labels[1]", "NOT_A_STRING"),
        ({"prompt": "a", "labels": ["b", "b"]}, "labels[1]", "DUPLICATE"),
        ({"prompt": "a", "labels": ["b" * 257]}, "labels", "TOO_MANY_CHARACTERS"),
        ({"labels": ["b"]}, None, "NOT_AN_EXAMPLE"),
        ({"prompt": "a", "labels": [], "x": 1}, "x", "UNEXPECTED_KEY"),
        ({"text": "a", "labels": []}, None, "NOT_AN_EXAMPLE"),
        (
            {"messages": [{"role": "assistant", "content": "a"}], "labels": []},
            "messages[0].role",
            "LAST_IS_ANSWER",
        ),
        ({"prompt": "a", "completion": "b"}, "labels", "MIXED_LABELS"),
    ],
)
def test_an_invalid_line_is_reported(
    model: Path, tmp_path: Path, row: dict, field: str | None, reason: str
) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [{"prompt": "a", "labels": ["c"]}, row])
    with pytest.raises(DataError) as caught:
        resolve_tiny(tmp_path, model, *RUN)
    assert str(caught.value).startswith(f"{path}:2: {field}: " if field else f"{path}:2: ")
    assert caught.value.problem.reason == reason


def test_labels_that_are_not_learned_are_refused(model: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [{"prompt": f"{n}", "labels": []} for n in "abc"])
    with pytest.raises(DataError, check=says("LABEL_COUNT", found=0)):
        resolve_tiny(tmp_path, model, *RUN)
    place = r"jsonl:1: labels: "
    with pytest.raises(DataError, match=place, check=says("LABELS_NEED_CLASSIFICATION")):
        resolve_tiny(tmp_path, model)
    write_jsonl(path, [{"prompt": f"{n}", "completion": n} for n in "abc"])
    write_jsonl(tmp_path / "held.jsonl", [{"prompt": "d", "labels": ["a"]}])
    with pytest.raises(DataError, match=f"held.{place}", check=says("MIXED_LABELS")):
        resolve_tiny(tmp_path, model, *RUN, "data.validation=held.jsonl")
    write_jsonl(path, [{"prompt": f"{n}", "labels": [n]} for n in "abc"])
    write_jsonl(tmp_path / "held.jsonl", [{"prompt": "d", "labels": ["a", "d"]}])
    with pytest.raises(DataError, check=says("UNKNOWN_LABEL", value="d")):
        resolve_tiny(tmp_path, model, *RUN, "data.validation=held.jsonl")
