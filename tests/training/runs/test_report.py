"""The report of a run, and its answers before and after training."""

from __future__ import annotations

import io
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from builders.training import resolve_tiny, write_jsonl
from rich.console import Console

from turret.server.cli import main
from turret.training.base_model import without_peft_warnings
from turret.training.engine import attach, trainable
from turret.training.examples import Encoded
from turret.training.report import Curve, curves_svg, render_report
from turret.training.run import RunFolder, progress, read_metrics
from turret.training.run.progress import training_progress
from turret.training.run.samples import draw_samples, model_answers
from turret.training.trainer import Trainer
from turret.training.words import say
from turret.words import about_bytes

VOID = {"meta", "line", "circle", "polyline"}


class Page(HTMLParser):
    """Checks that elements are nested correctly.

    Collects the texts of cells and turns, and attributes.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.turns: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        # The number of open elements at the beginning of a turn; 0 outside of turns.
        self._depth = 0
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "dd"):
            self.cells.append("")
        if str(dict(attrs).get("class")).startswith("turn"):
            self.turns.append("")
            self._depth = len(self.open)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag
            if len(self.open) < self._depth:
                self._depth = 0

    def handle_data(self, data: str) -> None:
        if {"td", "dd"} & set(self.open):
            self.cells[-1] += data
        if self._depth:
            self.turns[-1] += data


def answers(text: str) -> list[str]:
    """The answers of a page with one sample, after its heading and before the tables."""
    return Page(text.partition("Samples</h2>")[2].partition("<h2>")[0]).cells


@pytest.fixture(scope="module")
def run(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run with data that looks like markup."""
    folder = tmp_path_factory.mktemp("report")
    rows = [{"prompt": f"<b>{n}</b>&", "completion": "<script>x"[: 9 - n % 3]} for n in range(24)]
    write_jsonl(folder / "train.jsonl", rows)
    resolved = resolve_tiny(
        folder, tiny_llama, "optimizer.learning_rate=0.03", "run.steps=12", "run.samples=2"
    )
    return Trainer(resolved).run().folder


def test_the_page_shows_the_run(run: RunFolder):
    text = render_report(run)
    page = Page(text)
    rows = list(read_metrics(run.metrics))
    losses = [row["loss"] for row in rows if row["kind"] == "validation"]
    assert losses[-1] < losses[0]
    assert "nats per learned token; thin" in text
    assert "<dt>base model</dt>" in text
    assert "accuracy" not in text
    assert f"{losses[0]:.3f} → {losses[-1]:.3f}" in page.cells
    assert "12 of 12" in page.cells
    size = (run.adapter / "adapter_model.safetensors").stat().st_size
    assert about_bytes(size) in page.cells
    assert any(run.read_facts()["base"]["digest"] in cell for cell in page.cells)
    assert "unfinished" not in text
    assert "steps = 12" in text
    dots = [attrs for tag, attrs in page.tags if tag == "circle"]
    assert len(dots) == len(losses) == 7
    lines = [str(attrs["points"]).split() for tag, attrs in page.tags if tag == "polyline"]
    assert [len(line) for line in lines] == [12, 12, 7, 12]


def test_samples_are_answers_of_the_base_and_of_the_adapter(run: RunFolder):
    samples = [json.loads(line) for line in run.samples.read_text().splitlines()]
    assert len(samples) == 2
    for sample in samples:
        assert re.fullmatch(r"(<bos>)?<b>\d+</b>&", sample["prompt"])
        assert "<script>x".startswith(sample["reference"])
        # After twelve steps, a model of two layers has learned the beginning of these answers.
        assert sample["after"].startswith("<scri")
        assert not sample["before"].startswith("<scri")
    page = Page(render_report(run))
    assert samples[0]["after"].rstrip("…") in {cell.rstrip("…") for cell in page.cells}
    assert samples[0]["prompt"] in page.turns


def test_a_truncated_answer_is_marked(run: RunFolder, tmp_path: Path):
    """The page marks an answer that was cut, and explains the mark."""
    samples = [json.loads(line) for line in run.samples.read_text().splitlines()]
    # With random weights, no text ends; the file stores the answer unchanged.
    assert all("before" in sample["cut"] for sample in samples)
    assert not any(sample["before"].endswith("…") for sample in samples)
    for path in (run.config, run.facts, run.metrics):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    sample = {"prompt": "p", "reference": "r", "before": "b", "after": "a", "cut": ["before"]}
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    text = render_report(RunFolder(tmp_path))
    assert answers(text) == ["r", "b…", "a"]
    assert "… marks" in text
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample | {"cut": []}) + "\n")
    text = render_report(RunFolder(tmp_path))
    assert answers(text) == ["r", "b", "a"]
    assert "…" not in text


def test_a_running_training_run_has_a_page_too(run: RunFolder, tmp_path: Path):
    for path in (run.config, run.facts):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    first = run.metrics.read_text().splitlines(keepends=True)[0]
    (tmp_path / "metrics.jsonl").write_text(first + '{"kind": "st')
    text = render_report(RunFolder(tmp_path))
    Page(text)
    assert "not finished" in text
    assert "0 of 12" in text
    assert "Samples" not in text


def test_the_command_writes_the_page(run: RunFolder, capsys: pytest.CaptureFixture[str]):
    assert main(["train", "report", str(run.path)]) == 0
    assert capsys.readouterr().out.strip() == str(run.report)
    assert run.report.read_text(encoding="utf-8") == render_report(run)
    assert main(["train", "report", str(run.path / "adapter")]) == 1
    text = say("NO_RUN_FACTS", path=run.path / "adapter", name="run.json")
    assert str(text) in capsys.readouterr().err


@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning", "p_tuning", "dora", "ia3"])
def test_every_method_can_be_sampled(method: str, tiny_llama: Path, tmp_path: Path):
    overrides = (f"method.name={method}", "optimizer.learning_rate=0.05", "run.samples=1")
    folder = Trainer(resolve_tiny(tmp_path, tiny_llama, *overrides, "run.steps=3")).run().folder
    (sample,) = [json.loads(line) for line in folder.samples.read_text().splitlines()]
    assert sample["before"] != sample["after"]
    Page(render_report(folder))


@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning", "lora"])
def test_the_cache_does_not_change_answers(method: str, tiny_llama: Path, tmp_path: Path):
    """Compared with a pass over the whole text for every token, as in training."""
    resolved = resolve_tiny(tmp_path, tiny_llama, f"method.name={method}", "base.dtype=float32")
    attached, tokenizer = attach(resolved).eval(), resolved.base.tokenizer
    for parameter in trainable(attached).values():
        torch.nn.init.normal_(parameter, std=0.3)
    (example,) = resolved.dataset.validation[0]
    answers = model_answers(attached, tokenizer, "cpu")
    (sample,) = draw_samples(answers, tokenizer, [example])
    prompt = list(example.tokens[: example.learned.index(True)])
    tokens = list(prompt)
    with torch.no_grad():
        while len(tokens) < len(prompt) + 64 and tokens[-1] != tokenizer.eos_token_id:
            with without_peft_warnings():
                output = attached(input_ids=torch.tensor([tokens]), use_cache=False)
            tokens.append(int(output.logits[0, -1].argmax()))
    whole = tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True)
    assert sample["after"]
    assert whole.startswith(sample["after"])


def test_the_right_answer_is_the_first_of_several_turns(tiny_llama: Path, tmp_path: Path):
    resolved = resolve_tiny(tmp_path, tiny_llama, "base.dtype=float32")
    attached, tokenizer = attach(resolved).eval(), resolved.base.tokenizer
    tokens = tuple(tokenizer("What is it? A duck. And that? A goose.")["input_ids"])
    answers = [range(3, 6), range(9, 11)]
    learned = tuple(any(index in one for one in answers) for index in range(len(tokens)))
    answers = model_answers(attached, tokenizer, "cpu")
    (sample,) = draw_samples(answers, tokenizer, [Encoded(tokens, learned)])
    assert len(tokens) > 11
    assert sample["reference"] == tokenizer.decode(tokens[3:6])


def test_a_run_without_a_terminal_prints_its_progress(capsys: pytest.CaptureFixture[str]):
    row = {"kind": "step", "step": 3, "loss": 1.5, "seconds": 1.0}
    with training_progress(line_seconds=0.05) as listen:
        listen({"kind": "begin", "steps": 9})
        listen({"kind": "phase", "text": "answering 3 samples 1/6"})
        deadline = time.monotonic() + 10
        heard = ""
        while heard.count("answering 3 samples 1/6") < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
            heard += capsys.readouterr().err
        listen(row)
        listen({"kind": "note", "text": "adapter written: here"})
    assert heard.startswith("training: starting")
    assert heard.count("training: step 0/9  answering 3 samples 1/6") >= 2
    assert "step 3/9  loss 1.500" in (last := capsys.readouterr().err)
    assert "adapter written: here\n" in last


def test_a_classification_run_shows_its_metrics(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    figures = {"accuracy": 0.75, "macro_f1": 0.5}
    rows = (
        {"kind": "step", "step": 2, "loss": 1.5},
        {"kind": "validation", "step": 2, "loss": 1.038, **figures},
    )
    with training_progress() as listen:
        listen({"kind": "begin", "steps": 2})
        for row in rows:
            listen(row)
    said = capsys.readouterr().err
    assert "step 2/2  validation 1.038  accuracy 0.750  macro F1 0.500  " in said
    drawn = io.StringIO()
    console = Console(file=drawn, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(progress, "Console", lambda **_: console)
    with training_progress() as listen:
        listen({"kind": "begin", "steps": 2})
        for row in rows:
            listen(row)
        time.sleep(0.2)
    assert re.search(r"2/2 loss 1\.500  accuracy 0\.750 \d:\d\d gone", drawn.getvalue())


def test_a_chat_is_shown_as_turns(run: RunFolder, tmp_path: Path):
    for path in (run.config, run.facts, run.metrics):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    turns = [["system", "Be <brief>"], ["user", "When?"]]
    sample = {"prompt": "<|im_start|>x", "turns": turns, "reference": "2026-11-24"}
    line = json.dumps({**sample, "before": "b", "after": "a"})
    (tmp_path / "samples.jsonl").write_text(line + "\n")
    text = render_report(RunFolder(tmp_path))
    assert "<|im_start|>" not in text
    assert Page(text).turns == ["systemBe <brief>", "userWhen?"]
    assert "overflow-wrap:anywhere" not in text


def test_samples_are_optional(tiny_llama: Path, tmp_path: Path):
    resolved = resolve_tiny(tmp_path, tiny_llama, "run.samples=0", "run.steps=1")
    folder = Trainer(resolved).run().folder
    assert folder.samples.read_text() == ""
    assert "Samples" not in render_report(folder)


@pytest.mark.parametrize("values", [[0.0, 0.0], [3.0], [1e-7, 2e-7], [-2.0, 5e6]])
def test_curves_of_any_range_can_be_drawn(values: list[float]):
    svg = curves_svg([Curve("training", list(enumerate(values)))])
    heights = [float(y) for y in re.findall(r",([\d.]+)", svg)]
    assert len(heights) == len(values)
    assert all(12 <= y <= 230 for y in heights)
    assert curves_svg([Curve("training", [])]) == ""
