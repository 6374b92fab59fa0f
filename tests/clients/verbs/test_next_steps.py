"""Errors of the verbs with their next step, and conversations that are ended."""

from __future__ import annotations

import argparse
import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from servers.command import parse_and_run
from servers.fake_turret import CUT, FOREVER, GONE, FakeTurret

from turret.clients.errors import COMMAND_HINTS as HINTS
from turret.clients.errors import HINTS as OF_PYTHON
from turret.clients.errors import UNREACHED
from turret.clients.words import say
from turret.server import cli, errors
from turret.server.api.call import fault_of

Run = Callable[..., tuple[int, str, str]]


def test_eval_renames_its_own_flag_but_not_the_servers(
    run: Run, server: FakeTurret, tmp_path: Path
):
    said = "see --adapter-root"
    server.inference.refusal = errors.InvalidRequestError.of("adapters[0].name", said)
    data = tmp_path / "d.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    assert "--mix 1: see --adapter-root" in run("eval", str(data), "-m", "sql")[2]


def test_many_invalid_fields_are_reported_on_one_line(run: Run, server: FakeTurret):
    fields = [(f"layers.{layer}", "has no place") for layer in range(60)]
    rows = [*fields[:20], ("*", "and 40 more")]
    server.inference.refusal = errors.InvalidRequestError(
        "no", violations=rows, metadata={errors.VIOLATION_COUNT: "60"}
    )
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


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (errors.MergeActiveError("a merge is active"), HINTS["MERGE_ACTIVE"]),
        (errors.AdapterClassifiesError("trained to classify"), HINTS["ADAPTER_CLASSIFIES"]),
        (errors.HeadMissingError("no head"), ""),
        (errors.ServiceElsewhereError("it is elsewhere"), HINTS["SERVICE_ELSEWHERE"]),
        (errors.AdapterBusyError("is held", metadata={"adapter": "sql"}), HINTS["ADAPTER_BUSY"]),
        (
            errors.AdapterPinnedError("is pinned", metadata={"adapter": "sql"}),
            "run `turret adapters unpin sql` first",
        ),
        (errors.AdapterInUseError("is being unloaded", metadata={"adapter": "sql"}), ""),
        (errors.AdapterNotFoundError("no sqk", metadata={"closest": "sql"}), ""),
    ],
)
def test_an_error_ends_with_the_command_to_run_next(
    run: Run, server: FakeTurret, error: errors.TurretError, hint: str
):
    server.adapters.refusal = error
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
    run: Run, server: FakeTurret, tmp_path: Path
):
    server.inference.refusal = errors.HeadMissingError.of("adapters", "no head")
    data = tmp_path / "d.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    err = run("eval", str(data), "-m", "sql", "--classify")[2]
    assert "(HEAD_MISSING)" in err
    assert "line" not in err


# Conversations and answers that are ended by their reader, a fault or the server.


def command(*arguments: str) -> subprocess.Popen[bytes]:
    """The command in a separate process, with pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", "turret.server.command.entry", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    )


class Terminal(io.StringIO):
    """The lines of an interactive user."""

    def isatty(self) -> bool:
        return True


def test_chat_remembers_turns_and_switches_adapters(run: Run, server: FakeTurret, monkeypatch):
    lines = ["one", "/adapter nope", "/adapter sql json=0.5", "/system be brief", "two"]
    lines += ["/nonsense", "/adapters", "/stats", "/reset", "/adapter", "/system", "three"]
    monkeypatch.setattr("sys.stdin", Terminal("\n".join(lines) + "\n"))
    code, out, err = run("chat", "--temperature", "0")
    assert code == 0
    missing, unknown = err.splitlines()
    assert missing.startswith("error: NOT_FOUND (ADAPTER_NOT_FOUND): no adapter nope")
    assert "/nonsense" in unknown
    first, second, third = server.inference.requests
    said = [(m.role, m.content) for m in second.chat.messages]
    answer = ("assistant", "user:one ")
    assert said == [("system", "be brief"), ("user", "one"), answer, ("user", "two")]
    assert [(a.name, a.weight) for a in second.adapters] == [("sql", 1.0), ("json", 0.5)]
    assert [m.content for m in third.chat.messages] == ["three"]
    assert not third.adapters
    assert all(r.sampling.HasField("temperature") for r in (first, second, third))
    assert "sql@1  lora" in out
    assert "sql@1=1; json@1=0.5" in out


def test_chat_without_a_terminal_ends_at_the_first_failure(
    run: Run, server: FakeTurret, monkeypatch
):
    for line, code in (("/adapter nope", 1), ("/nonsense", 2), (CUT, 1)):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"one\n{line}\nlost\n"))
        server.inference.requests.clear()
        assert run("chat")[0] == code
        last = server.inference.requests[-1].chat.messages[-1].content
        assert last == (CUT if line == CUT else "one")
    code, out, err = run("chat", "-a", "jsn")
    assert (code, out) == (1, "")
    assert err.startswith("error: NOT_FOUND (ADAPTER_NOT_FOUND): no adapter jsn")


def test_a_cut_answer_ends_the_command_with_an_error(run: Run):
    cut = f"error: {say('ANSWER_CUT')}\n"
    assert run("generate", f"a {CUT}") == (1, f"a{CUT}\n", cut)
    code, out, err = run("generate", f"a {CUT}", "--json")
    assert (code, json.loads(out)["finish_reason"], err) == (1, "CANCELLED", cut)
    code, out, err = run("generate", f"a {GONE}")
    assert (code, out) == (1, f"a{GONE}\n")
    assert err == f"error: {say('ANSWER_LOST')}\n"


def test_text_that_is_not_utf8_is_reported_with_its_argument(run: Run):
    code, _, err = run("generate", "caf\udcff")
    assert (code, err) == (2, f"error: PROMPT: {say('NOT_UTF8')}\n")
    code, _, err = run("generate", "caf\udcff", "--chat")
    assert (code, err) == (2, f"error: PROMPT: {say('NOT_UTF8')}\n")
    for verb in (("generate", "a"), ("chat",)):
        code, _, err = run(*verb, "--system", "caf\udcff")
        assert (code, err) == (2, f"error: --system: {say('NOT_UTF8')}\n")


def test_a_closed_output_pipe_prints_no_error(server: FakeTurret):
    with command("generate", FOREVER, "--address", server.address) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.wait(20) == 141
        assert process.stderr.read() == b""


@pytest.mark.parametrize(
    ("verb", "code"), [(["generate", FOREVER], 130), (["chat"], 0)], ids=["generate", "chat"]
)
def test_interrupt_ends_cleanly(server: FakeTurret, verb: list[str], code: int):
    """Ctrl-C stops the request on the server; no traceback reaches the user."""
    with command(*verb, "--address", server.address) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        # The first bytes show that the stream, or the conversation, has begun.
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == code
        assert b"Traceback" not in process.stderr.read()
    if verb[0] == "generate":
        assert server.inference.stream_ended.wait(5)


@pytest.mark.parametrize("verb", ["generate", "eval", "chat", "train"])
def test_a_second_interrupt_ends_a_call_at_once(verb: str, monkeypatch: pytest.MonkeyPatch):
    """A second exception during the cleanup after the first one can leave gRPC waiting forever."""
    after: list[object] = []

    def interrupted(args: argparse.Namespace) -> int:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            after.append(signal.getsignal(signal.SIGINT))
        return 0

    parsed = argparse.Namespace(func=interrupted)
    parser = argparse.Namespace(parse_args=lambda arguments: parsed)
    monkeypatch.setattr(cli, "build_parser", lambda name: parser)
    before = signal.getsignal(signal.SIGINT)
    try:
        assert cli.main([verb], catches_interrupts=True) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    # A conversation continues after the first interrupt, and a training run prints how to continue.
    goes_on = verb in ("chat", "train")
    assert after == [signal.default_int_handler if goes_on else signal.SIG_DFL]
