"""What the verbs say of heads, of services elsewhere, of uploads: once, and with the next step."""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from servers.command import parse_and_run
from servers.fake_turret import FakeTurret

from turret.clients.client import TurretClient
from turret.clients.errors import AlreadyExistsError, ServerError
from turret.clients.verbs.command import _with_next_step
from turret.server.api.faults import fault_of
from turret.server.errors import (
    VIOLATION_COUNT,
    AdapterInUseError,
    InvalidRequestError,
    MergeActiveError,
    ServiceElsewhereError,
    TurretError,
)
from turret.server.rpc.status import to_rich_status

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("verb", ["generate", "eval"])
def test_an_adapter_with_a_head_is_sent_to_the_verb_for_it(
    run: Run, server: FakeTurret, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verb: str
):
    monkeypatch.setattr(server.inference, "_accept", _refuse_head)
    data = tmp_path / "d.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    rest = ("a",) if verb == "generate" else (str(data), "-m", "sql")
    code, _, err = run(verb, *rest)
    meant = {"generate": "turret classify -a NAME", "eval": "turret eval --classify"}[verb]
    assert (code, err.endswith(f"not to write or score text; `{meant}`\n")) == (1, True), err
    assert err.count("trained to classify") == 1


def test_what_eval_calls_a_mix_is_no_part_of_a_servers_flag(
    run: Run, server: FakeTurret, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def refuse(_request: object, context: grpc.ServicerContext) -> None:
        _abort(context, InvalidRequestError.of("adapters[0].name", "see --adapter-root"))

    monkeypatch.setattr(server.inference, "_accept", refuse)
    data = tmp_path / "d.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    assert "--mix 1: see --adapter-root" in run("eval", str(data), "-m", "sql")[2]


def test_details_are_counted_as_they_will_be_listed(
    run: Run, server: FakeTurret, monkeypatch: pytest.MonkeyPatch
):
    def refuse(_request: object, context: grpc.ServicerContext) -> None:
        fields = [(f"layers.{layer}", "has no place") for layer in range(60)]
        rows = [*fields[:20], ("*", "and 40 more")] if is_cut else fields
        error = InvalidRequestError("no", violations=rows, metadata={VIOLATION_COUNT: "60"})
        _abort(context, error)

    monkeypatch.setattr(server.inference, "_accept", refuse)
    is_cut = False
    assert run("generate", "a")[2].endswith("\n  --details lists all 60 fields at fault\n")
    is_cut = True
    assert run("generate", "a")[2].endswith("\n  --details lists 20 of 60 fields at fault\n")
    lines = run("generate", "a", "--details")[2].splitlines()
    assert lines[1] == "  layers.0: has no place"
    assert lines[21] == "  and 40 more"


def test_a_mix_without_a_head_is_sent_to_the_verbs_for_it(
    run: Run, server: FakeTurret, monkeypatch
):
    monkeypatch.setattr(server.inference, "_accept", _refuse_mix)
    err = run("classify", "a", "-a", "sql")[2]
    assert err.endswith("no head: there are `turret generate` and `turret score`\n")
    assert err.count("no head") == 1


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["a/b/adapter_config.json"], "is no adapter, but holds one; did you mean '{0}/a/b'?"),
        (
            ["training_args.bin", *(f"checkpoint-{n}/adapter_config.json" for n in (500, 1000))],
            "is no adapter, but checkpoint-500, checkpoint-1000 in it are; name one of them",
        ),
        (["adapter_config.json", "training_args.bin"], "a .safetensors file is missing; an adapt"),
        (["adapter_config.json", "adapter_model.bin"], "adapter_model.bin is a pickle, which can"),
        ([".x/adapter_config.json"], "adapter_config.json is missing; an adapter has adapter_con"),
    ],
)
def test_an_upload_says_where_the_adapter_is(
    run: Run, server: FakeTurret, tmp_path: Path, files: list[str], expected: str
):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    code, _, err = run("adapters", "upload", "up", str(tmp_path))
    assert (code, err.startswith(f"error: {tmp_path}: {expected.format(tmp_path)}")) == (1, True), (
        err
    )
    assert server.adapters.files == {}


def test_an_upload_from_the_hub_is_a_load(run: Run, server: FakeTurret):
    err = run("adapters", "upload", "up", "hub:acme/x")[2]
    assert err.endswith("a server fetches what it loads: `turret adapters load`\n")


def _refuse_mix(_request: object, context: grpc.ServicerContext) -> None:
    why = "the mix has no head: there are Generate and Score"
    _abort(context, InvalidRequestError.of("adapters", why))


def test_a_call_at_the_address_of_another_service_says_what_names_it(
    run: Run, server: FakeTurret, monkeypatch: pytest.MonkeyPatch
):
    def refuse(_request: object, context: grpc.ServicerContext) -> None:
        _abort(context, ServiceElsewhereError("it is at this server's admin address"))

    monkeypatch.setattr(server.adapters, "_get", refuse)
    assert run("adapters", "get", "sql")[2] == (
        "error: UNIMPLEMENTED (SERVICE_ELSEWHERE): it is at this server's admin address;"
        " --address or TURRET_ADDRESS names that one\n"
    )
    with TurretClient(server.address) as client, pytest.raises(ServerError) as raised:
        client.adapters.get("sql")
    assert str(raised.value).endswith("address; a client takes both: address= and admin_address=")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("a merge is active; unmerge it first", "; `turret adapters unmerge` takes it out\n"),
        ("it is still held; FORCE ends them", "; --force ends them\n"),
    ],
)
def test_what_is_in_the_way_is_removed_by_what_one_types(
    run: Run, server: FakeTurret, monkeypatch: pytest.MonkeyPatch, said: str, told: str
):
    def refuse(_request: object, context: grpc.ServicerContext) -> None:
        _abort(context, MergeActiveError(said))

    monkeypatch.setattr(server.adapters, "_get", refuse)
    err = run("adapters", "get", "sql")[2]
    assert err.endswith(told)
    assert said.partition(";")[0] in err


def test_a_name_that_is_taken_is_freed_by_what_one_types():
    """Whatever the verb is asked for: the words of the server are those of a call."""

    def told(**typed: object) -> str:
        error = AlreadyExistsError(
            grpc.StatusCode.ALREADY_EXISTS,
            "adapter name 'json' is taken by other weights; replace or unload it",
            reason="ADAPTER_EXISTS",
        )
        return _with_next_step(error, argparse.Namespace(name="json", **typed)).message

    taken = "adapter name 'json' is taken by other weights"
    frees = "`turret adapters unload json` frees the name"
    replaces = "`turret adapters replace json 'my sql'` makes these its next generation"
    assert told(path="my sql") == f"{taken}; {replaces}, {frees}"
    assert told(replace=False).startswith(f"{taken}; --replace makes these")
    assert told() == f"{taken}; {frees}"


@pytest.mark.parametrize("verb", [("generate", "a"), ("health",)])
@pytest.mark.parametrize(
    ("variable", "value", "flag"),
    [
        ("TURRET_ADDRESS", "foo", "--address"),
        ("TURRET_TOKEN", "a\nb", "--token"),
        ("TURRET_TLS_CA", "nope", "--tls-ca"),
    ],
)
def test_a_variable_is_blamed_by_its_own_name(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    verb: tuple[str, ...],
    variable: str,
    value: str,
    flag: str,
):
    assert parse_and_run(*verb, flag, value) in (1, 2)
    typed = capsys.readouterr().err
    assert typed.startswith(f"error: {flag}: ")
    monkeypatch.setenv(variable, value)
    assert parse_and_run(*verb) in (1, 2)
    assert capsys.readouterr().err == typed.replace(flag, variable)


def test_the_labels_of_a_head_are_shown(run: Run, server: FakeTurret):
    assert "labels" not in run("adapters", "get", "sql")[1]
    server.adapters.adapters["sql"].labels.extend(["billing", "praise"])
    assert re.search(r"labels +│ billing, praise +│", run("adapters", "get", "sql")[1])
    server.adapters.adapters["sql"].labels.extend(f"l{n}" for n in range(30))
    shown = run("adapters", "get", "sql")[1]
    assert "l17 and 12 more" in re.sub(r"[\s│]+", " ", shown)


def _refuse_head(_request: object, context: grpc.ServicerContext) -> None:
    why = "'sql': trained to classify, not to write or score text; call Classify"
    _abort(context, InvalidRequestError.of("adapters", why))


def _abort(context: grpc.ServicerContext, error: TurretError) -> None:
    """As the server does: the field is in the details too, and must not be told twice."""
    fault = fault_of(error)
    details = to_rich_status(fault).SerializeToString()
    context.set_trailing_metadata((("grpc-status-details-bin", details),))
    context.abort(grpc.StatusCode[fault.code.name], fault.message)


@pytest.mark.parametrize(
    ("argument", "said"), [("", "PROMPT: is empty"), ("-", "PROMPT: standard input is empty")]
)
@pytest.mark.parametrize("flags", [("--chat",), ("--system", "a")])
def test_a_chat_of_nothing_is_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch, argument: str, said: str, flags: tuple[str, ...]
):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    code, out, err = run("generate", *flags, argument)
    assert (code, out, err) == (2, "", f"error: {said}\n")


def test_a_pinned_adapter_is_told_with_the_command_that_unpins_it(
    run: Run, server: FakeTurret, monkeypatch: pytest.MonkeyPatch
):
    def refuse(_request: object, context: grpc.ServicerContext) -> None:
        _abort(context, AdapterInUseError("adapter 'sql' is pinned; unpin it first"))

    monkeypatch.setattr(server.adapters, "_get", refuse)
    err = run("adapters", "unload", "sql")[2]
    assert err.endswith("is pinned; `turret adapters unpin sql` comes first\n")


@pytest.mark.parametrize("flag", ["--answers", "--plot"])
def test_a_test_set_is_not_written_over(run: Run, server: FakeTurret, tmp_path: Path, flag: str):
    data = tmp_path / "d.svg"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "link.svg").symlink_to(data)
    code, _, err = run("eval", str(data), flag, str(tmp_path / "link.svg"))
    assert (code, err) == (
        2,
        f"error: {flag}: {tmp_path}/link.svg is the test set; name another file\n",
    )
    assert "completion" in data.read_text()


def test_answers_are_no_test_set(run: Run, server: FakeTurret, tmp_path: Path):
    data = tmp_path / "d.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    assert run("eval", str(data), "--answers", str(tmp_path / "answers.jsonl"))[0] == 0
    err = run("eval", str(tmp_path / "answers.jsonl"))[2]
    assert err.endswith(
        "is what `turret eval --answers` wrote, and not the test set that was judged\n"
    )


def test_texts_of_a_file_that_is_no_text(run: Run, server: FakeTurret, tmp_path: Path):
    (tmp_path / "f").write_bytes(b"ab\xff")
    code, _, err = run("embed", "--file", str(tmp_path / "f"))
    assert (code, err) == (
        2,
        f"error: --file {tmp_path}/f: is no UTF-8 text (invalid start byte at byte 3)\n",
    )


def test_of_an_adapter_that_does_not_classify_no_line_is_blamed(
    run: Run, server: FakeTurret, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(server.inference, "_accept", _refuse_mix)
    data = tmp_path / "d.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    err = run("eval", str(data), "-m", "sql", "--classify")[2]
    assert "the mix has no head" in err
    assert "line" not in err
