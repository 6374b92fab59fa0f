"""The server process: start, drain, signals, engine death, users, and the command around it."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import grpc
import psutil
import pytest
from builders.random_adapters import AdapterSpec, arch_of, write_adapter
from checkout import ROOT
from method_oracle import twin
from servers.app_parts import BOTH, LISTEN, Parts, connected, make_app
from servers.fakes import finish
from servers.probe import is_serving
from servers.rpc_harness import failure_of, soon
from servers.server_under_test import start_server as start_real_server
from start_problems import read

import turret
from turret.clients.client import TurretClient
from turret.clients.errors import TurretRpcError
from turret.server import log
from turret.server.adapters.adapter import AdapterInfo
from turret.server.adapters.state_dir import StateDir
from turret.server.app import EXIT_FAILED, App
from turret.server.cli import main
from turret.server.command.start_lines import introduce
from turret.server.config import AdapterConfig, Config, ModelConfig, SecurityConfig
from turret.server.engine.scheduling.request import Output, Request
from turret.server.errors import AdapterCheckpointError
from turret.server.words import say
from turret.v1 import inference_pb2, inference_pb2_grpc


def model_call(channel: grpc.aio.Channel) -> Any:
    stub: Any = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[arg-type]
    return stub.GetModel(inference_pb2.GetModelRequest())


async def test_a_token_file_that_others_can_read_causes_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "tokens"
    file.write_text("hunter2 admin\n")
    file.chmod(0o644)
    app = make_app(Parts(), security=SecurityConfig(token_file=file))
    await app.startup()
    await app.shutdown()
    assert [line for line in caplog.messages if "token file" in line] == [
        "other users can read the token file; its mode should be 0600"
    ]


COMPLETIONS = "/v1/completions"
BODY = {"model": "base", "prompt": "a"}


async def test_the_server_listens_while_loading_and_serves_afterwards() -> None:
    parts = Parts()
    parts.may_finish.clear()
    adapters = AdapterConfig(adapter_root=Path("r"), preload=(("sql", "a"), ("json", "b")))
    app = make_app(parts, adapters=adapters, listen=BOTH)
    running = asyncio.ensure_future(app.startup())
    await soon(parts.building)
    async with connected(app) as (channel, client):
        assert app.rpc is not None
        assert (await failure_of(model_call(channel))).code is grpc.StatusCode.UNAVAILABLE
        probe = await asyncio.to_thread(is_serving, app.rpc.address, "turret.v1.Inference")
        assert probe == (False, "NOT_SERVING")
        answer = await client.get("/health")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "server_starting")
        assert (await client.post(COMPLETIONS, json=BODY)).status_code == 503
        parts.may_finish.set()
        await running
        assert (await model_call(channel)).name == "fake"
        assert await asyncio.to_thread(is_serving, app.rpc.address) == (True, "SERVING")
        assert (await client.get("/health")).status_code == 200
    assert list(parts.registry.records) == ["sql", "json"]
    app.stop()
    assert await app.main_loop() == 0
    await app.shutdown()
    assert parts.registry.is_closed


async def test_warnings_of_preloaded_adapters_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    parts = Parts()
    load = parts.registry.load

    def warned(name: str, path: str) -> AdapterInfo:
        record = load(name, path)
        return replace(record, facts=replace(record.facts, warnings=("made for another base",)))

    parts.registry.load = warned  # type: ignore[method-assign]
    adapters = AdapterConfig(adapter_root=Path("r"), preload=(("sql", "a"),))
    app = make_app(parts, adapters=adapters)
    await app.startup()
    app.stop()
    await app.main_loop()
    await app.shutdown()
    (told,) = [r.__dict__["fields"] for r in caplog.records if r.levelname == "WARNING"]
    assert told == {"adapter": "sql", "why": "made for another base"}


async def test_shutdown_refuses_new_calls_and_finishes_running_ones() -> None:
    parts = Parts()
    finishing = asyncio.Event()

    async def slow(request: Request) -> AsyncIterator[Output]:
        yield Output(text="H", token_ids=(72,))
        await finishing.wait()
        yield Output(text="i", token_ids=(105,), finish=finish(request))

    parts.engine.script = slow
    app = make_app(parts, listen=BOTH)
    seen: dict[str, Any] = {}
    await app.startup()
    async with (
        connected(app) as (channel, client),
        client.stream("POST", COMPLETIONS, json=BODY | {"stream": True}) as stream,
    ):
        lines = stream.aiter_lines()
        assert '"text":"H"' in await anext(lines)
        stub: Any = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[arg-type]
        call = stub.GenerateStream(inference_pb2.GenerateRequest(prompt="a"))
        assert (await call.read()).text == "H"

        async def drain(grace_seconds: float) -> None:
            """Like the engine, let running requests finish; check the server in the meantime."""
            parts.engine.drained.append(grace_seconds)
            seen["probe"] = await asyncio.to_thread(is_serving, app.rpc.address)  # type: ignore[union-attr]
            seen["health"] = (await client.get("/health")).status_code
            seen["refused"] = await failure_of(model_call(channel))
            seen["answer"] = await client.post(COMPLETIONS, json=BODY)
            finishing.set()

        parts.engine.drain = drain  # type: ignore[method-assign]
        app.stop()
        assert await app.main_loop() == 0
        stopping = asyncio.ensure_future(app.shutdown())
        assert (await call.read()).text == "i"
        assert not await call.read()
        assert await call.code() is grpc.StatusCode.OK
        rest = [line async for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"stop"' in rest[-2]
        await asyncio.wait_for(stopping, 20)
    assert parts.engine.drained == [7]
    assert (seen["probe"], seen["health"]) == ((False, "NOT_SERVING"), 503)
    assert seen["refused"].code is grpc.StatusCode.UNAVAILABLE
    assert seen["refused"].reason == "UNAVAILABLE"
    assert seen["answer"].status_code == 503
    assert seen["answer"].json()["error"]["code"] == "unavailable"
    assert seen["answer"].headers["retry-after"] == "1"


async def test_health_reports_a_dead_engine_before_the_process_ends() -> None:
    parts = Parts()
    app = make_app(parts)
    running = asyncio.ensure_future(app.run())
    await soon(parts.engine.started)
    assert app.rpc is not None
    heard: list[tuple[bool, str]] = []
    # The engine of these parts starts before the listener reports that it serves.
    while not heard or not heard[-1][0]:
        heard.append(await asyncio.to_thread(is_serving, app.rpc.address))
    parts.engine.dead.set()
    while heard[-1][0]:
        heard.append(await asyncio.to_thread(is_serving, app.rpc.address))
    assert heard[-1] == (False, "NOT_SERVING")
    assert not running.done()
    assert await asyncio.wait_for(running, 10) == 1
    assert parts.engine.drained == [0]


@pytest.mark.parametrize("error", [OSError("no such model"), ZeroDivisionError("a bug")])
async def test_a_failed_startup_ends_the_process_with_an_error(error, caplog, capsys) -> None:
    parts = Parts()
    parts.error = error
    caplog.set_level(logging.INFO, "turret")
    assert await asyncio.wait_for(make_app(parts).run(), 10) == 1
    is_printed = capsys.readouterr().err == "turret serve: error: no such model\n"
    assert is_printed or caplog.records[-1].levelno == logging.ERROR, "the cause comes last"


async def test_a_failed_preload_ends_the_process_with_an_error(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    parts = Parts()

    def load(name: str, path: str, pinned: bool = False) -> Any:
        raise AdapterCheckpointError("adapter 'a' cannot be served: rank_pattern is wrong")

    parts.registry.load = load  # type: ignore[method-assign]
    adapters = AdapterConfig(adapter_root=Path("r"), preload=(("sql", "a"),))
    caplog.set_level(logging.INFO, "turret")
    assert await asyncio.wait_for(make_app(parts, adapters=adapters).run(), 10) == 1
    assert not {"draining", "stopped"} & {record.message for record in caplog.records}
    assert parts.engine.drained, "the engine was started, so it must be stopped"
    problem = "adapter 'a' cannot be served: rank_pattern is wrong"
    said = say("PRELOAD_FAILED", name="sql", path="a", problem=problem)
    assert capsys.readouterr().err == f"turret serve: error: {said}\n"


async def test_a_shutdown_while_loading_does_not_wait_for_the_load(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bar = Mock()
    monkeypatch.setattr(log, "_drawn", [bar])
    parts = Parts()
    parts.may_finish.clear()
    app = make_app(parts)
    running = asyncio.ensure_future(app.run())
    await soon(parts.building)
    app.stop()
    assert await asyncio.wait_for(running, 10) == 0
    assert not parts.engine.started.is_set()
    # Otherwise, the terminal would have no cursor.
    bar.stop.assert_called_once()
    parts.may_finish.set()


SERVER = textwrap.dedent(
    """
    import asyncio, sys
    sys.path[:0] = {paths!r}
    from servers.app_parts import LISTEN, Parts, make_app
    from turret.server import log

    log.configure()
    async def drain(grace_seconds):
        if {drain_hangs}:
            await asyncio.Event().wait()

    async def serve():
        parts = Parts()
        parts.engine.drain = drain
        return await make_app(parts).run()

    sys.exit(asyncio.run(serve()))
    """
)


def start_server(drain_hangs: bool) -> subprocess.Popen[str]:
    """A serving server with fakes, in a separate process."""
    paths = [str(ROOT / "tests" / "support"), str(ROOT / "src")]
    script = SERVER.format(paths=paths, drain_hangs=drain_hangs)
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if " serving " in line:
            return process
    raise AssertionError("the server did not start")


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_with_exit_code_0(kind: signal.Signals) -> None:
    with start_server(drain_hangs=False) as process:
        process.send_signal(kind)
        assert process.wait(20) == 0


def test_a_reload_with_nothing_to_reload_logs_one_line() -> None:
    with start_server(drain_hangs=False) as process:
        assert process.stderr is not None
        process.send_signal(signal.SIGHUP)
        line = process.stderr.readline()
        assert line.endswith(" turret.server.app nothing to read again: no --token-file\n")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert "signal=SIGTERM" in process.stderr.readline()


def test_a_terminal_that_closes_stops_the_server_in_order() -> None:
    script = SERVER.format(
        paths=[str(ROOT / "tests" / "support"), str(ROOT / "src")], drain_hangs=False
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", script])
    said = b""
    while b" serving " not in said:
        said += os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_second_signal_stops_at_once() -> None:
    with start_server(drain_hangs=True) as process:
        assert process.stderr is not None
        process.send_signal(signal.SIGTERM)
        for line in process.stderr:
            if " draining " in line:
                break
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 128 + signal.SIGTERM


def test_turret_health_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["health", "--address", "127.0.0.1:1", "--timeout", "2"]) == 1
    assert "UNAVAILABLE" in capsys.readouterr().err
    with pytest.raises(SystemExit) as raised:
        main(["health", "--address", "127.0.0.1:1", "--tls-ca", "/nonexistent"])
    assert raised.value.code == 2


def test_turret_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["--version"])
    assert raised.value.code == 0
    assert capsys.readouterr().out.strip() == f"turret {turret.__version__}"


def test_the_server_listens_before_torch_is_loaded() -> None:
    slow = "{'torch', 'transformers'}"
    script = f"import sys, turret.server.app; sys.exit(bool({slow} & sys.modules.keys()))"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


async def test_the_state_directory_is_locked_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = StateDir(tmp_path, 0)
    config = Config(
        listen=LISTEN,
        model=ModelConfig(model=tmp_path / "missing"),
        adapters=AdapterConfig(state_dir=tmp_path),
    )
    assert await App(config).run() == EXIT_FAILED
    assert say("STATE_DIR_IN_USE", path=tmp_path) in capsys.readouterr().err
    first.close()


def test_a_log_record_is_one_line_with_its_request_id() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(log.LineFormatter())
    logger = logging.Logger("turret.test")
    logger.addHandler(handler)
    token = log.request_id.set("req 1")
    try:
        # Libraries' warnings may contain text from files, which must not steer a terminal either.
        logger.info("first\nsecond\x1b[2J\x85", extra=log.fields(adapter="sql", path='a "b"\n'))
        try:
            raise ValueError("two\nlines")
        except ValueError:
            logger.exception("broke")
    finally:
        log.request_id.reset(token)
    first, second = stream.getvalue().splitlines()
    message = r"first\\nsecond\\x1b\[2J\\x85"
    assert re.match(rf"[-\d]{{10}}T[:\d]{{8}}\.\d{{3}}Z INFO turret\.test {message} ", first)
    assert first.endswith(r'adapter=sql path="a \"b\"\n" request_id="req 1"')
    traceback = json.loads(second.split("traceback=", 1)[1])
    assert traceback.endswith("ValueError: two\nlines")


@pytest.mark.parametrize("verbose", [False, True])
def test_a_json_log_contains_the_version_and_the_settings(
    verbose: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--log-format", "json", *(["--verbose"] if verbose else []))
    settings = read(*flags, environ={"TURRET_MAX_RANK": "64"})
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(log.JsonFormatter())
    monkeypatch.setattr(logging.getLogger("turret"), "handlers", [handler])
    monkeypatch.setattr(logging.getLogger("turret"), "level", logging.INFO)
    config = settings.config()
    introduce(settings, config)
    said = json.loads(capsys.readouterr().err)
    assert said["version"] == turret.__version__
    settings = said["settings"]
    assert settings["adapters.max_rank"] == {"value": 64, "origin": "TURRET_MAX_RANK"}
    device = {"value": "auto", "origin": "default"} if verbose else None
    assert settings.get("model.device") == device


_PARENT = """
import sys, time
from turret.server.server_process import ServerProcess
server = ServerProcess(environment={"PYTHONPATH": sys.argv[1]})
print(server.process.pid, flush=True)
time.sleep(600)
"""


def _is_there(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux's kernel ends it")
@pytest.mark.parametrize("is_early", [True, False])
def test_a_server_ends_if_its_parent_is_killed(is_early: bool, tmp_path: Path):
    # This replaces the real server, which takes seconds and may end because of its output.
    silent = tmp_path / "turret" / "server" / "cli.py"
    silent.parent.mkdir(parents=True)
    silent.write_text(f"import pathlib, time\npathlib.Path({str(tmp_path / 'up')!r}).touch()\n")
    with silent.open("a") as file:
        file.write("time.sleep(600)\n")
    for package in (silent.parent, silent.parent.parent):
        (package / "__init__.py").touch()
    command = [sys.executable, "-c", _PARENT, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        server = psutil.Process(int(parent.stdout.readline()))
        while not (is_early or (tmp_path / "up").exists()):
            time.sleep(0.01)
        parent.kill()
    end = time.monotonic() + 20.0
    try:
        while _is_there(server):
            assert time.monotonic() < end
            time.sleep(0.02)
    finally:
        if _is_there(server):
            server.kill()


NOBODY = 65534


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory that every user can read, unlike pytest's directories."""
    if os.geteuid() != 0:
        pytest.skip("only root can start a server as another user")
    try:
        subprocess.run([sys.executable, "-c", ""], user=NOBODY, extra_groups=(), check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("another user cannot run this interpreter")
    folder = Path(tempfile.mkdtemp(prefix="turret-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
def test_a_server_needs_to_write_only_its_state_and_its_cache(folder: Path) -> None:
    model = shutil.copytree(twin("llama").folder, folder / "model")
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    for seed, name in enumerate(("a", "private")):
        write_adapter(folder / "adapters", arch_of(model), AdapterSpec(name, rank=4), seed)
    for path in folder.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    (folder / "adapters" / "private" / "adapter_config.json").chmod(0o400)
    for name in ("state", "cache"):
        (folder / name).mkdir()
        os.chown(folder / name, NOBODY, NOBODY)
    before = set(folder.rglob("*"))
    environment = {"XDG_CACHE_HOME": str(folder / "cache"), "HOME": "/nonexistent"}
    flags = ("--model", str(model), "--state-dir", str(folder / "state"))
    start = start_real_server(folder, *flags, environment=environment, user=NOBODY)
    with start as server, TurretClient(server.address) as client:
        client.adapters.load("a", "a")
        client.adapters.upload("b", folder / "adapters" / "a")
        for name in ("a", "b"):
            assert client.generate("a", max_tokens=2, adapters=name)
        assert client.chat("hi", max_tokens=2)
        with pytest.raises(TurretRpcError) as refused:
            client.adapters.load("private", "private")
        assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT
    # No other file was written; start_server checked that the server stopped correctly.
    written = set(folder.rglob("*")) - before
    own = (folder / "state", folder / "cache", folder / "server.log")
    assert not [path for path in written if not any(map(path.is_relative_to, own))]
    assert "internal error" not in (folder / "server.log").read_text()
