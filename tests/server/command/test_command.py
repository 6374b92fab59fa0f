"""Messages of the ``turret`` command before torch is loaded: typos, settings, the first checks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT
from command_modules import loaded_and_said_by, loaded_by
from start_problems import parse, read

from turret.server.basics.settings import SettingsError, is_listed, is_path, is_switch
from turret.server.cli import build_parser, main
from turret.server.command.flags import settings, unknown_variables, variable_of
from turret.server.words import say as server_say
from turret.training.words import say


@pytest.mark.parametrize(("verb", "more"), [((), {"rich", "asyncio"}), (("serve",), set())])
def test_help_imports_no_slow_module(verb: tuple[str, ...], more: set[str]) -> None:
    code, modules = loaded_by(*verb, "--help")
    assert code == 0
    assert not modules & {"torch", "grpc", "transformers", *more}


def test_a_client_verb_imports_neither_torch_nor_other_verbs() -> None:
    code, modules = loaded_by("generate", "x", "--address", "127.0.0.1:1")
    assert code == 1
    assert not modules & {"torch", "transformers", "rich", "turret.server.config", "pydantic"}


def test_invalid_input_is_rejected_before_torch_is_loaded(tmp_path: Path) -> None:
    nothing = ("--model", "no/such", "--adapter-root", "no", "--tls-cert", "a", "--tls-key", "b")
    code, modules = loaded_by("serve", *nothing)
    assert code == 1
    assert not modules & {"torch", "grpc", "transformers"}
    (tmp_path / "misspelt").mkdir()
    (tmp_path / "misspelt" / "adapter_config.json").write_text('{"peft_type": "LROA"}')
    (tmp_path / "misspelt" / "adapter_model.safetensors").write_bytes(b"")
    preload = ("--adapter-root", str(tmp_path), "--preload", "m=misspelt")
    code, modules, err = loaded_and_said_by("serve", "--address", "127.0.0.1:0", *preload)
    assert code == 1
    assert "--preload m: " in err
    assert "LROA" in err
    assert not modules & {"torch", "grpc", "transformers"}
    (tmp_path / "t.toml").write_text('[data]\ntrain = "t.jsonl"\n')
    (tmp_path / "t.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for arguments in (
        ("train", "run", "no.toml"),
        ("convert", str(tmp_path / "lora"), "--output", str(tmp_path / "new")),
        ("train", "plan", str(tmp_path / "t.toml")),
        ("convert", str(tmp_path / "no"), "--output", str(tmp_path / "new")),
    ):
        code, modules = loaded_by(*arguments)
        assert code == (2 if "no.toml" in arguments else 1)
        assert not modules & {"torch", "peft", "transformers"}


@pytest.mark.parametrize(
    ("adapter", "flags", "said"),
    [
        ("empty", (), say("NOT_PEFT_FOLDER", path="{}/empty", file="adapter_config.json")),
        ("damaged", (), server_say("ADAPTER_UNUSABLE", path="{}/damaged", found="")),
        ("psoft", (), say("NEEDS_BASE", method="PSOFT")),
        ("psoft", ("--base", "/no/such"), f"--base: {say('BASE_NOT_FOUND', path='/no/such')}"),
        ("psoft", ("--base", "{}/empty"), "--base: {}/empty "),
        ("psoft", ("--base", "x.gguf"), f"--base: {say('BASE_IS_GGUF', path='x.gguf')}"),
        ("psoft", ("--output", "{}/psoft"), say("PATH_EXISTS", path="{}/psoft")),
    ],
)
def test_an_invalid_conversion_is_rejected_before_torch_is_loaded(
    adapter: str, flags: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    for name, config in (("damaged", "{"), ("psoft", '{"peft_type": "PSOFT"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(config)
    (tmp_path / "empty").mkdir()
    more = [flag.format(tmp_path) for flag in flags]
    arguments = ("convert", str(tmp_path / adapter), "--output", str(tmp_path / "new"), *more)
    code, modules, err = loaded_and_said_by(*arguments)
    assert code == 1
    assert err.startswith(f"error: {said.format(tmp_path)}")
    assert len(err.splitlines()) == 1
    assert not modules & {"torch", "peft", "transformers"}


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("method.targets", "q_prj", say("EMPTY", closest="q_proj").removeprefix(say("EMPTY"))),
        ("method.rank", "4", say("KEY_UNSUPPORTED_BY", method="ia3", choices="targets")),
        ("data.packing", "true", say("VALUE_UNSUPPORTED_BY", value="true", method="prefix_tuning")),
        ("method.components", '["a", "b"]', say("FOLDER_MISSING", path="a")),
        ("method.rank", "3", say("ODD_RANK", value=3)),
        ("data.validation", "./t.jsonl", say("IS_TRAINING_FILE", path="t.jsonl")),
    ],
)
def test_contradictory_settings_are_rejected_before_torch_is_loaded(
    key: str, value: str, complaint: str, tmp_path: Path
) -> None:
    methods = {"method.rank": "hra" if value == "3" else "ia3", "data.packing": "prefix_tuning"}
    method = methods.get(key, "learned_fusion" if key == "method.components" else "lora")
    (tmp_path / "t.toml").write_text('[data]\ntrain = "t.jsonl"\n')
    (tmp_path / "t.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    arguments = ("--method", method, "--set", f"{key}={value}")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        code, modules, err = loaded_and_said_by("train", "run", "t.toml", *arguments)
    assert code == 1
    assert err.startswith(f"error: --set {key}: ")
    assert err.endswith(f"{complaint}\n")
    assert not modules & {"torch", "peft", "transformers"}


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("turret.server.cli", -signal.SIGINT),
        ("turret.server.command.flags", -signal.SIGINT),
        ("turret.server.app", 130),
        # C++ calls Python there, so an exception would abort the process.
        ("torch._C", 130),
    ],
)
def test_an_interrupt_while_modules_load_leaves_no_traceback(
    module: str, code: int, tmp_path: Path
) -> None:
    (tmp_path / "t.toml").write_text('[data]\ntrain = "t.jsonl"\n')
    (tmp_path / "t.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    serve = ["serve", "--address", "127.0.0.1:0", "--metrics-address", "none"]
    train = ["train", "run", f"{tmp_path}/t.toml"]
    command = train if module == "torch._C" else serve
    program = (
        "import os, signal, sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == {module!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from turret.server.command.entry import main\n"
        f"sys.argv[1:] = {command!r}\n"
        "sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    # The process does not end with an exception; after one, it would print how to continue.
    assert command is serve or done.stderr.endswith("\nstopped\n")


def test_the_usage_shows_required_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["adapters", "fuse", "--help"])
    assert " -a NAME" in capsys.readouterr().out.partition("\n\n")[0]


def test_the_help_is_the_same_without_heavy_imports() -> None:
    assert build_parser("").format_help() == build_parser(None).format_help()


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["srve"], '"serve"'),
        (["merge", "-a", "json"], '"turret adapters merge"'),
        (["serve", "--adress", "x"], 'turret serve: error: .*"--address"'),
        (["eval", "x.jsonl", "--limit", "x"], "--limit: "),
        (
            ["eval", "x.jsonl", "--metric", "macro_f1"],
            "--metric: ",
        ),
        # A prefix of a flag is not accepted, because a later version may add such a flag.
        (["generate", "--max-token", "3", "x"], '"--max-tokens"'),
        (["serve", "--max", "3"], '"--max"\n'),
        (["adapters", "lst"], 'turret adapters: error: .*"list"'),
        (["--versoin"], '"--versoin"; .*"--version"'),
        (["serve", "--max-lora-rank", "64"], '"--max-rank"'),
        (["train", "rum", "x"], '"run"'),
        # A common prefix alone does not make a flag similar.
        (["score", "--max-tokens", "5", "x"], '"--max-tokens"\n'),
        (["generate", "--adres=x"], '"--adres"; .*"--address"'),
        (["generate", "hi", "there"], server_say("UNQUOTED_TEXT", count=1, values="there")),
        (["adapters", "list", "hi"], "turret adapters list: error: .*hi\n"),
        (["health", "a", "b"], server_say("UNEXPECTED_ARGUMENTS", count=2, values="a b")),
        (["demo", "--once", "extra"], "turret demo: error: .*extra\n"),
        (["generate", "--max-tokens", "1.5", "x"], say("NOT_A_WHOLE_NUMBER", value='"1.5"')),
        (["generate", "--top-p", "much", "x"], say("NOT_A_NUMBER", value='"much"')),
        (["adapters", "list", "--jsn"], 'turret adapters list: .*"--json"'),
        (["adapters", "load", "x"], "PATH: "),
        (["adapters", "fuse"], "NAME: .*; --adapter: "),
        (["generate", "-x"], '"-x"'),
        (["adapters"], "ACTION: "),
        (["serve", "--max-rank"], "--max-rank: "),
        (["generate", "x", "--json=1"], "--json: "),
        (["generate", "x", "-a"], "--adapter: "),
        (["generate", "x", "--token", "a", "--token-from", "b"], "--token-from: .*--token\n"),
        (["compile", "--compute-capability", "7.5"], "--compute-capability: .*8.0.*7.5"),
        (["train", "sweep", "--ranks", "0"], "--ranks: "),
    ],
)
def test_a_typo_is_reported_on_two_lines(
    arguments: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    err = capsys.readouterr().err
    assert re.search(meant, err)
    assert err.count("\n") == 2


def test_flags_override_variables_and_variables_override_the_file(tmp_path: Path) -> None:
    file = tmp_path / "turret.toml"
    file.write_text(
        '[adapters]\nmax_rank = 1\nadapter_root = "a"\nadapter_host_bytes = "2GiB"\n'
        '[adapters.preload]\nsql = "x/sql"\n[listen]\nhttp_address = "localhost:1"\n'
        'http_cors_origin = ["http://a:1", "http://b:2"]\n[scheduler]\nmax_num_seqs = 3\n'
        "[lifecycle]\ngrace_seconds = 7\n[security]\ninsecure = true\n",
        # The encoding of Notepad on Windows.
        encoding="utf-8-sig",
        newline="\r\n",
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
    """Both set each setting to a value that differs from the default."""
    values = {
        "model": "m", "device": "cpu", "dtype": "float32", "address": "localhost:1",
        "admin_address": "localhost:2", "metrics_address": "localhost:3", "preload": "a=b",
        "http_address": "localhost:4", "http_cors_origin": "http://a:1", "log_format": "json",
        "speculation": "off", "adapter_hub": "o", "http_allowed_host": "h",
        "metrics_aliases": "vllm", "skip_modules": "m", "adapter_remote": "s3://b",
    }  # fmt: skip
    tables: dict[str, list[str]] = {}
    environ = {}
    for name, (table, info) in settings().items():
        text = values.get(name) or ("p" if is_path(info) else "1048576")
        if is_switch(info):
            text = str(not info.default).lower()
        environ[variable_of(name)] = text
        bare = is_switch(info) or text == "1048576"
        shown = text if bare else f'["{text}"]' if is_listed(info) else f'"{text}"'
        tables.setdefault(table, []).append(f"{name} = {shown}")
    file = tmp_path / "all.toml"
    file.write_text("\n".join(f"[{n}]\n" + "\n".join(keys) for n, keys in tables.items()))
    by_variable, by_file = read(environ=environ), read("--config", str(file))
    for name, (table, info) in settings().items():
        one, other = (getattr(getattr(s.config(), table), name) for s in (by_variable, by_file))
        assert one != info.default
        assert other == (tmp_path / one if is_path(info) else one)
        assert by_variable.origin(table, name) == variable_of(name)
        assert by_file.origin(table, name) == str(file)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[listn]\n", {("listn", "UNKNOWN_FIELD", "listen")}),
        ("max_rank = 3\n", {("max_rank", "UNKNOWN_FIELD", "adapters.max_rank")}),
        ("[listen]\nadress = 3\n", {("listen.adress", "UNKNOWN_FIELD", "listen.address")}),
        ("[listen]\nmax_rank = 3\n", {("listen.max_rank", "UNKNOWN_FIELD", "adapters.max_rank")}),
        ("[adapters]\nmax_rank = true\n", {("adapters.max_rank", "NOT_A_WHOLE_NUMBER", None)}),
        ("[adapters]\nmax_rank = '3'\n", {("adapters.max_rank", "NOT_A_WHOLE_NUMBER", None)}),
        ("[adapters]\nmax_rank = 0\n", {("adapters.max_rank", "TOO_SMALL", None)}),
        ("[cache]\na = 1\na = 2\n", {("t.toml", "NOT_TOML", None)}),
        ("[cache]\nkv_cache_bytes = 'x'\n", {("cache.kv_cache_bytes", "NOT_A_SIZE", None)}),
        ("[model]\ndtype = 'bfloat'\n", {("model.dtype", "NOT_ONE_OF", "bfloat16")}),
        ("[adapters]\npreload = 3\n", {("adapters.preload", "NOT_A_LIST", None)}),
        ("[security]\ninsecure = 1\n", {("security.insecure", "NOT_TRUE_OR_FALSE", None)}),
        ("[security]\ninsecure = 'yes'\n", {("security.insecure", "NOT_TRUE_OR_FALSE", None)}),
        (
            "[cache]\nkv_cache_bytes = true\n",
            {("cache.kv_cache_bytes", "NOT_A_WHOLE_NUMBER", None)},
        ),
        ("[adapters]\npreload = [1]\n", {("adapters.preload", "NOT_A_LIST", None)}),
        ("[adapters]\npreload = ['a']\n", {("adapters.preload", "NOT_NAME_PATH", None)}),
        ("[adapters.preload]\na = 5\n", {("adapters.preload", "NOT_A_STRING", None)}),
        ("[adapters.preload]\na.b = 5\n", {("adapters.preload", "NOT_A_STRING", None)}),
        ("listen = 3\n", {("listen", "NOT_A_TABLE", None)}),
        ("[", {("t.toml", "NOT_TOML", None)}),
        ("[model]\nmodel = ''\n", {("model.model", "EMPTY", None)}),
        ("[listen]\naddress = ''\n", {("listen.address", "NOT_AN_ADDRESS", None)}),
        (
            "a = 3\n[b]\n[cache]\nc = 1\n[adapters]\nmax_rank = 0\n",
            {
                ("a", "UNKNOWN_FIELD", None),
                ("b", "UNKNOWN_FIELD", None),
                ("cache.c", "UNKNOWN_FIELD", None),
                ("adapters.max_rank", "TOO_SMALL", None),
            },
        ),
    ],
)
def test_an_invalid_file_is_reported_by_key(
    tmp_path: Path, text: str, expected: set[tuple[str, str, str | None]]
) -> None:
    file = tmp_path / "t.toml"
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        parse("--config", str(file))
    assert {
        (field.removeprefix(f"{tmp_path}/"), text.reason, text.params.get("closest"))
        for field, text in caught.value.violations
    } == expected


def test_an_invalid_setting_is_reported_with_its_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TURRET_MAX_RANK", "x")
    file = tmp_path / "t.toml"
    file.write_text("[scheduler]\nmax_num_seqs = 0\n[listn]\n[model.dtype]\n")
    assert main(["serve", "--config", str(file), "--grace-seconds", "x"]) == 2
    places = [line.split(": ")[2:-1] for line in capsys.readouterr().err.splitlines()]
    assert sorted(places) == sorted(
        [
            [str(file), "scheduler.max_num_seqs"],
            [str(file), "listn"],
            [str(file), "model.dtype"],
            ["TURRET_MAX_RANK"],
            ["--grace-seconds"],
        ]
    )


def test_every_verb_warns_about_a_misspelt_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A port without a listener.
    asked = ["--address", "127.0.0.1:1"]
    for name in ("TURRET_TOKEN", "TURRET_ISA", "TURRET_CONFIG", "TURRET_HEALTH_FLAGS"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("TURRET_MAX_RANK", "3")
    assert unknown_variables(os.environ) == ()
    assert main(["health", *asked]) == 1
    assert not capsys.readouterr().err.startswith("turret health: note: ")
    monkeypatch.setenv("TURRET_ADRESS", "10.0.0.1:50051")
    ((field, text),) = unknown_variables(os.environ)
    assert (field, text.params["closest"]) == ("TURRET_ADRESS", "TURRET_ADDRESS")
    for words in (
        ["health", *asked],
        ["adapters", "list", *asked],
        ["generate", "hi", *asked],
        ["train", "plan", "there-is-none.toml"],
    ):
        assert main(words) != 0
        first = capsys.readouterr().err.splitlines()[0]
        assert first == f"turret {words[0]}: note: TURRET_ADRESS: {text}"


def test_help_fits_in_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    waiting = [build_parser(None)]
    for parser in waiting:
        assert not [line for line in parser.format_help().splitlines() if len(line) > 80]
        below = (action.choices for action in parser._actions)
        waiting += [verb for each in below if isinstance(each, dict) for verb in each.values()]


def test_a_hub_model_in_a_file_is_not_treated_as_a_relative_path(tmp_path: Path) -> None:
    file = tmp_path / "t.toml"
    file.write_text('[model]\nmodel = "org/name@v1"\n')
    assert parse("--config", str(file)).model.model == Path("org/name@v1")
    (tmp_path / "org" / "name@v1").mkdir(parents=True)
    assert parse("--config", str(file)).model.model == tmp_path / "org" / "name@v1"
    file.write_text('[model]\nmodel = "/org/name"\n')
    assert parse("--config", str(file)).model.model == Path("/org/name")
