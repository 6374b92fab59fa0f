"""The client verbs of the command, with a server of canned answers."""

from __future__ import annotations

import io
import json
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import pytest
from servers.command import parse_and_run
from servers.fake_turret import FOREVER, PEFT_FILES, SAME, FakeTurret

from turret.clients.client import TurretClient
from turret.clients.errors import COMMAND_HINTS as HINTS
from turret.clients.errors import AuthenticationError
from turret.clients.words import say
from turret.server.errors import UnauthenticatedError
from turret.v1 import adapters_pb2
from turret.words import counted

Run = Callable[..., tuple[int, str, str]]
FUSE = ("adapters", "fuse", "both", "-a", "sql", "-a", "json=0.5")


def test_generate_streams_the_text(run: Run, server: FakeTurret):
    code, out, err = run(
        "generate", "a b", "-a", "sql@1=0.5", "-a", "json=-1", "--top-k", "3", "--stats"
    )
    assert (code, out) == (0, "ab\n")
    assert "STOP; 3 prompt tokens (0 cached), 2 generated" in err
    assert "sql@1=0.5; json@1=-1" in err
    request = server.inference.requests[-1]
    assert [(a.name, a.weight) for a in request.adapters] == [("sql", 0.5), ("json", -1.0)]
    assert request.adapters[0].generation == 1
    assert request.sampling.top_k == 3
    assert not request.sampling.HasField("temperature")
    assert not request.stop.HasField("ignore_eos")


GONE = "No such file or directory"


def test_generate_json_and_chat(run: Run, server: FakeTurret):
    code, out, _ = run("generate", "hi", "--system", "s", "--json", "--top-n", "2")
    answer = json.loads(out)
    assert (code, answer["text"], answer["finish_reason"]) == (0, "system:s user:hi ", "STOP")
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["logprobs"][0]["top"][0]["token_id"] == 6


def test_generate_asks_for_a_constraint(run: Run, server: FakeTurret, tmp_path):
    schema, grammar = tmp_path / "schema.json", tmp_path / "answer.lark"
    schema.write_text('{"type": "null"}')
    grammar.write_text('start: "a"')
    for flags, kind, value in (
        (["--json-schema", str(schema)], "json_schema", '{"type": "null"}'),
        (["--json-schema", ' {"type": "null"}'], "json_schema", ' {"type": "null"}'),
        (["--grammar", str(grammar)], "grammar", 'start: "a"'),
        (["--regex", "a+"], "regex", "a+"),
        (["--json-object"], "json_object", True),
    ):
        assert run("generate", "a", *flags)[0] == 0
        request = server.inference.requests[-1]
        assert request.WhichOneof("constraint") == kind
        assert getattr(request, kind) == value
    assert run("generate", "a", "--choice", "x", "--choice", "y z")[0] == 0
    assert list(server.inference.requests[-1].choice.texts) == ["x", "y z"]
    assert run("generate", "a")[0] == 0
    assert server.inference.requests[-1].WhichOneof("constraint") is None
    said = f"error: {say('SEVERAL_CONSTRAINTS', names='json_object, regex')}\n"
    assert run("generate", "a", "--regex", "a", "--json-object") == (2, "", said)
    with pytest.raises(SystemExit) as ended:
        run("generate", "a", "--grammar", str(tmp_path / "none"))
    assert ended.value.code == 2


def test_prompt_from_standard_input(run: Run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("from stdin"))
    assert run("generate", "-")[1] == "fromstdin\n"


def test_an_answer_cannot_steer_the_terminal(run: Run, monkeypatch):
    answer = "a\x1b]0;title\x07\x9b2Jb"
    assert run("generate", answer)[1] == f"{answer}\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert run("generate", answer)[1] == "a]0;title2Jb\n"


def test_failed_call_prints_one_line(run: Run):
    code, out, err = run("generate", "a", "-a", "nope", "--json")
    assert (code, out) == (1, "")
    hint = HINTS["ADAPTER_NOT_FOUND"]
    assert err == f"error: NOT_FOUND (ADAPTER_NOT_FOUND): no adapter nope; {hint}\n"
    code, out, err = run("generate", "a", "--top-p", "2", "--json")
    assert (code, out) == (1, "")
    assert err == "error: INVALID_ARGUMENT (INVALID_REQUEST): --top-p: <= 1\n"


def test_a_count_of_one_is_printed_in_the_singular():
    assert [counted(n, "token") for n in (0, 1, 2)] == ["0 tokens", "1 token", "2 tokens"]


def test_usage_errors_exit_2(run: Run, capsys):
    code, _, err = run("generate", "a", "--top-k", "-1")
    assert (code, err.startswith("error: --top-k: ")) == (2, True)
    assert " -1 " in err
    for arguments in (["-a", "sql=much"], ["-a", "=1"], ["--timeout", "0"], ["--token", "a"] * 2):
        with pytest.raises(SystemExit) as raised:
            parse_and_run("generate", *arguments)
        assert raised.value.code == 2
    assert "NAME[@GENERATION][=WEIGHT]" in capsys.readouterr().err


def test_token_comes_from_flag_or_file(run: Run, server: FakeTurret, tmp_path, capsys):
    run("generate", "a", "--token", "t1")
    assert server.inference.metadata["authorization"] == "Bearer t1"
    (tmp_path / "token").write_text("t2\n")
    run("generate", "a", "--token-from", str(tmp_path / "token"))
    assert server.inference.metadata["authorization"] == "Bearer t2"
    (tmp_path / "bytes").write_bytes(b"\xff")
    none = {"path": tmp_path / "none", "why": "No such file or directory"}
    for name, said in (
        ("none", say("FILE_UNREADABLE", **none)),
        ("bytes", say("PATH_UNUSABLE", path=tmp_path / "bytes", problem=say("NOT_UTF8"))),
    ):
        with pytest.raises(SystemExit) as ended:
            run("generate", "a", "--token-from", str(tmp_path / name))
        assert ended.value.code == 2
        assert capsys.readouterr().err.endswith(f"argument --token-from: {said}\n")


def test_environment_variables_replace_connection_flags(
    server: FakeTurret, capsys, monkeypatch, tmp_path
):
    monkeypatch.setenv("TURRET_ADDRESS", server.address)
    monkeypatch.setenv("TURRET_TOKEN", "t3")
    assert parse_and_run("generate", "a") == 0
    assert server.inference.metadata["authorization"] == "Bearer t3"
    assert parse_and_run("generate", "a", "--token", "t4") == 0
    assert server.inference.metadata["authorization"] == "Bearer t4"
    monkeypatch.setenv("TURRET_TLS_CA", str(tmp_path / "ca.pem"))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        parse_and_run("generate", "a")
    assert str(tmp_path / "ca.pem") in capsys.readouterr().err


def test_errors_say_what_to_do_next(run: Run, server: FakeTurret, capsys):
    started = time.monotonic()
    assert parse_and_run("generate", "a", "--address", "127.0.0.1:1") == 1
    assert time.monotonic() - started < 10
    err = capsys.readouterr().err
    assert err.startswith("error: UNAVAILABLE (NOT_REACHED): ")
    assert err.endswith(f"; {HINTS['NOT_REACHED']}\n")
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        assert parse_and_run("generate", "a", "--address", f"127.0.0.1:{other.server_port}") == 1
        other.shutdown()
    assert "error: UNAVAILABLE (NOT_GRPC): " in capsys.readouterr().err
    other = grpc.server(ThreadPoolExecutor(1))
    port = other.add_insecure_port("127.0.0.1:0")
    other.start()
    assert parse_and_run("generate", "a", "--address", f"127.0.0.1:{port}") == 1
    other.stop(None)
    err = capsys.readouterr().err
    assert err == f"error: UNIMPLEMENTED: {say('NOT_OFFERED')}\n"
    err = run("health", "--tls")[2]
    assert err.startswith("error: UNAVAILABLE (TLS_FAILED): ")
    server.inference.refusal = UnauthenticatedError("the token is unknown")
    err = run("generate", "a")[2]
    assert err == f"error: UNAUTHENTICATED: the token is unknown; {HINTS['UNAUTHENTICATED']}\n"
    with TurretClient(server.address) as client, pytest.raises(AuthenticationError) as raised:
        client.generate("a")
    assert raised.value.hint == "pass a token of the server's --token-file as token="


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--address", "127.0.0.1"], say("ADDRESS_WITHOUT_PORT", value="127.0.0.1")),
        (
            ["--address", "http://127.0.0.1:1"],
            say("ADDRESS_WITH_SCHEME", value="http://127.0.0.1:1", scheme="http://"),
        ),
        (["--token", "Bearer t"], f"--token: {say('INCLUDES_BEARER')}"),
        (["--token", "ü"], f"--token: {say('NOT_ASCII')}"),
        (["--logprobs"], "--logprobs: " + say("NEEDS_FIELD", other="--json")),
    ],
)
def test_an_error_names_the_flag_that_cannot_work(arguments: list[str], complaint: str, capfd):
    assert parse_and_run("generate", "a", *arguments) != 0
    err = capfd.readouterr().err
    assert complaint in err
    assert err.count("\n") == 1


def test_an_invalid_value_is_reported_with_its_flag(capsys, tmp_path):
    none = str(tmp_path / "none")
    for arguments, complaint in (
        (["--timeout", "soon"], f"argument --timeout: {say('NOT_SECONDS', value='soon')}"),
        (["-a", "json+pirate*0.7"], say("NOT_A_MIX_MEMBER", value="json+pirate*0.7")),
        (
            ["--json-schema", none],
            say("FILE_UNREADABLE", path=none, why="No such file or directory"),
        ),
    ):
        with pytest.raises(SystemExit):
            parse_and_run("generate", "a", *arguments)
        assert capsys.readouterr().err.splitlines()[-1].endswith(complaint)


def test_a_missed_deadline_is_reported_once(run: Run):
    code, _, err = run("generate", FOREVER, "--timeout", "0.2")
    assert code == 1
    hint = HINTS["DEADLINE_EXCEEDED"].format(timeout=0.2)
    assert err == f"error: DEADLINE_EXCEEDED: {say('NOT_IN_TIME')}; {hint}\n"


def test_an_error_in_the_middle_of_an_answer_starts_a_new_line(run: Run):
    code, out, _ = run("generate", FOREVER, "--timeout", "0.5")
    assert (code, out.rstrip("\n") + "\n") == (1, out)
    assert out.startswith(FOREVER)


def test_an_adapters_name_is_never_truncated(run: Run, server: FakeTurret, monkeypatch):
    name = "customer-" + "0123456789" * 8
    run("adapters", "load", name, "dir", "--pin")
    monkeypatch.setenv("COLUMNS", "80")
    out = run("adapters", "list")[1]
    assert max(map(len, out.splitlines())) <= 80
    cells = [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")]
    assert name in "".join(cells)
    monkeypatch.delenv("COLUMNS")
    assert name in run("adapters", "list")[1]


def test_an_empty_list_suggests_a_load(run: Run, server: FakeTurret):
    server.adapters.adapters.clear()
    assert "`turret adapters load NAME PATH`" in run("adapters", "list")[1]
    assert "`turret adapters load NAME PATH`" in run("adapters", "list", "--method", "x")[1]


def test_a_filter_without_matches_prints_an_empty_list(run: Run, server: FakeTurret):
    assert "`turret adapters load NAME PATH`" in run("adapters", "list", "--method", "dora")[1]
    assert json.loads(run("adapters", "list", "--method", "dora", "--json")[1]) == []


def test_loading_the_same_weights_keeps_their_generation(
    run: Run, server: FakeTurret, tmp_path: Path
):
    assert run("adapters", "replace", "sql", "other")[1].startswith("replaced sql@2: lora")
    assert run("adapters", "load", "sql", SAME, "--pin")[1].startswith("loaded sql@2: lora")
    (tmp_path / "adapter_config.json").write_text(SAME)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    assert run("adapters", "upload", "sql", str(tmp_path))[1].startswith("uploaded sql@2: lora")


def test_score_prints_a_table(run: Run):
    code, out, _ = run("score", "abc", "--top-n", "1")
    assert code == 0
    assert "'[b]'" in out
    assert "-0.2500" in out
    assert "sum -0.2500 over 2 tokens, perplexity 1.133" in out
    assert json.loads(run("score", "abc", "--json")[1])["tokens"][1]["logprob"] == -0.25


@pytest.mark.parametrize("columns", [60, 80])
def test_a_narrow_terminal_truncates_no_number(
    columns: int, run: Run, server: FakeTurret, monkeypatch: pytest.MonkeyPatch
):
    server.adapters.adapters["sql"].digest = "0123456789abcdef" * 4
    monkeypatch.setenv("COLUMNS", str(columns))
    for arguments, numbers in (
        (("score", "abc", "--top-n", "1"), ("-0.2500", "0.0000")),
        (("adapters", "get", "sql"), ("0123456789ab", "in flight", "generation")),
    ):
        out = run(*arguments)[1]
        assert "…" not in out
        assert all(number in out for number in numbers), out
        assert "│" not in out or max(map(len, out.splitlines())) <= columns


def test_a_failed_export_leaves_nothing_behind(run: Run, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    code, _, err = run("adapters", "export", "nobody", str(tmp_path / "mine/new/er/a"))
    assert (code, "NOT_FOUND" in err) == (1, True)
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


def test_adapters_list_and_get(run: Run):
    code, out, _ = run("adapters", "list")
    assert code == 0
    assert out.index("json") < out.index("sql")
    assert "1.5 KiB" in out
    code, out, _ = run("adapters", "get", "sql")
    assert "[red] herring" in out
    assert "d" * 64 in out
    listed = json.loads(run("adapters", "list", "--json")[1])
    assert [(a["name"], a["ranks"]) for a in listed] == [("json", [4, 8]), ("sql", [4, 8])]


def test_an_adapter_is_loaded_with_a_chat_template(run: Run, server: FakeTurret, tmp_path: Path):
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    for name, data in PEFT_FILES.items():
        (tmp_path / name).write_bytes(data)
    flags = ("--chat-template", str(tmp_path / "t.jinja"))
    for verb in ("load", "replace", "upload --replace"):
        place = str(tmp_path) if "upload" in verb else "dir"
        server.adapters.requests.clear()
        assert run("adapters", *verb.split(), "new", place, *flags)[0] == 0
        assert server.adapters.requests[-1].chat_template == "{{ messages }}"


def test_adapters_lifecycle(run: Run, server: FakeTurret):
    loaded = run("adapters", "load", "new", "dir", "--pin")
    lines = ["loaded new@1: lora of rank 4, 8, 1.5 KiB, host, pinned", "warning: [red] herring"]
    assert (loaded[0], loaded[1].splitlines()) == (0, lines)
    assert server.adapters.adapters["new"].pinned
    assert run("adapters", "unpin", "new")[1] == "unpinned new\n"
    assert run("adapters", "pin", "new")[1] == "pinned new\n"
    assert json.loads(run("adapters", "replace", "new", "d", "--json")[1])["generation"] == 2
    assert run("adapters", "rollback", "new")[1] == "new@1 is served now\n"
    assert run("adapters", "rollback", "new", "--to", "2")[1] == "new@2 is served now\n"
    assert re.search(r"kept +│ 1", run("adapters", "get", "new")[1])
    assert run("adapters", "unload", "new", "--force", "--wait", "2")[1] == "unloaded new\n"
    request = server.adapters.requests[-1]
    assert request.mode == adapters_pb2.UnloadAdapterRequest.FORCE
    assert request.timeout.seconds == 2
    code, _, err = run("adapters", "get", "new")
    assert code == 1
    assert err.startswith("error: NOT_FOUND (ADAPTER_NOT_FOUND): no adapter new")


def test_aliases(run: Run, server: FakeTurret):
    assert run("adapters", "aliases")[1] == "no aliases\n"
    assert run("adapters", "alias", "prod", "sql@7")[1] == "prod is sql@7\n"
    (target,) = server.adapters.requests[-1].targets
    assert (target.name, target.generation, target.HasField("weight")) == ("sql", 7, True)
    code, out, _ = run("adapters", "alias", "canary", "sql@7=0.9", "json=0.1", "--json")
    assert code == 0
    targets = [
        {"name": "sql", "generation": 7, "weight": 0.9},
        {"name": "json", "generation": 1, "weight": 0.1},
    ]
    assert json.loads(out) == {"name": "canary", "targets": targets}
    lines = ["prod is sql@7", "canary is sql@7 (90%), json@1 (10%)"]
    assert run("adapters", "aliases")[1].splitlines() == lines
    assert run("adapters", "unalias", "prod")[1] == "deleted alias prod\n"
    assert len(json.loads(run("adapters", "aliases", "--json")[1])) == 1
    for targets in ([], ["sql+json"]):
        with pytest.raises(SystemExit):
            run("adapters", "alias", "prod", *targets)


def test_adapters_fuse_merge_and_unmerge(run: Run, server: FakeTurret):
    code, out, _ = run(*FUSE, "--combination", "svd", "--rank", "4")
    assert code == 0
    request = server.adapters.requests[-1]
    assert (request.combination, request.rank) == ("svd", 4)
    assert [(a.name, a.weight) for a in request.adapters] == [("sql", 1.0), ("json", 0.5)]
    assert "relative error 0.25 over 2 modules" in out
    assert "worst 0.5 in layers.0.q_proj" in out
    assert re.search(r"source +│ fused", out)
    assert ["q_proj", "2", "4-8", "0.375", "0.5"] in [
        [cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines()
    ]
    code, out, _ = run("adapters", "merge", "-a", "sql=0.5", "--precision", "bf16")
    assert "sql@1=0.5" in out
    assert "bf16" in out
    assert "the rounding error is 75.0% of the adapters' update" in out
    assert "warning: most of the update is lost" in out
    assert out.endswith("`turret adapters unmerge`; do not name it with -a as well\n")
    said = "merged into the base: sql@1=0.5; `turret adapters merge-state` shows details\n"
    assert run("adapters", "list")[1].endswith(said)
    assert isinstance(json.loads(run("adapters", "list", "--json")[1]), list)
    taken = run("adapters", "unmerge")[1]
    assert taken == "unmerged; base generation 3\n"
    assert "merged" not in run("adapters", "list")[1]
    assert run("adapters", "merge-state")[1] == "nothing is merged; base generation 3\n"


def test_adapters_export_and_upload(run: Run, server: FakeTurret, tmp_path):
    target = str(tmp_path / "sql")
    assert run("adapters", "export", "sql", target)[1] == f"exported sql@1 to {target}\n"
    code, _, err = run("adapters", "export", "sql", target)
    assert (code, err) == (1, f"error: {say('PATH_EXISTS', path=target)}\n")
    # The error names the requested directory, not the temporary one alongside it.
    code, _, err = run("adapters", "export", "sql", "/proc/x")
    assert (code, err.startswith("error: /proc/x: cannot be created: ")) == (1, True)
    assert run("adapters", "upload", "up", target, "--pin")[0] == 0
    code, _, err = run("adapters", "upload", "up", target)
    assert code == 1
    assert err.startswith("error: ALREADY_EXISTS (ADAPTER_EXISTS): up is taken; ")
    assert run("adapters", "upload", "up", target, "--replace")[0] == 0
    assert server.adapters.files == PEFT_FILES
