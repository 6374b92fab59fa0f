"""Vectors and labels in the clients and in the command."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from servers.fake_turret import FakeTurret

from turret.clients.aio import AsyncTurretClient
from turret.clients.client import TurretClient
from turret.clients.words import say
from turret.v1 import inference_pb2

Embed = inference_pb2.EmbedRequest


Run = Callable[..., tuple[int, str, str]]


def test_every_kind_of_input_becomes_a_vector(client: TurretClient, server: FakeTurret) -> None:
    inputs = ["a b", [1, 2, 3], [{"role": "user", "content": "hi"}]]
    found = client.embed(
        inputs, adapters=["sql", ("json", -0.5)], pooling="mean", normalize=False, dimensions=7
    )
    single = client.embed("a b")
    assert [vector[:2] for vector in found.vectors] == [(2, 0), (3, 1), (1, 2)]
    assert found.vectors[0][2] == 0.125
    assert (found.usage.prompt_tokens, found.request_id) == (5, "e")
    sent, plain = server.inference.requests[-2:]
    assert [each.WhichOneof("input") for each in sent.inputs] == ["prompt", "token_ids", "chat"]
    assert [(a.name, a.weight) for a in sent.adapters] == [("sql", 0.0), ("json", -0.5)]
    assert (sent.pooling, sent.normalize, sent.dimensions) == (Embed.MEAN, False, 7)
    assert single.vectors == ((2.0, 0.0, 0.125),)
    assert plain == Embed(inputs=[inference_pb2.Input(prompt="a b")])


async def test_the_asyncio_client_embeds_too(server: FakeTurret) -> None:
    async with AsyncTurretClient(server.address) as client:
        found = await client.embed(["a", "b c"], adapters="sql", pooling="last", request_id="r")
    assert [vector[0] for vector in found.vectors] == [1, 2]
    sent = server.inference.requests[-1]
    assert (sent.pooling, sent.request_id) == (Embed.LAST, "r")
    assert not sent.HasField("normalize")
    assert not sent.HasField("dimensions")


def test_the_command_prints_one_array_per_line(
    run: Run, server: FakeTurret, tmp_path: Path
) -> None:
    (tmp_path / "texts").write_text("from file\n\nlast\n")
    flags = ("--pooling", "mean", "--no-normalize", "-a", "sql")
    code, out, _ = run("embed", "a b c", "--file", str(tmp_path / "texts"), *flags)
    assert code == 0
    vectors = [json.loads(line) for line in out.splitlines()]
    assert vectors == [[3, 0, 0.125], [2, 1, 0.125], [1, 2, 0.125]]
    sent = server.inference.requests[-1]
    assert [each.prompt for each in sent.inputs] == ["a b c", "from file", "last"]
    assert (sent.pooling, sent.normalize) == (Embed.MEAN, False)


def test_the_command_compares_texts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n[b] c\n"))
    code, printed, _ = run("embed", "-", "--similarity")
    assert code == 0
    # The cosine of (1, 0, 0.125) and (2, 1, 0.125).
    assert "0.893" in printed
    assert "[b] c" in printed
    code, printed, _ = run("embed", "a", "--json")
    assert (code, json.loads(printed)["vectors"][0][0]) == (0, 1)
    code, _, err = run("embed")
    assert (code, say("NO_TEXTS") in err) == (2, True)


def test_each_pair_of_texts_has_its_cosine(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["a " * n for n in range(1, 13)]
    code, printed, _ = run("embed", *texts, "--similarity", "--json")
    assert code == 0
    every = json.loads(printed)
    assert [row[index] for index, row in enumerate(every)] == pytest.approx([1.0] * 12)
    monkeypatch.setenv("COLUMNS", "60")
    code, printed, _ = run("embed", *texts, "--similarity")
    assert code == 0
    expected = [f"{every[a][b]:.3f}" for a, b in itertools.combinations(range(12), 2)]
    assert re.findall(r"^│ +(\d\.\d{3}) │", printed, re.MULTILINE) == expected


@pytest.mark.parametrize("columns", [40, 80])
def test_a_narrow_terminal_truncates_no_probability(
    columns: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, printed, _ = run("classify", "b" * 60, "-a", "sql")
    assert code == 0
    assert "25.0%" in printed
    assert "…" not in printed
    assert printed.replace("label", "").replace("[b]", "").count("b") == 60


def test_labels_have_all_details_of_the_head(client: TurretClient, server: FakeTurret) -> None:
    found = client.classify(["a b", [1]], adapters="sql", request_id="r")
    assert found.labels == ("[b]", "[b]")
    assert found.classifications[0].probabilities == {"a": 0.25, "[b]": None}
    assert [each.scores[1].logit for each in found.classifications] == [2.0, 1.0]
    sent = server.inference.requests[-1]
    assert [each.WhichOneof("input") for each in sent.inputs] == ["prompt", "token_ids"]
    assert ([a.name for a in sent.adapters], sent.request_id) == (["sql"], "r")


async def test_the_asyncio_client_classifies_too(server: FakeTurret) -> None:
    async with AsyncTurretClient(server.address) as client:
        assert (await client.classify("a", adapters=["sql"])).labels == ("[b]",)


def test_the_command_labels_texts(run: Run, server: FakeTurret, tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("one\ntwo words\n")
    texts = ("--file", str(tmp_path / "texts"), "-a", "sql")
    assert run("classify", *texts, "--labels-only") == (0, "[b]\n[b]\n", "")
    code, printed, _ = run("classify", *texts)
    assert code == 0
    assert "[b]" in printed
    assert "a 25.0%" in printed
    code, out, _ = run("classify", *texts, "--chat", "--json")
    assert code == 0
    turns = [each.chat.messages[0] for each in server.inference.requests[-1].inputs]
    assert [(turn.role, turn.content) for turn in turns] == [("user", "one"), ("user", "two words")]
    assert json.loads(out)["classifications"][0]["label"] == "[b]"
    with pytest.raises(SystemExit):
        run("classify", "a")
