"""Conversations and answers that are ended by their reader, a fault or the server."""

from __future__ import annotations

import argparse
import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
from servers.fake_turret import CUT, FOREVER, GONE, FakeTurret

from turret.clients.words import say
from turret.server import cli

Run = Callable[..., tuple[int, str, str]]


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
    # A conversation continues after the first interrupt, and a training prints how to continue.
    goes_on = verb in ("chat", "train")
    assert after == [signal.default_int_handler if goes_on else signal.SIG_DFL]
