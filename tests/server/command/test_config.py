"""Flags, defaults and the checks on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from start_problems import parse, read, refused

from turret.server.basics.settings import format_byte_size, parse_byte_size
from turret.server.cli import main
from turret.server.command.flags import Settings, settings
from turret.server.config import Config, ListenConfig, is_local_address, split_address

TLS = ["--tls-cert", "c", "--tls-key", "k"]


def test_without_flags_every_setting_has_its_default() -> None:
    assert parse() == Config()


def test_flags_reach_their_fields() -> None:
    config = parse(
        "--model", "m", "--device", "cpu", "--dtype", "float32", "--kv-cache-bytes", "1GiB",
        "--max-num-seqs", "8", "--adapter-root", "r", "--adapter-host-bytes", "2GB",
        "--preload", "sql=a/sql", "--preload", "json=b=c", "--address", "[::1]:1",
        "--metrics-address", "none", "--grace-seconds", "0.5", "--insecure",
    )  # fmt: skip
    assert config.model.model == Path("m")
    assert (config.model.device, config.model.dtype) == ("cpu", "float32")
    assert config.cache.kv_cache_bytes == 1 << 30
    assert config.scheduler.max_num_seqs == 8
    assert config.adapters.adapter_root == Path("r")
    assert config.adapters.adapter_host_bytes == 2 * 10**9
    assert config.adapters.preload == (("sql", "a/sql"), ("json", "b=c"))
    assert (config.listen.address, config.listen.metrics_address) == ("[::1]:1", None)
    assert config.lifecycle.grace_seconds == 0.5
    assert config.security.insecure


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("1048576", 1 << 20),
        ("512MiB", 512 << 20),
        ("512mib", 512 << 20),
        ("2GB", 2 * 10**9),
        ("1.5 GiB", 3 << 29),
        ("7kB", 7000),
        ("1TiB", 1 << 40),
    ],
)
def test_byte_sizes(text: str, count: int) -> None:
    assert parse_byte_size(text) == count
    assert parse_byte_size(format_byte_size(count)) == count


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1e9", "12XB", "1 2", "nan", "0x10"])
def test_invalid_byte_sizes_are_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="not a byte size"):
        parse_byte_size(text)


@pytest.mark.parametrize(
    ("arguments", "field", "reason"),
    [
        (["--max-num-seqs", "0"], "scheduler.max_num_seqs", "TOO_SMALL"),
        (
            ["--max-num-seqs", "8", "--max-num-batched-tokens", "7"],
            "scheduler.max_num_batched_tokens",
            "BELOW_OTHER",
        ),
        (["--max-queued-requests", "-1"], "scheduler.max_queued_requests", "TOO_SMALL"),
        (["--kv-cache-bytes", "1000"], "cache.kv_cache_bytes", "TOO_SMALL"),
        (["--kv-cache-bytes", "many"], "cache.kv_cache_bytes", "NOT_A_SIZE"),
        (["--device", "tpu"], "model.device", "NOT_ONE_OF"),
        (["--device", "cuda:"], "model.device", "NOT_ONE_OF"),
        (["--dtype", "bfloat"], "model.dtype", "NOT_ONE_OF"),
        (["--model", ""], "model.model", "EMPTY"),
        (["--adapter-host-bytes", "0"], "adapters.adapter_host_bytes", "TOO_SMALL"),
        (["--max-rank", "0"], "adapters.max_rank", "TOO_SMALL"),
        (["--max-rank", "x"], "adapters.max_rank", "NOT_A_WHOLE_NUMBER"),
        (["--grace-seconds", "-1"], "lifecycle.grace_seconds", "TOO_SMALL"),
        (["--grace-seconds", "nan"], "lifecycle.grace_seconds", "TOO_SMALL"),
        (["--grace-seconds", "3 days"], "lifecycle.grace_seconds", "NOT_A_DURATION"),
        (["--address", "localhost"], "listen.address", "NOT_AN_ADDRESS"),
        (["--address", "localhost:65536"], "listen.address", "NOT_AN_ADDRESS"),
        (["--metrics-address", "::1:9"], "listen.metrics_address", "NOT_AN_ADDRESS"),
        (["--http-address", "unix:/x"], "listen.http_address", "NOT_AN_ADDRESS"),
        (["--http-cors-origin", "*"], "listen.http_cors_origin", "NEEDS_FIELD"),
        (
            ["--http-address", "[::1]:1", "--http-cors-origin", "https://a.example/"],
            "listen.http_cors_origin",
            "NOT_OF_FORM",
        ),
        (["--preload", "noequals"], "adapters.preload", "NOT_NAME_PATH"),
        (["--preload", "a=b"], "adapters.preload.a", "NEEDS_FIELD"),
        (["--adapter-root", "r", "--preload", "a+=b"], "adapters.preload", "NOT_AN_ADAPTER_NAME"),
        (
            ["--adapter-root", "r", "--preload", "a=b", "--preload", "a=c"],
            "adapters.preload",
            "DUPLICATE",
        ),
        (["--tls-cert", "c"], "security.tls_cert", "NEEDS_FIELD"),
        (["--tls-client-ca", "c"], "security.tls_client_ca", "NEEDS_FIELD"),
    ],
)
def test_an_invalid_value_is_reported_by_name(
    arguments: list[str], field: str, reason: str
) -> None:
    assert refused(*arguments) == {(field, reason)}


def test_all_invalid_values_are_reported_at_once() -> None:
    assert refused("--max-rank", "0", "--dtype", "b", "--address", "x", "--tls-key", "k") == {
        ("adapters.max_rank", "TOO_SMALL"),
        ("model.dtype", "NOT_ONE_OF"),
        ("listen.address", "NOT_AN_ADDRESS"),
        ("security.tls_key", "NEEDS_FIELD"),
    }


@pytest.mark.parametrize(
    ("text", "seconds"), [("2", 2.0), ("2.5", 2.5), ("30s", 30.0), ("5min", 300), ("200 ms", 0.2)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse("--grace-seconds", text).lifecycle.grace_seconds == seconds


@pytest.mark.parametrize("name", ["address", "admin_address", "http_address"])
@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "10.0.0.5:1", "example.org:1"])
def test_an_exposed_address_needs_tls_and_tokens(name: str, address: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    for missing in ([], TLS, ["--token-file", "t"]):
        assert refused(flag, address, *missing) == {(f"listen.{name}", "ADDRESS_EXPOSED")}
    parse(flag, address, *TLS, "--token-file", "t")
    parse(flag, address, "--insecure")


def test_a_repeated_flag_adds_a_value() -> None:
    origins = ["--http-cors-origin", "https://a.example", "--http-cors-origin", "http://b:8"]
    config = parse("--http-address", "localhost:1", *origins)
    assert config.listen.http_cors_origin == ("https://a.example", "http://b:8")


def test_local_addresses() -> None:
    for address in ("127.0.0.1:1", "127.8.8.8:1", "localhost:1", "[::1]:1", "unix:/run/t.sock"):
        assert is_local_address(address)
        Config(listen=ListenConfig(address=address))
    assert not is_local_address("localhost.example.org:1")
    assert split_address("[::1]:50051") == ("::1", 50051)


def lines(settings: Settings, *, with_defaults: bool = False) -> list[str]:
    return settings.lines(settings.config(), with_defaults=with_defaults)


def test_every_value_is_shown_with_its_origin() -> None:
    flags = ("--adapter-root", "r", "--preload", "a=b", "--token-file", "t")
    shown = lines(read(*flags, environ={"TURRET_DTYPE": "float32"}), with_defaults=True)
    assert len(shown) == len(settings())
    for line in (
        "cache.kv_cache_bytes = -  (default)",
        "adapters.preload = a=b  (--preload)",
        "model.dtype = float32  (TURRET_DTYPE)",
        "model.model = -  (default)",
    ):
        assert line in shown


def test_settings_are_shown_as_they_were_given() -> None:
    sizes = ("--kv-cache-bytes", "900TB", "--adapter-host-bytes", "3GiB")
    assert lines(read("--metrics-address", "none", *sizes, "--verbose")) == [
        "cache.kv_cache_bytes = 900TB  (--kv-cache-bytes)",
        "adapters.adapter_host_bytes = 3GiB  (--adapter-host-bytes)",
        "listen.metrics_address = none  (--metrics-address)",
        "log.verbose = true  (--verbose)",
    ]


def test_config_show_prints_the_settings_of_a_server(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TURRET_MAX_RANK", "64")
    assert main(["config", "show", "--json", "--dtype", "float16"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert len(shown) == len(settings())
    assert shown["adapters.max_rank"] == {"value": 64, "origin": "TURRET_MAX_RANK"}
    assert shown["model.dtype"] == {"value": "float16", "origin": "--dtype"}
    assert shown["log.verbose"] == {"value": False, "origin": "default"}
    # Only one switch is on by default; the page shows the other defaults.
    assert [name for name, each in shown.items() if each["value"] is True] == ["model.head_screen"]
    assert main(["config", "show"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(settings())
    assert main(["config", "show", "--max-rank", "0"]) == 2
