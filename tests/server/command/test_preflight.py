"""Problems that the server reports within a second of its start, before it loads torch."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pwd
import socket
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from checkout import ROOT
from safetensors.numpy import save_file
from said import says
from start_problems import found, parse, reasons, refused

from turret.server.basics.confined import Confined, ConfinedError
from turret.server.cli import main
from turret.server.command import preflight
from turret.server.command.preflight import problems
from turret.server.models.families import served_types
from turret.server.models.sources.check import FoundModel
from turret.server.remote import AdapterHub
from turret.server.words import Text, say
from turret.training.run import RunFolder
from turret.training.settings import (
    BaseConfig,
    DataConfig,
    MethodConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from turret.training.settings.checks import check_inputs
from turret.training.words import ConfigError, RunError

ADAPTERS = ROOT / "examples" / "adapters"


def test_a_model_that_cannot_be_served(tmp_path: Path) -> None:
    def said(path: Path | str) -> Text:
        (problem,) = found("--model", str(path))
        assert problem.field == "model.model"
        return problem.text

    assert said(tmp_path / "absent").reason == "MODEL_NOT_FOUND"
    # The system itself does not support such a name.
    assert reasons("--model", "n" * 300) == [("model.model", "FILE_UNREADABLE")]
    assert said(tmp_path).reason == "MODEL_HAS_NO_CONFIG"
    (tmp_path / "m-Q4.gguf").touch()
    assert said(tmp_path).reason == "MODEL_IS_GGUF"
    assert f"{tmp_path}/m-Q4.gguf" in said(tmp_path)
    (tmp_path / "m-Q4.gguf").unlink()
    assert said(ADAPTERS / "json").reason == "MODEL_IS_AN_ADAPTER"
    config = tmp_path / "config.json"
    config.write_text("{")
    assert said(config).reason == "MODEL_IS_A_FILE"
    assert says("NOT_JSON")(said(tmp_path))
    config.write_text('{"model_type": "bert"}')
    assert "bert" in said(tmp_path)
    assert ", ".join(served_types()) in said(tmp_path)
    for kind in (["llama"], {"a": 1}):
        config.write_text(json.dumps({"model_type": kind}))
        assert said(tmp_path).params["key"] == "model_type"
    config.write_text("[" * 100_000)
    assert says("JSON_TOO_NESTED")(said(tmp_path))
    layers = {"num_hidden_layers": 1025}
    for part in (layers, {"text_config": layers}):
        config.write_text(json.dumps({"model_type": "llama", **part}))
        assert said(tmp_path).params["key"] == "num_hidden_layers"
    for key, value in (
        *(("num_attention_heads", 0), ("hidden_size", -64), ("head_dim", 1.5), ("vocab_size", "x")),
        *(("num_hidden_layers", True), ("hidden_size", 10**30), ("rope_theta", 0)),
        *(("rms_norm_eps", float("nan")), ("rope_scaling", 5), ("quantization_config", 5)),
    ):
        config.write_text(json.dumps({"model_type": "llama", key: value}))
        assert said(tmp_path).params["key"] == key
    for scaling in ({"factor": "x"}, {"full_attention": {"factor": float("inf")}}):
        config.write_text(json.dumps({"model_type": "llama", "rope_scaling": scaling}))
        assert said(tmp_path).params["key"] == "factor"
    config.write_text('{"model_type": "llama"}')
    assert said(tmp_path).reason == "MODEL_HAS_NO_WEIGHTS"
    (tmp_path / "pytorch_model.bin").touch()
    assert said(tmp_path).reason == "MODEL_HAS_NO_WEIGHTS"
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "1.safetensors")
    assert said(tmp_path).reason == "FILES_MISSING"
    save_file({"b": np.zeros(3, np.float32)}, tmp_path / "2.safetensors")
    (tmp_path / "tokenizer_config.json").touch()
    assert said(tmp_path).reason == "NO_TOKENIZER"
    for name in ("tokenizer.model", "vocab.json", "tekken.json", "tokenizer.json"):
        (tmp_path / name).touch()
        assert found("--model", str(tmp_path)) == []
        (tmp_path / name).unlink()
    (tmp_path / "tokenizer.json").touch()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../1"}}')
    assert said(tmp_path).reason == "INDEX_LEAVES_DIRECTORY"
    for damaged in ("{", "[]", "{}", '{"weight_map": {"a": 1}}', "[" * 100_000):
        (tmp_path / "model.safetensors.index.json").write_text(damaged)
        assert said(tmp_path).reason == "FILE_DAMAGED"
    config.write_text('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}')
    assert said(tmp_path).reason == "QUANTIZATION_UNSUPPORTED"


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 123\n"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda _: b"", "FILE_DAMAGED"),
        (lambda _: POINTER, "LFS_POINTER"),
        (lambda data: data[:5], "FILE_DAMAGED"),
        (lambda data: data[:40], "FILE_DAMAGED"),
        (lambda data: data[:-1], "FILE_WRONG_SIZE"),
        (lambda data: data + b"0", "FILE_WRONG_SIZE"),
        (lambda data: data.replace(b"data_offsets", b"DATA_OFFSETS"), "FILE_DAMAGED"),
        (lambda _: b"<!doctype html><title>Sign in", "FILE_DAMAGED"),
        (lambda data: data.replace(b'"shape":[300]', b'"shape":[-30]'), "FILE_DAMAGED"),
        (lambda _: (100_000).to_bytes(8, "little") + b"[" * 100_000, "FILE_DAMAGED"),
    ],
)
def test_damaged_weights(spoil: Callable[[bytes], bytes], reason: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    names = ("1.safetensors", "2.safetensors")
    for name in names:
        save_file({name: np.zeros(300, np.float32)}, tmp_path / name, {"format": "pt"})
    index = {"weight_map": dict(zip("ab", names, strict=True))}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "tokenizer.json").touch()
    assert found("--model", str(tmp_path)) == []
    broken = tmp_path / names[1]
    broken.write_bytes(spoil(broken.read_bytes()))
    (problem,) = found("--model", str(tmp_path))
    assert problem.field == "model.model"
    assert says(reason)(problem.text)
    assert str(broken) in problem.text


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_git_lfs_pointer_instead_of_a_json_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / name).write_bytes(POINTER)
    (problem,) = found("--model", str(tmp_path))
    assert problem.field == "model.model"
    assert says("LFS_POINTER")(problem.text)
    assert str(tmp_path / name) in problem.text


def test_missing_adapters(tmp_path: Path) -> None:
    (problem,) = found("--adapter-root", str(tmp_path / "no"))
    assert (problem.field, problem.text.reason) == ("adapters.adapter_root", "FOLDER_MISSING")
    (tmp_path / "hotel").mkdir()
    (tmp_path / "hotl.toml").touch()
    (problem,) = found("--adapter-root", str(tmp_path / "hotl"))
    assert problem.text.params["closest"] == f"{tmp_path}/hotel"
    root = ("--adapter-root", str(ADAPTERS))
    assert found(*root, "--preload", "a=json") == []
    assert says("NO_SUCH_PATH", closest="json")(found(*root, "--preload", "a=jsn")[0].text)
    assert says("NO_SUCH_PATH", root=ADAPTERS)(
        found(*root, "--preload", "a=nothing-like-it")[0].text
    )
    checkpoint = tmp_path / "run" / "checkpoint-30"
    checkpoint.mkdir(parents=True)
    (checkpoint / "adapter_config.json").touch()
    (checkpoint / "adapter_model.bin").touch()
    root = ("--adapter-root", str(tmp_path))
    is_near = says("NOT_AN_ADAPTER", closest="run/checkpoint-30")
    assert is_near(found(*root, "--preload", "a=run")[0].text)
    assert says("PICKLE")(found(*root, "--preload", "a=run/checkpoint-30")[0].text)
    assert says("PATH_OUTSIDE_ROOT")(found(*root, "--preload", "a=../x")[0].text)
    for number in (500, 1000, 90):
        (tmp_path / "runs" / f"checkpoint-{number}").mkdir(parents=True)
        (tmp_path / "runs" / f"checkpoint-{number}" / "adapter_config.json").touch()
    is_newest = says("NOT_AN_ADAPTER", closest="runs/checkpoint-1000")
    assert is_newest(found(*root, "--preload", "a=runs")[0].text)
    root = ("--adapter-root", str(ADAPTERS / "json"))
    assert says("NO_SUCH_PATH")(found(*root, "--preload", "json=json")[0].text)
    assert found(*root, "--preload", "json=.") == []


def test_a_cache_larger_than_the_memory() -> None:
    wanted = ("--device", "cpu", "--kv-cache-bytes")
    assert reasons(*wanted, "900TB") == [("cache.kv_cache_bytes", "ABOVE_MEMORY")]
    assert found(*wanted, "64MiB") == []


def test_a_state_dir_in_use(tmp_path: Path) -> None:
    assert found("--state-dir", str(tmp_path / "new")) == []
    with (tmp_path / "LOCK").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        expected = [("adapters.state_dir", "STATE_DIR_IN_USE")]
        assert reasons("--state-dir", str(tmp_path)) == expected
    assert found("--state-dir", str(tmp_path)) == []


def test_paths_that_cannot_be_unix_sockets(tmp_path: Path) -> None:
    def said(path: Path) -> list[tuple[str, str]]:
        return reasons("--address", f"unix:{path}", "--metrics-address", "none")

    (tmp_path / "a").write_text("")
    for path, why in (
        (tmp_path / "a", "NOT_A_SOCKET"),
        (tmp_path, "NOT_A_SOCKET"),
        (tmp_path / "a" / "b", "FOLDER_MISSING"),
    ):
        assert said(path) == [("listen.address", why)]
    left = tmp_path / "left"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(left))
    # A dead server leaves a socket behind, and the next one reuses the path.
    assert left.exists()
    assert said(left) == said(tmp_path / "new") == []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "used"))
        listener.listen()
        assert said(tmp_path / "used") == [("listen.address", "ADDRESS_TAKEN")]


def test_addresses_that_cannot_be_bound() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        (problem,) = problems(parse("--address", "127.0.0.1:0", "--metrics-address", address))
        assert (problem.field, problem.text.reason) == ("listen.metrics_address", "ADDRESS_TAKEN")
        assert problem.text.params["value"] == address
    both = ("--address", "127.0.0.1:1", "--http-address", "127.0.0.1:1")
    *_, problem = problems(parse(*both))
    assert (problem.text.reason, problem.text.params["other"]) == ("ADDRESS_OF_OTHER", "--address")
    expected = [("listen.http_address", "ADDRESS_OF_ANOTHER_MACHINE")]
    assert reasons("--insecure", "--http-address", "203.0.113.7:80") == expected


def test_a_missing_token_file_is_named(tmp_path: Path) -> None:
    expected = [("security.token_file", "FILE_UNREADABLE")]
    assert reasons("--token-file", str(tmp_path / "tokens")) == expected


def test_a_chat_template_is_checked_before_the_model_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "template"
    for content, reason in (
        (None, "FILE_UNREADABLE"),
        (b"{% if %}", "CHAT_TEMPLATE_INVALID"),
        (b"\xff", "NOT_UTF8"),
        (b"x" * ((256 << 10) + 1), "FILE_TOO_LARGE"),
    ):
        if content is not None:
            file.write_bytes(content)
        assert reasons("--chat-template", str(file)) == [("model.chat_template", reason)]
    file.write_text("{{ messages[0].content }}")
    assert reasons("--chat-template", str(file)) == []
    assert reasons("--chat-template", "chatml") == []

    def ended(*asked: object) -> None:
        raise ConfinedError(say("PROCESS_KILLED"), is_over_limit=False)

    monkeypatch.setattr(Confined, "ask", ended)
    expected = [("model.chat_template", "CHAT_TEMPLATE_UNANSWERED")]
    assert reasons("--chat-template", str(file)) == expected


def key_pair(folder: Path, name: str) -> tuple[str, str]:
    """A self-signed certificate and its key, as paths of PEM files."""
    certificate, key = str(folder / f"{name}.crt"), str(folder / f"{name}.key")
    subprocess.run(
        [*("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
         *("-nodes", "-subj", f"/CN={name}", "-keyout", key, "-out", certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    return certificate, key


def test_tls_files_that_are_invalid_or_do_not_match(tmp_path: Path) -> None:
    (certificate, key), (_, other) = key_pair(tmp_path, "a"), key_pair(tmp_path, "b")
    text = str(tmp_path / "text")
    Path(text).write_text("no PEM")
    pair = ("--tls-cert", certificate, "--tls-key")
    assert found(*pair, key, "--tls-client-ca", certificate) == []
    for files in (
        (*pair, other),
        ("--tls-cert", text, "--tls-key", key),
        (*pair, key, "--tls-client-ca", text),
    ):
        assert reasons(*files) == [("security.tls_cert", "TLS_FILES_UNUSABLE")]


UNUSABLE = [("adapters.state_dir", "PATH_UNUSABLE")]


def test_a_state_dir_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert reasons("--state-dir", str(tmp_path / "file" / "state")) == UNUSABLE
    # The check changes nothing.
    assert found("--state-dir", str(tmp_path / "deep" / "er")) == []
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a file system that takes no files")
def test_a_state_dir_on_a_read_only_file_system() -> None:
    """The superuser has the permission, so only an attempt shows the failure."""
    assert reasons("--state-dir", "/proc/x") == UNUSABLE
    assert reasons("--state-dir", "/proc") == UNUSABLE


def test_a_full_disk_does_not_prevent_startup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mkdtemp(**_: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    assert found("--state-dir", str(tmp_path)) == []


def test_directories_that_this_user_may_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Simulate missing permissions, which do not apply to the superuser.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    model = FoundModel("model", "llama", is_quantized=False, fields={})
    monkeypatch.setattr(preflight, "check_model", lambda _: model)
    root = ("--adapter-root", str(tmp_path), "--preload", "a=b")
    assert reasons(*root) == [("adapters.adapter_root", "FILE_UNREADABLE")]


def test_directories_that_this_user_may_not_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mkdtemp(**_: object) -> str:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    assert reasons("--state-dir", str(tmp_path)) == UNUSABLE
    assert reasons("--state-dir", str(tmp_path / "new")) == UNUSABLE
    with pytest.raises(RunError):
        RunFolder(tmp_path / "new").check(resume=False, overwrite=False)


def test_a_cache_directory_for_quantised_weights_that_cannot_be_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (problem,) = found()
    assert problem.field == "model.model"
    assert f"{tmp_path}/file" in problem.text


def test_a_missing_local_path_is_not_looked_up_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cases: a path in a config file, which is relative to its folder, and one with ``./``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme").mkdir()
    (tmp_path / "acme" / "s.toml").write_text('[model]\nmodel = "my-model"\n')
    for words, place in (
        (("--config", "acme/s.toml"), "acme/my-model"),
        (("--model", "./org/name"), "org/name"),
    ):
        (problem,) = found(*words)
        assert problem.field == "model.model"
        assert f"{tmp_path}/{place} " in problem.text


def test_an_unavailable_device_and_too_many_threads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preflight, "_torch_version", lambda: "2.13.0+cpu")
    assert reasons("--device", "cuda:1") == [("model.device", "TORCH_WITHOUT_CUDA")]
    monkeypatch.setattr(preflight, "_torch_version", lambda: "2.13.0")
    assert found("--device", "cuda:1") == []
    monkeypatch.setattr(preflight, "missing_for_triton", lambda: "a C compiler")
    assert reasons("--device", "cuda:1") == [("model.device", "KERNELS_NEED")]
    assert found("--device", "cpu") == []
    monkeypatch.setattr(preflight, "_torch_version", lambda: "2.13.0+cpu")
    (tmp_path / "t.jsonl").touch()
    config = TrainConfig(
        base=BaseConfig(device="cuda"),
        method=MethodConfig(),
        data=DataConfig(train="t.jsonl"),
        optimizer=OptimizerConfig(),
        run=RunConfig(),
    )
    with pytest.raises(ConfigError) as refused_config:
        check_inputs(config, tmp_path)
    ((key, why),) = refused_config.value.violations
    assert (key, why.reason) == ("base.device", "TORCH_WITHOUT_CUDA")
    assert main(["convert", str(tmp_path), "--output", "x", "--device", "cuda"]) == 1
    assert "--device" in capsys.readouterr().err
    assert reasons("--threads", "100000") == [("model.threads", "TOO_LARGE")]
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")
    assert found() == []
    assert reasons("--otel") == [("OTEL_EXPORTER_OTLP_PROTOCOL", "NOT_ONE_OF")]


def test_an_error_names_the_environment_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TURRET_ADAPTER_ROOT", str(tmp_path / "no"))
    assert main(["serve", "--address", "127.0.0.1:0", "--metrics-address", "none"]) == 1
    assert capsys.readouterr().err.startswith("turret serve: error: TURRET_ADAPTER_ROOT: ")


def test_adapters_of_the_hub_need_their_organisation(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(AdapterHub, "check", lambda hub, path: asked.append(path))
    for flags in (("--adapter-hub", "acme"), ("--adapter-hub", "x", "--adapter-hub", "*")):
        config = parse(*flags, "--preload", "a=hub:acme/sql@v1")
        assert config.adapters.preload == (("a", "hub:acme/sql@v1"),)
        assert found(*flags, "--preload", "a=hub:acme/sql@v1") == []
        assert asked.pop() == "hub:acme/sql@v1"
    place = "adapters.preload.a"
    other = ("--adapter-hub", "other", "--preload", "a=hub:acme/sql")
    assert refused(*other) == {(place, "NEEDS_FIELD")}
    every = ("--adapter-hub", "*")
    assert refused(*every, "--preload", "a=hub:sql") == {(place, "NOT_A_HUB_PATH")}
    both = (*every, "--preload", "a=hub", "--preload", "b=hub:acme/sql")
    assert refused(*both) == {(place, "NEEDS_FIELD")}
    expected = {("adapters.adapter_hub", "NOT_AN_ORGANISATION")}
    assert refused("--adapter-hub", "a/b") == expected


@pytest.mark.parametrize("flag", ["--token-file", "--tls-cert", "--tls-key", "--tls-client-ca"])
def test_a_file_that_would_keep_its_reader_waiting_is_refused(flag: str, tmp_path: Path) -> None:
    for name in ("cert", "key"):
        (tmp_path / name).write_text("")
    os.mkfifo(tmp_path / "fifo")
    tls = ("--tls-cert", str(tmp_path / "cert"), "--tls-key", str(tmp_path / "key"))
    ((field, text),) = found(*tls, flag, str(tmp_path / "fifo"))
    assert field == f"security.{flag[2:].replace('-', '_')}"
    assert (text.reason, text.params["path"]) == ("FILE_UNREADABLE", tmp_path / "fifo")


def test_a_user_without_a_home_directory_gets_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """This happens in a container that runs under a numeric user id."""

    def unknown(uid: int) -> NoReturn:
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    (problem,) = found()
    assert problem.field == "model.model"
    assert problem.text.reason == "NO_HOME_DIRECTORY"
