"""Errors of the verbs about heads, other addresses and uploads, each with the next step."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from servers.command import parse_and_run
from servers.fake_turret import FakeTurret

from turret.clients.errors import COMMAND_HINTS as HINTS
from turret.clients.errors import HINTS as OF_PYTHON
from turret.clients.errors import UNREACHED
from turret.clients.words import say
from turret.server import errors
from turret.server.api.call import fault_of
from turret.server.errors import (
    VIOLATION_COUNT,
    AdapterBusyError,
    AdapterClassifiesError,
    AdapterInUseError,
    AdapterNotFoundError,
    AdapterPinnedError,
    HeadMissingError,
    InvalidRequestError,
    MergeActiveError,
    ServiceElsewhereError,
    TurretError,
)
from turret.server.rpc.interceptor import to_rich_status

Run = Callable[..., tuple[int, str, str]]


def test_eval_renames_its_own_flag_but_not_the_servers(
    run: Run, server: FakeTurret, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def refuse(_request: object, context: grpc.ServicerContext) -> None:
        _abort(context, InvalidRequestError.of("adapters[0].name", "see --adapter-root"))

    monkeypatch.setattr(server.inference, "_accept", refuse)
    data = tmp_path / "d.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    assert "--mix 1: see --adapter-root" in run("eval", str(data), "-m", "sql")[2]


def test_many_invalid_fields_are_reported_on_one_line(
    run: Run, server: FakeTurret, monkeypatch: pytest.MonkeyPatch
):
    def refuse(_request: object, context: grpc.ServicerContext) -> None:
        fields = [(f"layers.{layer}", "has no place") for layer in range(60)]
        rows = [*fields[:20], ("*", "and 40 more")]
        error = InvalidRequestError("no", violations=rows, metadata={VIOLATION_COUNT: "60"})
        _abort(context, error)

    monkeypatch.setattr(server.inference, "_accept", refuse)
    err = run("generate", "a")[2]
    assert "layers.7: has no place; and more" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "files",
    [
        ["checkpoint-500/adapter_config.json"],
        ["adapter_config.json", "adapter_model.bin"],
        ["config.json", "model.safetensors"],
    ],
)
def test_an_upload_without_adapter_files_is_rejected(
    run: Run, server: FakeTurret, tmp_path: Path, files: list[str]
):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    code, _, err = run("adapters", "upload", "up", str(tmp_path))
    assert (code, err) == (1, f"error: {say('ADAPTER_FILES_MISSING', path=tmp_path)}\n")
    assert server.adapters.files == {}
    err = run("adapters", "upload", "up", "hub:acme/x")[2]
    assert err.startswith("error: hub:acme/x: ")


def _refuse_mix(_request: object, context: grpc.ServicerContext) -> None:
    _abort(context, HeadMissingError.of("adapters", "no head"))


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (MergeActiveError("a merge is active"), HINTS["MERGE_ACTIVE"]),
        (AdapterClassifiesError("trained to classify"), HINTS["ADAPTER_CLASSIFIES"]),
        (HeadMissingError("no head"), ""),
        (ServiceElsewhereError("it is elsewhere"), HINTS["SERVICE_ELSEWHERE"]),
        (AdapterBusyError("is held", metadata={"adapter": "sql"}), HINTS["ADAPTER_BUSY"]),
        (
            AdapterPinnedError("is pinned", metadata={"adapter": "sql"}),
            "run `turret adapters unpin sql` first",
        ),
        (AdapterInUseError("is being unloaded", metadata={"adapter": "sql"}), ""),
        (AdapterNotFoundError("no sqk", metadata={"closest": "sql"}), ""),
    ],
)
def test_an_error_ends_with_the_command_to_run_next(
    run: Run, server: FakeTurret, monkeypatch: pytest.MonkeyPatch, error: TurretError, hint: str
):
    def refuse(_request: object, context: grpc.ServicerContext) -> None:
        _abort(context, error)

    monkeypatch.setattr(server.adapters, "_get", refuse)
    err = run("adapters", "get", "sql")[2]
    head = f"error: {fault_of(error).code.name} ({error.reason}): {error.message}"
    assert err == (f"{head}; {hint}\n" if hint else f"{head}\n")


def test_both_tables_have_a_hint_for_the_same_reasons():
    assert HINTS.keys() == OF_PYTHON.keys()
    reasons = {kind.reason for kind in vars(errors).values() if hasattr(kind, "reason")}
    assert HINTS.keys() <= reasons | UNREACHED | {"REQUEST_TOO_LARGE", "ANSWER_TOO_LARGE"}


@pytest.mark.parametrize("verb", [("generate", "a"), ("health",)])
@pytest.mark.parametrize(
    ("variable", "value", "flag"),
    [
        ("TURRET_ADDRESS", "foo", "--address"),
        ("TURRET_TOKEN", "a\nb", "--token"),
    ],
)
def test_an_invalid_environment_variable_is_reported_by_name(
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


def _abort(context: grpc.ServicerContext, error: TurretError) -> None:
    """Abort like the server: the field is also in the details, and must not be printed twice."""
    fault = fault_of(error)
    details = to_rich_status(fault).SerializeToString()
    context.set_trailing_metadata((("grpc-status-details-bin", details),))
    context.abort(grpc.StatusCode[fault.code.name], fault.message)


@pytest.mark.parametrize(
    ("argument", "said"), [("", say("EMPTY")), ("-", say("STANDARD_INPUT_EMPTY"))]
)
@pytest.mark.parametrize("flags", [("--chat",), ("--system", "a")])
def test_an_empty_chat_is_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch, argument: str, said: str, flags: tuple[str, ...]
):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    code, out, err = run("generate", *flags, argument)
    assert (code, out, err) == (2, "", f"error: PROMPT: {said}\n")


@pytest.mark.parametrize("flag", ["--answers", "--plot"])
def test_a_test_set_is_not_overwritten(run: Run, server: FakeTurret, tmp_path: Path, flag: str):
    data = tmp_path / "d.svg"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "link.svg").symlink_to(data)
    code, _, err = run("eval", str(data), flag, str(tmp_path / "link.svg"))
    assert (code, err) == (
        2,
        f"error: {say('IS_TEST_SET', path=tmp_path / 'link.svg')}\n",
    )
    assert "completion" in data.read_text()


def test_a_file_of_texts_that_is_not_utf8_is_rejected(
    run: Run, server: FakeTurret, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "f").write_bytes(b"ab\xff")
    with pytest.raises(SystemExit):
        run("embed", "--file", str(tmp_path / "f"))
    said = say("PATH_UNUSABLE", path=tmp_path / "f", problem=say("NOT_UTF8"))
    assert capsys.readouterr().err.endswith(f"argument --file: {said}\n")


def test_no_line_is_blamed_for_an_adapter_without_a_head(
    run: Run, server: FakeTurret, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(server.inference, "_accept", _refuse_mix)
    data = tmp_path / "d.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    err = run("eval", str(data), "-m", "sql", "--classify")[2]
    assert "(HEAD_MISSING)" in err
    assert "line" not in err
