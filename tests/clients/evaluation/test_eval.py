"""``turret eval``: the test set, the metrics, and the verb with a server of known answers."""

from __future__ import annotations

import itertools
import json
import math
import re
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
from rich.progress import Progress, TaskID
from servers.fake_turret import FakeInference, FakeTurret, fake_turret, lose, refuse

from turret.clients.verbs.eval import _plain
from turret.clients.words import say
from turret.server.errors import QueueFullError
from turret.v1 import inference_pb2

BOS = 1
CAPITALS = {"Peru?": "Lima", "Chad?": "N'Djamena", "Oman?": "Muscat"}
Run = Callable[..., tuple[int, str, str]]


class Geographer(FakeInference):
    """Knows every capital with ``sql``, one without, and answers in upper case with ``json``.

    A token is a character. Tokens have probability 1/2 with ``sql``, otherwise 1/8; those of the
    prompt have 1/1000.
    """

    def __init__(self, adapters) -> None:
        super().__init__(adapters)
        self.full = self.together = 0
        self.is_closed = False
        self._running = 0
        self._lock = threading.Lock()
        # No call is answered before two are running, which proves that they run concurrently.
        self._two = threading.Event()

    def Generate(self, request, context):
        with self._lock:
            self._running += 1
            self.together = max(self.together, self._running)
            if self._running >= 2:
                self._two.set()
            is_full = self.full > 0
            self.full -= is_full
        self._two.wait(5)
        with self._lock:
            self._running -= 1
        if is_full:
            refuse(context, QueueFullError("queue full", retry_after_seconds=1e-6))
        self._accept(request, context)
        assert request.sampling.temperature == 0
        question = request.prompt or request.chat.messages[-1].content
        names = [adapter.name for adapter in request.adapters]
        answer = CAPITALS[question] if "sql" in names or question == "Peru?" else "Paris"
        return inference_pb2.GenerateResponse(
            text=answer.upper() if "json" in names else answer + " ",
            finish_reason=inference_pb2.GenerateResponse.STOP,
        )

    def Classify(self, request, context):
        self._accept(request, context)
        response = inference_pb2.ClassifyResponse()
        for each in request.inputs:
            question = each.prompt or each.chat.messages[-1].content
            label = CAPITALS[question] if request.adapters[0].name == "sql" else "Lima"
            scores = response.classifications.add(label=label).scores
            scores.add(label=label, probability=1)
            scores.add(label="city", probability=0.5)
        return response

    def Tokenize(self, request, context):
        if self.is_closed:
            lose(context)
        text = "".join(f"<{m.role}>{m.content}" for m in request.chat.messages)
        ids = [ord(c) for c in text] or [BOS, *(ord(c) for c in request.prompt)]
        return inference_pb2.TokenizeResponse(token_ids=ids)

    def Score(self, request, context):
        self._accept(request, context)
        ids, response = list(request.token_ids.ids), inference_pb2.ScoreResponse()
        text = "".join(map(chr, ids))
        answer = next(a for q, a in CAPITALS.items() if text.endswith(q + a))
        names = [adapter.name for adapter in request.adapters]
        for index, token in enumerate(ids):
            is_answer = index >= len(ids) - len(answer)
            chance = (1 / 2 if "sql" in names else 1 / 8) if is_answer else 1 / 1000
            logprob = math.log(chance) if index else None
            response.tokens.add(token_id=token, text=chr(token), logprob=logprob)
        return response


@pytest.fixture
def server() -> Iterator[FakeTurret]:
    with fake_turret(Geographer) as running:
        yield running


@pytest.fixture
def run(run: Run, monkeypatch) -> Run:
    """Run ``turret eval``; returns exit code, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "140")
    return partial(run, "eval")


@pytest.fixture
def capitals(tmp_path: Path) -> Path:
    path = tmp_path / "capitals.jsonl"
    rows: list[dict] = [{"prompt": q, "completion": a} for q, a in CAPITALS.items()]
    turns = [{"role": "user", "content": "Oman?"}, {"role": "assistant", "content": "Muscat"}]
    rows[2] = {"messages": turns, "source": "an atlas"}
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


def test_base_adapters_and_mixes_are_judged_together(
    run: Run, server: FakeTurret, capitals: Path, tmp_path: Path
):
    plot, answers = tmp_path / "plot.svg", tmp_path / "answers.jsonl"
    code, out, err = run(
        *(capitals, "-m", "sql", "-m", "sql+json=-0.5", "--json"),
        *("--labels", "Lima,N'Djamena,Muscat", "--plot", plot, "--answers", answers),
    )
    assert (code, err) == (0, "")
    figures = {r["mix"]: {k: v["value"] for k, v in r["metrics"].items()} for r in json.loads(out)}
    assert list(figures) == ["base", "sql", "sql+json=-0.5"]
    third = pytest.approx(1 / 3)
    # Including the prompt's tokens would move the perplexity towards 1000.
    assert figures["base"] == {
        "perplexity": pytest.approx(8),
        "exact_match": third,
        "token_f1": third,
        "label_accuracy": third,
    }
    assert figures["sql"] == {
        "perplexity": pytest.approx(2),
        "exact_match": 1,
        "token_f1": 1,
        "label_accuracy": 1,
    }
    mixed = figures["sql+json=-0.5"]
    assert (mixed["exact_match"], mixed["token_f1"], mixed["label_accuracy"]) == (0, 1, 1)
    assert isinstance(server.inference, Geographer)
    assert server.inference.together >= 2
    sent = [r for r in server.inference.requests if len(r.adapters) == 2]
    assert {tuple((a.name, a.weight) for a in r.adapters) for r in sent} == {
        (("sql", 1.0), ("json", -0.5))
    }
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(rows) == 9
    assert rows[1] == {
        "line": 1,
        "mix": "sql",
        "prompt": [["user", "Peru?"]],
        "reference": "Lima",
        "answer": "Lima ",
        "logprob": pytest.approx(4 * math.log(1 / 2)),
        "tokens": 4,
        "exact_match": 1.0,
        "token_f1": 1.0,
        "label_accuracy": 1.0,
    }
    drawing = ET.fromstring(plot.read_text())
    bars = [e for e in drawing.iter("{http://www.w3.org/2000/svg}rect") if e.get("class")]
    # The panels are perplexity, exact match, token F1 and label accuracy.
    widths = [float(bar.get("width", "")) for bar in bars]
    assert len(widths) == 12
    assert widths[0] == pytest.approx(3 * widths[1])
    # All tokens have the same probability, so all draws are equal, and the first panel has no
    # intervals.
    lines = drawing.iter("{http://www.w3.org/2000/svg}line")
    assert sum(line.get("class") == "w" for line in lines) == 9
    assert widths[4] == pytest.approx(3 * widths[3], rel=0.01)


def test_perplexity_is_printed_without_an_exponent():
    figures = [(2394.6, 3), (7.654, 3), (867.94, 4), (12345.6, 4), (1e12, 3), (math.inf, 3)]
    said = ["2,395", "7.65", "867.9", "12,346", "1e+12", "inf"]
    assert [_plain(*figure) for figure in figures] == said


def test_the_table_shows_each_mix(run: Run, capitals: Path):
    code, out, _ = run(capitals, "-m", "sql", "--limit", "2")
    assert code == 0
    assert "8 [?]" in out
    assert "50.0% [9%, 91%]" in out
    note = "; 95% confidence intervals in brackets; [?] if too few or too alike\n"
    assert out.endswith(note)
    assert "2 examples" in out
    assert "label accuracy" not in out


def test_an_interrupt_reports_progress_and_ends_at_once(
    run: Run, server: FakeTurret, capitals: Path, tmp_path: Path, monkeypatch
):
    accept, left = server.inference._accept, threading.Event()

    def hold(request, context):
        asks = isinstance(request, inference_pb2.GenerateRequest)
        if asks and request.chat.messages[-1].content == "Oman?":
            left.wait(30)
        accept(request, context)

    def update(self, task, *, completed, total):
        if completed >= 3:
            raise KeyboardInterrupt

    # The server has bound its methods, but looks this one up in each call.
    monkeypatch.setattr(server.inference, "_accept", hold)
    monkeypatch.setattr(Progress, "update", update)
    began = time.monotonic()
    code, out, err = run(capitals, "-m", "sql", "--answers", tmp_path / "answers.jsonl")
    took = time.monotonic() - began
    left.set()
    assert (code, out) == (130, "")
    assert re.fullmatch(r"\nstopped after [34] of 6 answers; nothing was written\n", err)
    assert not (tmp_path / "answers.jsonl").exists()
    assert took < 20


def test_a_lost_connection_is_reported(run: Run, server: FakeTurret, capitals: Path, monkeypatch):
    def close(request, context):
        lose(context)

    monkeypatch.setattr(server.inference, "_accept", close)
    code, _, err = run(capitals)
    gone = say("EVALUATION_CUT", done="after 0 of 3 answers; nothing was written")
    assert (code, err) == (1, f"error: {gone}\n")
    monkeypatch.setattr(server.inference, "is_closed", True)
    assert "(CONNECTION_LOST)" in run(capitals)[2]


def test_progress_shows_the_total_from_the_start(run: Run, capitals: Path, monkeypatch):
    noted = Mock(return_value=TaskID(0))
    monkeypatch.setattr(Progress, "add_task", noted)
    monkeypatch.setattr(Progress, "update", Mock())
    assert run(capitals, "-m", "sql", "-m", "json", "--limit", "2")[0] == 0
    noted.assert_called_once_with("judging", total=6)


def test_metrics_can_be_chosen_and_prompts_sent_raw(run: Run, server: FakeTurret, capitals: Path):
    code, out, _ = run(capitals, "--raw", "--metric", "perplexity", "--json", "--limit", "2")
    assert code == 0
    assert [list(r["metrics"]) for r in json.loads(out)] == [["perplexity"]]
    assert not [r for r in server.inference.requests if hasattr(r, "sampling")]
    assert {r.token_ids.ids[0] for r in server.inference.requests} == {BOS}
    run(capitals, "--raw", "--metric", "exact_match", "--limit", "2")
    assert [r.prompt for r in server.inference.requests[-2:]] != ["", ""]


def test_eval_waits_while_the_queue_is_full(run: Run, server: FakeTurret, capitals: Path):
    assert isinstance(server.inference, Geographer)
    server.inference.full = 5
    code, out, _ = run(capitals, "-m", "sql", "--no-base", "--metric", "exact_match", "--json")
    assert (code, json.loads(out)[0]["metrics"]["exact_match"]["value"]) == (0, 1)
    assert server.inference.full == 0


def test_an_error_that_affects_every_line_names_no_line(run: Run, capitals: Path):
    code, out, err = run(capitals, "-m", "nope")
    assert (code, out) == (1, "")
    assert re.search(
        r"NOT_FOUND \(ADAPTER_NOT_FOUND\): no adapter nope; `turret adapters list`", err
    )


def test_figures_fit_in_80_columns(run: Run, capitals: Path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    words = (capitals, "-m", "sql", "--labels", "Lima,N'Djamena,Muscat")
    code, out, _ = run(*words)
    assert (code, max(map(len, out.splitlines())) <= 80) == (0, True)
    assert "…" not in out


def test_unwritable_files_are_reported_before_any_request(
    run: Run, capitals: Path, server: FakeTurret, tmp_path: Path
):
    (tmp_path / "d.svg").mkdir()
    for flag, name in itertools.product(("--plot", "--answers"), ("no/x.svg", "d.svg")):
        code, _, err = run(capitals, flag, str(tmp_path / name))
        assert (code, err) == (2, f"error: {say('PATH_NOT_WRITABLE', path=tmp_path / name)}\n")
    assert not server.inference.requests
    code, out, err = run(capitals, "--answers", "/dev/full")
    assert (code, "exact match" in out, "No space left" in err) == (1, True, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--no-base"], "--no-base: " + say("NEEDS_FIELD", other="--mix")),
        (["-m", "sql", "-m", "sql=1.0"], "--mix: " + say("DUPLICATE", value="sql")),
        (["--metric", "label_accuracy"], "--metric: " + say("NEEDS_FIELD", other="--labels")),
        (
            ["--labels", "Lima,Muscat"],
            "capitals.jsonl:2: completion: " + say("ANSWER_NOT_A_LABEL", value="N'Djamena"),
        ),
    ],
)
def test_invalid_arguments_exit_2(run: Run, capitals: Path, arguments: list[str], message: str):
    code, out, err = run(capitals, *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_a_missing_file_exits_1(run: Run, tmp_path: Path):
    code, _, err = run(tmp_path / "none.jsonl")
    assert (code, "none.jsonl" in err) == (1, True)
    assert run(tmp_path)[2].startswith(f"error: {tmp_path}: ")


def test_labels_are_judged_by_accuracy_and_macro_f1(
    run: Run, server: FakeTurret, capitals: Path, tmp_path: Path
):
    answers = tmp_path / "answers.jsonl"
    flags = ("--classify", "-m", "sql", "-m", "json", "--answers", answers, "--json")
    code, out, _ = run(capitals, *flags)
    assert code == 0
    sql, other = json.loads(out)
    assert (sql["mix"], other["mix"]) == ("sql", "json")
    assert sql["metrics"]["accuracy"]["value"] == sql["metrics"]["macro_f1"]["value"] == 1
    count = len(CAPITALS)
    assert other["metrics"]["accuracy"]["value"] == pytest.approx(1 / count)
    # Every answer is the same label, which is right once. All other labels have an F1 of 0.
    assert other["metrics"]["macro_f1"]["value"] == pytest.approx(2 / (count + 1) / count)
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert {row["answer"] for row in rows if row["mix"] == "json"} == {"Lima"}
    assert run(capitals, "--classify")[0] == 2
    assert run(capitals, "--classify", "-m", "sql", "--metric", "perplexity")[0] == 2
    assert run(capitals, "--classify", "-m", "sql", "--plot", tmp_path / "a.svg")[0] == 0
    assert "macro f1" in (tmp_path / "a.svg").read_text()


def test_label_sets_are_judged_by_every_kind_of_f1(run: Run, tmp_path: Path):
    path, answers = tmp_path / "sets.jsonl", tmp_path / "answers.jsonl"
    turns = [{"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Oman?"}]
    rows = [
        {"prompt": "Peru?", "labels": ["Lima"]},
        {"prompt": "Chad?", "labels": ["Africa", "N'Djamena"]},
        {"messages": turns, "labels": []},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--classify", "-m", "sql", "-m", "json", "--answers", answers)
    code, out, _ = run(path, *flags, "--json")
    assert code == 0
    sql, other = json.loads(out)
    # The labels Lima, N'Djamena and Muscat are found. A probability of exactly one half does not
    # count.
    figures = {name: each["value"] for name, each in sql["metrics"].items()}
    expected = {"accuracy": 1 / 3, "micro_f1": 4 / 6, "macro_f1": (1 + 0 + 1 + 0) / 4}
    assert figures == pytest.approx(expected)
    assert sql["labels"] == {
        "Africa": {"f1": 0, "precision": None, "recall": 0, "examples": 1},
        "Lima": {"f1": 1, "precision": 1, "recall": 1, "examples": 1},
        "Muscat": {"f1": 0, "precision": 0, "recall": None, "examples": 0},
        "N'Djamena": {"f1": 1, "precision": 1, "recall": 1, "examples": 1},
    }
    lima = {"f1": 1 / 2, "precision": 1 / 3, "recall": 1, "examples": 1}
    assert other["labels"]["Lima"] == lima
    written = [json.loads(line) for line in answers.read_text().splitlines()]
    assert written[2]["answer"] == ["N'Djamena"]
    assert written[2]["reference"] == ["Africa", "N'Djamena"]
    assert written[4]["reference"] == []
    code, out, _ = run(path, *flags)
    assert "F1 of each label" in out
    assert re.search(r"Lima\W+100.0%\W+50.0%", out)
    code, _, err = run(path, "-m", "sql")
    assert code != 0
    assert f"sets.jsonl:1: labels: {say('LABELS_NEED_CLASSIFY')}" in err
