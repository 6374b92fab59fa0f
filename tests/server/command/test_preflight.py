"""What a start refuses within a second, before torch is there."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkout import ROOT
from safetensors.numpy import save_file
from said import says
from start_problems import found, parse

from turret.server.cli import main
from turret.server.command import preflight
from turret.server.command.preflight import problems
from turret.server.hub.adapters import AdapterHub
from turret.server.models.families import served_types
from turret.training.errors import ConfigError, RunError
from turret.training.run.folder import RunFolder
from turret.training.settings.config import (
    BaseConfig,
    DataConfig,
    MethodConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from turret.training.settings.inputs import check_inputs

ADAPTERS = ROOT / "examples" / "adapters"


def test_a_model_that_cannot_be_served(tmp_path: Path) -> None:
    def said(path: Path | str) -> str:
        (problem,) = found("--model", str(path))
        assert problem.startswith("--model: ")
        return problem

    assert "does not exist" in said(tmp_path / "absent")
    # The system itself takes no such name.
    assert "File name too long" in said("n" * 300)
    assert "has no config.json" in said(tmp_path)
    (tmp_path / "m-Q4.gguf").touch()
    assert said(tmp_path).endswith(f"holds GGUF files; give --model the file, {tmp_path}/m-Q4.gguf")
    (tmp_path / "m-Q4.gguf").unlink()
    assert "is an adapter, not a base model" in said(ADAPTERS / "json")
    config = tmp_path / "config.json"
    config.write_text("{")
    assert "is a file" in said(config)
    assert "is no JSON" in said(tmp_path)
    config.write_text('{"model_type": "bert"}')
    assert f"'bert' is not served; served are {', '.join(served_types())}" in said(tmp_path)
    config.write_text('{"model_type": "llama"}')
    assert "has no model.safetensors" in said(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    assert "pytorch_model.bin" in said(tmp_path)
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "1.safetensors")
    assert "lacks 1 of the 2 files" in said(tmp_path)
    save_file({"b": np.zeros(3, np.float32)}, tmp_path / "2.safetensors")
    (tmp_path / "tokenizer_config.json").touch()
    assert "has no tokenizer.json (nor tokenizer.model)" in said(tmp_path)
    for name in ("tokenizer.model", "vocab.json", "tekken.json", "tokenizer.json"):
        (tmp_path / name).touch()
        assert found("--model", str(tmp_path)) == []
        (tmp_path / name).unlink()
    (tmp_path / "tokenizer.json").touch()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../1"}}')
    assert "'../1', which is not below its directory" in said(tmp_path)
    for damaged in ("{", "[]", "{}", '{"weight_map": {"a": 1}}'):
        (tmp_path / "model.safetensors.index.json").write_text(damaged)
        assert "is damaged" in said(tmp_path)
    config.write_text('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}')
    assert "quantised with 'gptq'" in said(tmp_path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 123\n"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda _: b"", "is empty; copy or download it again"),
        (lambda _: POINTER, "is a Git LFS pointer, .*: `git lfs pull` in the clone fetches it"),
        (lambda data: data[:5], "is cut short: it ends inside its header"),
        (lambda data: data[:40], "is cut short: it ends inside its header"),
        (lambda data: data[:-1], r"is cut short: it has 1,\d\d\d of 1,\d\d\d bytes"),
        (lambda data: data + b"0", r"is damaged: 1,\d\d\d bytes, 1,\d\d\d by its header"),
        (lambda data: data.replace(b"data_offsets", b"DATA_OFFSETS"), "has a damaged header"),
        (lambda _: b"<!doctype html><title>Sign in", "is no safetensors file"),
    ],
)
def test_weights_that_are_not_whole(
    spoil: Callable[[bytes], bytes], said: str, tmp_path: Path
) -> None:
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
    assert re.match(f"--model: {broken} {said}", problem)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_pointer_in_the_place_of_a_models_json(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / name).write_bytes(POINTER)
    (problem,) = found("--model", str(tmp_path))
    assert problem.startswith(f"--model: {tmp_path / name} is a Git LFS pointer, not the file")


def test_adapters_that_are_not_there(tmp_path: Path) -> None:
    said = "does not exist; it is the directory in which every adapter has a directory of its own"
    assert found("--adapter-root", str(tmp_path / "no")) == [
        f"--adapter-root: {tmp_path}/no {said}"
    ]
    (tmp_path / "hotel").mkdir()
    (tmp_path / "hotl.toml").touch()
    said = f"{tmp_path}/hotl does not exist; did you mean '{tmp_path}/hotel'?"
    assert found("--adapter-root", str(tmp_path / "hotl")) == [f"--adapter-root: {said}"]
    root = ("--adapter-root", str(ADAPTERS))
    assert found(*root, "--preload", "a=json") == []
    assert says("NO_SUCH_PATH", closest="json")(found(*root, "--preload", "a=jsn")[0])
    for several in ("a=json,b=sql", "a=json b=sql"):
        assert "names several: repeat --preload for each" in found(*root, "--preload", several)[0]
    assert says("NO_SUCH_PATH", root=ADAPTERS)(found(*root, "--preload", "a=nothing-like-it")[0])
    checkpoint = tmp_path / "run" / "checkpoint-30"
    checkpoint.mkdir(parents=True)
    (checkpoint / "adapter_config.json").touch()
    (checkpoint / "adapter_model.bin").touch()
    root = ("--adapter-root", str(tmp_path))
    is_near = says("NOT_AN_ADAPTER", closest="run/checkpoint-30")
    assert is_near(found(*root, "--preload", "a=run")[0])
    assert says("PICKLE")(found(*root, "--preload", "a=run/checkpoint-30")[0])
    assert says("PATH_OUTSIDE_ROOT")(found(*root, "--preload", "a=../x")[0])
    root = ("--adapter-root", str(ADAPTERS / "json"))
    assert says("NO_SUCH_PATH")(found(*root, "--preload", "json=json")[0])
    assert found(*root, "--preload", "json=.") == []


def test_a_cache_larger_than_the_memory() -> None:
    problem = found("--device", "cpu", "--kv-cache-bytes", "900TB")[0]
    assert problem.startswith("--kv-cache-bytes: ")
    assert "is more than this machine's memory" in problem
    assert found("--device", "cpu", "--kv-cache-bytes", "64MiB") == []


def test_a_state_dir_in_use(tmp_path: Path) -> None:
    assert found("--state-dir", str(tmp_path / "new")) == []
    with (tmp_path / "LOCK").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another server uses" in found("--state-dir", str(tmp_path))[0]
    assert found("--state-dir", str(tmp_path)) == []


def test_paths_that_can_be_no_unix_socket(tmp_path: Path) -> None:
    def said(path: Path) -> list[str]:
        return problems(parse("--address", f"unix:{path}", "--metrics-address", "none"))

    (tmp_path / "a").write_text("")
    for path, why in (
        (tmp_path / "a", "a file already, and no socket; name one that is not there"),
        (tmp_path, f"a directory; name a file in it, such as unix:{tmp_path}/turret.sock"),
        (tmp_path / "a" / "b", None),
    ):
        why = f"{path} is {why}" if why else f"{path.parent} is no directory"
        assert said(path) == [f"--address: {why}"]
    left = tmp_path / "left"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(left))
    # A server that died leaves one behind; the next takes it.
    assert left.exists()
    assert said(left) == said(tmp_path / "new") == []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "used"))
        listener.listen()
        (problem,) = said(tmp_path / "used")
    assert problem == f"--address: {tmp_path}/used is taken: another process listens there"


def test_addresses_that_cannot_be_had() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        (problem,) = problems(parse("--address", "127.0.0.1:0", "--metrics-address", address))
        assert problem.startswith(f"--metrics-address: {address} is taken")
    both = ("--address", "127.0.0.1:1", "--http-address", "127.0.0.1:1")
    assert "is that of --address already" in problems(parse(*both))[-1]
    (problem,) = found("--insecure", "--http-address", "203.0.113.7:80")
    assert "no address of this machine" in problem


def test_a_missing_token_file_is_named(tmp_path: Path) -> None:
    (problem,) = found("--token-file", str(tmp_path / "tokens"))
    assert problem.startswith("--token-file: ")


def key_pair(folder: Path, name: str) -> tuple[str, str]:
    """A certificate that signed itself, and its key, as paths of PEM files."""
    certificate, key = str(folder / f"{name}.crt"), str(folder / f"{name}.key")
    subprocess.run(
        [*("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
         *("-nodes", "-subj", f"/CN={name}", "-keyout", key, "-out", certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    return certificate, key


def test_tls_files_that_are_none_or_no_pair(tmp_path: Path) -> None:
    (certificate, key), (_, other) = key_pair(tmp_path, "a"), key_pair(tmp_path, "b")
    text = str(tmp_path / "text")
    Path(text).write_text("no PEM")
    pair = ("--tls-cert", certificate, "--tls-key")
    assert found(*pair, key, "--tls-client-ca", certificate) == []
    (problem,) = found(*pair, other)
    assert problem == f"--tls-cert, --tls-key: {certificate} and {other} do not belong together"
    assert "hold no PEM" in found("--tls-cert", text, "--tls-key", key)[0]
    (problem,) = found(*pair, key, "--tls-client-ca", text)
    assert problem.startswith(f"--tls-client-ca: {text} holds no certificate (")


def test_a_state_dir_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (problem,) = found("--state-dir", str(tmp_path / "file" / "state"))
    assert f"cannot be made: {tmp_path / 'file'} is a file" in problem
    # What is looked at is left as it was.
    assert found("--state-dir", str(tmp_path / "deep" / "er")) == []
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a file system that takes no files")
def test_a_state_dir_where_the_system_lets_nobody_write() -> None:
    """To the superuser permissions allow it; that it fails is known once it is tried."""
    (problem,) = found("--state-dir", "/proc/x")
    assert problem.startswith("--state-dir: /proc/x cannot be made")
    (problem,) = found("--state-dir", "/proc")
    assert problem.startswith("--state-dir: /proc cannot be written")


def test_a_disk_that_is_full_does_not_keep_a_server_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mkdtemp(**_: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    assert found("--state-dir", str(tmp_path)) == []


def test_directories_that_this_user_may_not_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In place of permissions, which do not hold for the superuser.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(preflight, "check_model", lambda model: "llama")
    root = ("--adapter-root", str(tmp_path), "--preload", "a=b")
    assert found(*root) == [f"--adapter-root: {tmp_path} cannot be read by this user"]
    assert "cannot be written by this user" in found("--state-dir", str(tmp_path))[0]
    assert f"cannot be made in {tmp_path} by" in found("--state-dir", str(tmp_path / "new"))[0]
    with pytest.raises(RunError, match=f"new cannot be made in {tmp_path} by this user; --output"):
        RunFolder(tmp_path / "new").check(resume=False, overwrite=False)


def test_quantised_weights_without_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (problem,) = found()
    assert problem == (
        f"--model: its quantised weights have no place: {tmp_path}/file/turret cannot be made:"
        f" {tmp_path}/file is a file; XDG_CACHE_HOME names another place for them"
    )


def test_the_newest_checkpoint_is_suggested(tmp_path: Path) -> None:
    for number in (500, 1000, 90):
        (tmp_path / "run" / f"checkpoint-{number}").mkdir(parents=True)
        (tmp_path / "run" / f"checkpoint-{number}" / "adapter_config.json").touch()
    (problem,) = found("--adapter-root", str(tmp_path), "--preload", "a=run")
    assert says("NOT_AN_ADAPTER", closest="run/checkpoint-1000")(problem)


def test_a_path_that_is_nowhere_is_no_repository_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file's, which its folder is put before, and one that is typed with ``./``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme").mkdir()
    (tmp_path / "acme" / "s.toml").write_text('[model]\nmodel = "my-model"\n')
    for words, place in (
        (("--config", "acme/s.toml"), "acme/my-model"),
        (("--model", "./org/name"), "org/name"),
    ):
        (problem,) = found(*words)
        assert problem.startswith(f"--model: {tmp_path}/{place} does not exist; a model is a dir")


def test_a_device_an_instruction_set_and_threads_that_are_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preflight, "_torch_version", lambda: "2.13.0+cpu")
    (problem,) = found("--device", "cuda:1")
    assert "cuda:1 was asked for, but torch is installed for CPUs alone" in problem
    monkeypatch.setattr(preflight, "_torch_version", lambda: "2.13.0")
    assert found("--device", "cuda:1") == []
    monkeypatch.setattr(preflight, "missing_for_triton", lambda: "a C compiler")
    (problem,) = found("--device", "cuda:1")
    assert problem.endswith("compiled here: a C compiler must be installed")
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
    with pytest.raises(ConfigError, match=r"^base\.device: cuda was asked for, but torch is ins"):
        check_inputs(config, tmp_path)
    assert main(["convert", str(tmp_path), "--output", "x", "--device", "cuda"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: --device: cuda was asked for, but torch is installed for CPUs")
    (problem,) = found("--threads", "100000")
    assert problem.startswith("--threads: 100000 is more")
    monkeypatch.setenv("TURRET_ISA", "avx51")
    (problem,) = found()
    assert "'avx51' is none of baseline, avx2" in problem
    monkeypatch.setenv("TURRET_ISA", "")
    monkeypatch.setenv("TURRET_NATIVE", "maybe")
    assert found() == ["TURRET_NATIVE: 'maybe' is none of 0, false, no, off, 1, true, yes, on"]
    monkeypatch.setenv("TURRET_NATIVE", "OFF")
    assert found() == []


def test_more_threads_than_processors_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "available_cpus", lambda: 2)
    (note,) = preflight.notes(parse("--threads", "3"))
    assert note.startswith("--threads: 3 of them take turns on 2 processors")
    assert preflight.notes(parse("--threads", "2")) == preflight.notes(parse()) == []
    # What is refused is not noted as well.
    assert preflight.notes(parse("--threads", "9999")) == []


def test_what_is_refused_says_which_variable_asked_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TURRET_ADAPTER_ROOT", str(tmp_path / "no"))
    assert main(["serve", "--address", "127.0.0.1:0", "--metrics-address", "none"]) == 1
    said = capsys.readouterr().err
    assert said.endswith("(adapter_root is from TURRET_ADAPTER_ROOT)\n")


def test_adapters_of_the_hub_need_their_organisation(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(AdapterHub, "check", lambda hub, path: asked.append(path))
    for flags in (("--adapter-hub", "acme"), ("--adapter-hub", "x", "--adapter-hub", "*")):
        config = parse(*flags, "--preload", "a=hub:acme/sql@v1")
        assert config.adapters.preload == (("a", "hub:acme/sql@v1"),)
        assert found(*flags, "--preload", "a=hub:acme/sql@v1") == []
        assert asked.pop() == "hub:acme/sql@v1"
    with pytest.raises(ValueError, match="needs --adapter-hub acme"):
        parse("--adapter-hub", "other", "--preload", "a=hub:acme/sql")
    with pytest.raises(ValueError, match=r"is not hub:org/name\[@revision\]"):
        parse("--adapter-hub", "*", "--preload", "a=hub:sql")
    with pytest.raises(ValueError, match="--preload needs --adapter-root"):
        parse("--adapter-hub", "*", "--preload", "a=hub", "--preload", "b=hub:acme/sql")
    with pytest.raises(ValueError, match="'a/b' is neither '\\*' nor an organisation"):
        parse("--adapter-hub", "a/b")
