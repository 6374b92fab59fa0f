"""What the ``turret`` command says before torch is there: typos, settings, the first checks."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from checkout import ROOT

from turret.server.cli import build_parser, main
from turret.server.command.completion import script
from turret.server.command.flags import add_flags, config_from_args, read_settings
from turret.server.command.preflight import problems
from turret.server.command.settings import settings
from turret.server.config import Config
from turret.server.models.families import served_types

ADAPTERS = ROOT / "examples" / "adapters"


def parse(*arguments: str, environ: Mapping[str, str] | None = None) -> Config:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return config_from_args(parser.parse_args(arguments), environ or {})


def found(*arguments: str) -> list[str]:
    free = ("--address", "127.0.0.1:0", "--metrics-address", "none")
    return problems(parse(*free, *arguments))


def loaded_by(*arguments: str) -> tuple[int, set[str]]:
    """Exit code of a command in a process of its own, and the modules that it imported."""
    code = (
        "import sys\nfrom turret.server.cli import main\n"
        "try: code = main(sys.argv[1:])\nexcept SystemExit as end: code = end.code\n"
        "print('\\nloaded', code or 0, *sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    words = done.stdout.splitlines()[-1].split()
    return int(words[1]), set(words[2:])


def test_help_loads_nothing_that_takes_long() -> None:
    code, modules = loaded_by("--help")
    assert code == 0
    assert not modules & {"torch", "grpc", "rich", "asyncio", "transformers"}


def test_a_client_verb_loads_no_torch_and_not_the_others() -> None:
    code, modules = loaded_by("generate", "x", "--address", "127.0.0.1:1")
    assert code == 1
    assert not modules & {"torch", "transformers", "rich", "turret.server.config"}


def test_wrong_input_ends_before_torch() -> None:
    nothing = ("--model", "no/such", "--adapter-root", "no", "--tls-cert", "a", "--tls-key", "b")
    code, modules = loaded_by("serve", *nothing)
    assert code == 1
    assert not modules & {"torch", "grpc", "transformers", "asyncio"}
    code, modules = loaded_by("train", "run", "no.toml")
    assert code == 1
    assert not modules & {"torch", "peft", "transformers"}


def test_the_short_help_says_what_the_long_one_says() -> None:
    assert build_parser("").format_help() == build_parser(None).format_help()


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["srve"], "did you mean 'serve'?"),
        (["serve", "--adress", "x"], "turret serve: error: .*did you mean '--address'?"),
        (["serve", "--dtype", "bfloat"], "bfloat16"),
        (["adapters", "lst"], "turret adapters: error: .*did you mean 'list'?"),
        (["adapters", "list", "--jsn"], "turret adapters list: .*did you mean '--json'?"),
    ],
)
def test_a_typo_is_two_lines(
    arguments: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    err = capsys.readouterr().err
    assert re.search(meant, err)
    assert err.count("\n") == 2


def test_flags_win_over_variables_and_those_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "turret.toml"
    file.write_text(
        '[adapters]\nmax_rank = 1\nadapter_root = "a"\nadapter_host_bytes = "2GiB"\n'
        '[adapters.preload]\nsql = "x/sql"\n[listen]\nhttp_address = "localhost:1"\n'
        'http_cors_origin = ["http://a:1", "http://b:2"]\n[scheduler]\nmax_num_seqs = 3\n'
        "[lifecycle]\ngrace_seconds = 7\n[security]\ninsecure = true\n"
    )
    environ = {"TURRET_MAX_RANK": "2", "TURRET_MAX_NUM_SEQS": "4", "TURRET_PRELOAD": "a=b, c=d"}
    config = parse("--config", str(file), "--max-num-seqs", "5", environ=environ)
    assert (config.adapters.max_rank, config.scheduler.max_num_seqs) == (2, 5)
    assert config.adapters.adapter_root == tmp_path / "a"
    assert config.adapters.adapter_host_bytes == 2 << 30
    assert config.adapters.preload == (("a", "b"), ("c", "d"))
    assert config.listen.http_cors_origin == ("http://a:1", "http://b:2")
    assert config.lifecycle.grace_seconds == 7.0
    assert config.security.insecure
    assert not parse("--config", str(file), "--no-insecure").security.insecure
    assert parse(environ={"TURRET_CONFIG": str(file)}).adapters.preload == (("sql", "x/sql"),)


def test_every_setting_has_a_variable_and_a_key(tmp_path: Path) -> None:
    """A value that differs from the default, for each, by both ways."""
    values = {
        "model": "m", "device": "cpu", "dtype": "float32", "address": "localhost:1",
        "admin_address": "localhost:2", "metrics_address": "localhost:3", "preload": "a=b",
        "http_address": "localhost:4", "http_cors_origin": "http://a:1", "log_format": "json",
        "speculation": "off",
    }  # fmt: skip
    both = {"tls_cert", "tls_key", "tls_client_ca", "token_file", "adapter_root", "state_dir"}
    tables: dict[str, list[str]] = {}
    environ = {}
    for setting in settings():
        text = values.get(setting.name) or ("p" if setting.name in both else "")
        if not text:
            text = "true" if setting.type is bool else "1048576"
        environ[setting.variable] = text
        bare = setting.type in (bool, int, float)
        shown = text if bare else f'["{text}"]' if setting.is_repeated else f'"{text}"'
        tables.setdefault(setting.section, []).append(f"{setting.name} = {shown}")
    file = tmp_path / "all.toml"
    file.write_text("\n".join(f"[{n}]\n" + "\n".join(keys) for n, keys in tables.items()))
    by_variable, by_file = parse(environ=environ), parse("--config", str(file))
    assert len(by_variable.changes()) == len(by_file.changes()) == len(settings())
    assert [line.partition(" = ")[0] for line in by_file.changes()] == [
        f"{setting.section}.{setting.name}" for setting in settings()
    ]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[listn]\n", r"t.toml: there is no table \[listn\]; did you mean 'listen'\?"),
        ("max_rank = 3\n", r"max_rank belongs into the table \[adapters\]"),
        ("[listen]\nadress = 3\n", r"\[listen\] adress is no setting; did you mean 'address'\?"),
        ("[listen]\nmax_rank = 3\n", r"did you mean \[adapters\] max_rank\?"),
        ("[adapters]\nmax_rank = '3'\n", "adapters.max_rank: must be a whole number, not '3'"),
        ("[adapters]\nmax_rank = true\n", "adapters.max_rank: must be a whole number, not True"),
        ("[adapters]\nmax_rank = 0\n", r"at least 1, not 0 \(max_rank is from .*t.toml\)"),
        ("[cache]\nkv_cache_bytes = 'much'\n", "cache.kv_cache_bytes: 'much' is not a byte size"),
        ("[model]\ndtype = 'bfloat'\n", "model.dtype: .* did you mean 'bfloat16'"),
        ("[security]\ninsecure = 1\n", "security.insecure: must be true or false, not 1"),
        ("[adapters]\npreload = ['a']\n", "adapters.preload: 'a' is not NAME=PATH"),
        ("listen = 3\n", "listen must be a table"),
        ("[", "t.toml: "),
    ],
)
def test_a_bad_file_is_refused_by_key(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "t.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=complaint):
        parse("--config", str(file))


def test_a_bad_variable_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="TURRET_MAX_RANK: 'x' is not a whole number"):
        parse(environ={"TURRET_MAX_RANK": "x"})
    with pytest.raises(ValueError, match=r"at least 1, not 0 \(max_rank is from TURRET_MAX_RANK"):
        parse(environ={"TURRET_MAX_RANK": "0"})
    parser = argparse.ArgumentParser()
    add_flags(parser)
    notes = read_settings(parser.parse_args([]), {"TURRET_MAX_RANKS": "3", "TURRET_ISA": "a"}).notes
    assert notes == ("TURRET_MAX_RANKS is no setting; did you mean 'TURRET_MAX_RANK'?",)


def test_the_start_says_what_differs_and_who_says_so() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    args = parser.parse_args(["--max-rank", "64"])
    read = read_settings(args, {"TURRET_DTYPE": "float32"})
    assert read.describe(read.config()).splitlines() == [
        "model.dtype = float32  (TURRET_DTYPE)",
        "adapters.max_rank = 64",
    ]


def test_a_model_that_cannot_be_served(tmp_path: Path) -> None:
    def said(path: Path | str) -> str:
        (problem,) = found("--model", str(path))
        assert problem.startswith("--model: ")
        return problem

    assert "does not exist" in said(tmp_path / "absent")
    assert "has no config.json" in said(tmp_path)
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
    (tmp_path / "1.safetensors").touch()
    assert "lacks 1 of the 2 files" in said(tmp_path)
    (tmp_path / "2.safetensors").touch()
    assert found("--model", str(tmp_path)) == []
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../1"}}')
    assert "'../1', which is not below its directory" in said(tmp_path)
    for damaged in ("{", "[]", "{}", '{"weight_map": {"a": 1}}'):
        (tmp_path / "model.safetensors.index.json").write_text(damaged)
        assert "is damaged" in said(tmp_path)
    config.write_text('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}')
    assert "quantised with 'gptq'" in said(tmp_path)


def test_adapters_that_are_not_there(tmp_path: Path) -> None:
    assert "does not exist" in found("--adapter-root", str(tmp_path / "no"))[0]
    root = ("--adapter-root", str(ADAPTERS))
    assert found(*root, "--preload", "a=json") == []
    assert "did you mean 'json'?" in found(*root, "--preload", "a=jsn")[0]
    assert "holds " in found(*root, "--preload", "a=nothing-like-it")[0]
    checkpoint = tmp_path / "run" / "checkpoint-30"
    checkpoint.mkdir(parents=True)
    (checkpoint / "adapter_config.json").touch()
    (checkpoint / "adapter_model.bin").touch()
    root = ("--adapter-root", str(tmp_path))
    assert "checkpoint-30 in it is" in found(*root, "--preload", "a=run")[0]
    assert "safe_serialization" in found(*root, "--preload", "a=run/checkpoint-30")[0]
    assert "stay inside it" in found(*root, "--preload", "a=../x")[0]
    root = ("--adapter-root", str(ADAPTERS / "json"))
    assert "whose path below it is '.'" in found(*root, "--preload", "json=json")[0]
    assert found(*root, "--preload", "json=.") == []


def test_a_state_dir_in_use(tmp_path: Path) -> None:
    assert found("--state-dir", str(tmp_path / "new")) == []
    with (tmp_path / "LOCK").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another server uses" in found("--state-dir", str(tmp_path))[0]
    assert found("--state-dir", str(tmp_path)) == []


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


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_verb_and_flag(shell: str) -> None:
    text = script(build_parser(None), shell)
    for word in ("generate", "merge-state", "max-rank", "log-format", "sweep"):
        assert word in text
    if path := shutil.which(shell):
        subprocess.run([path, "-n"], input=text, text=True, check=True)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["turret", "comp"], "completion"),
        (["turret", "adapters", "lo"], "load"),
        (["turret", "serve", "--dty"], "--dtype"),
        (["turret", "serve", "--log-format", ""], "text json"),
    ],
)
def test_bash_completes(words: list[str], expected: str) -> None:
    call = f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; _turret"
    code = script(build_parser(None), "bash") + call + '; echo "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


COMPLETED = [
    ("turret comp", "completion"),
    ("turret adapters unl", "unload"),
    ("turret serve --dty", "--dtype"),
    ("turret serve --log-format j", "json"),
]

# A terminal of its own, in which the line is begun and the tabulator pressed; waits for the rest.
ZSH = """
zmodload zsh/zpty
zpty shell "zsh -f -i"
zpty -w shell "PROMPT=; source $1; print re''ady"
zpty -r -m shell out "*ready*"
zpty -w -n shell "$2"$'\\t'
zpty -r -m shell out "*$3*"
"""


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh")
@pytest.mark.parametrize(("line", "expected"), COMPLETED)
def test_zsh_completes(line: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "script").write_text(script(build_parser(None), "zsh"))
    rest = expected.removeprefix(line.rpartition(" ")[2])
    assert rest not in line
    command = ["zsh", "-f", "-c", ZSH, "zsh", str(tmp_path / "script"), line, rest]
    subprocess.run(command, check=True, timeout=30)


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish")
@pytest.mark.parametrize(("line", "expected"), COMPLETED)
def test_fish_completes(line: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "script").write_text(script(build_parser(None), "fish"))
    code = f"source {tmp_path / 'script'}; complete -C {shlex.quote(line)}"
    done = subprocess.run(
        ["fish", "--no-config", "-c", code], capture_output=True, text=True, check=True
    )
    # Behind what begins with the word come words that hold its letters.
    assert done.stdout.split("\t")[0] == expected


def test_a_model_of_the_hub_in_a_file_is_no_path_of_its_folder(tmp_path: Path) -> None:
    file = tmp_path / "t.toml"
    file.write_text('[model]\nmodel = "org/name@v1"\n')
    assert parse("--config", str(file)).model.model == Path("org/name@v1")
    (tmp_path / "org" / "name@v1").mkdir(parents=True)
    assert parse("--config", str(file)).model.model == tmp_path / "org" / "name@v1"
    file.write_text('[model]\nmodel = "/org/name"\n')
    assert parse("--config", str(file)).model.model == Path("/org/name")


def test_adapters_of_the_hub_need_their_organisation() -> None:
    for flags in (("--adapter-hub", "acme"), ("--adapter-hub", "x", "--adapter-hub", "*")):
        config = parse(*flags, "--preload", "a=hub:acme/sql@v1")
        assert config.adapters.preload == (("a", "hub:acme/sql@v1"),)
        assert found(*flags, "--preload", "a=hub:acme/sql@v1") == []
    with pytest.raises(ValueError, match="needs --adapter-hub acme"):
        parse("--adapter-hub", "other", "--preload", "a=hub:acme/sql")
    with pytest.raises(ValueError, match=r"is not hub:org/name\[@revision\]"):
        parse("--adapter-hub", "*", "--preload", "a=hub:sql")
    with pytest.raises(ValueError, match="--preload needs --adapter-root"):
        parse("--adapter-hub", "*", "--preload", "a=hub", "--preload", "b=hub:acme/sql")
    with pytest.raises(ValueError, match="'a/b' is neither '\\*' nor the name of one"):
        parse("--adapter-hub", "a/b")
