"""Flags, defaults and the checks on them."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path

import pytest

from turret.server.basics.byte_size import format_byte_size, parse_byte_size
from turret.server.command.flags import add_flags, config_from_args
from turret.server.config import (
    Config,
    ListenConfig,
    SecurityConfig,
    is_local_address,
    split_address,
)

# Every flag of the design, with its default.
DEFAULTS = {
    "model": None,
    "adapter_root": None,
    "adapter_hub": (),
    "address": "127.0.0.1:50051",
    "admin_address": None,
    "metrics_address": "127.0.0.1:9464",
    "http_address": None,
    "http_cors_origin": (),
    "http_allowed_host": (),
    "device": "auto",
    "dtype": "bfloat16",
    "threads": None,
    "head_screen": True,
    "max_num_seqs": None,
    "max_num_batched_tokens": None,
    "kv_cache_bytes": None,
    "adapter_host_bytes": 1 << 30,
    "adapter_device_bytes": None,
    "max_rank": 128,
    "allow_other_base": False,
    "allow_dense_adapters": False,
    "max_queued_requests": 1024,
    "max_queued_bytes": 512 << 20,
    "preempt_after_seconds": 5.0,
    "speculation": "auto",
    "max_requests_per_token": 0,
    "max_requests_per_peer": 0,
    "preload": (),
    "state_dir": None,
    "max_upload_bytes": 2 << 30,
    "token_file": None,
    "tls_cert": None,
    "tls_key": None,
    "tls_client_ca": None,
    "insecure": False,
    "share_prefixes": False,
    "grace_seconds": 30.0,
    "log_format": "text",
    "verbose": False,
}
TLS = ["--tls-cert", "c", "--tls-key", "k"]


def parse(*arguments: str) -> Config:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return config_from_args(parser.parse_args(arguments), {})


def test_every_flag_has_its_default() -> None:
    config = parse()
    values = {}
    for section in dataclasses.fields(config):
        values |= dataclasses.asdict(getattr(config, section.name))
    assert values == DEFAULTS
    assert config == Config()


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
def test_no_byte_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="not a byte size"):
        parse_byte_size(text)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--max-num-seqs", "0"], "--max-num-seqs must be at least 1"),
        (["--max-num-seqs", "8", "--max-num-batched-tokens", "7"], "--max-num-batched-tokens"),
        (["--max-queued-requests", "-1"], "--max-queued-requests"),
        (["--kv-cache-bytes", "1000"], "--kv-cache-bytes"),
        (["--device", "tpu"], "--device"),
        (["--device", "cuda:"], "--device"),
        (["--adapter-host-bytes", "0"], "--adapter-host-bytes"),
        (["--max-rank", "0"], "--max-rank"),
        (["--grace-seconds", "-1"], "--grace-seconds"),
        (["--grace-seconds", "nan"], "--grace-seconds"),
        (["--address", "localhost"], "--address: 'localhost' is not HOST:PORT"),
        (["--address", "localhost:65536"], "--address"),
        (["--metrics-address", "::1:9"], "--metrics-address: .* in brackets"),
        (["--http-address", "unix:/x"], "--http-address: 'unix:/x' is not HOST:PORT"),
        (["--http-cors-origin", "*"], "--http-cors-origin needs --http-address"),
        (
            ["--http-address", "[::1]:1", "--http-cors-origin", "https://a.example/"],
            "--http-cors-origin: 'https://a.example/' is neither",
        ),
        (["--preload", "a=b"], "--preload needs --adapter-root"),
        (["--adapter-root", "r", "--preload", "A=b"], "no adapter name: must be"),
        (["--adapter-root", "r", "--preload", "a=b", "--preload", "a=c"], "given twice"),
        (["--tls-cert", "c"], "--tls-cert and --tls-key need each other"),
        (["--tls-client-ca", "c"], "--tls-client-ca needs"),
    ],
)
def test_a_bad_value_is_refused_by_name(arguments: list[str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [["--preload", "noequals"], ["--kv-cache-bytes", "many"], ["--nothing"]],
)
def test_a_malformed_flag_is_a_usage_error(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        parse(*arguments)
    assert raised.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--address", "--admin-address", "--http-address"])
@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "10.0.0.5:1", "example.org:1"])
def test_an_exposed_address_needs_tls_and_tokens(flag: str, address: str) -> None:
    for missing in ([], TLS, ["--token-file", "t"]):
        told = f"{flag}: {address} is reachable from other machines: set --tls-cert, "
        with pytest.raises(ValueError, match=re.escape(told)):
            parse(flag, address, *missing)
    parse(flag, address, *TLS, "--token-file", "t")
    parse(flag, address, "--insecure")


def test_a_misspelt_localhost_is_told_before_tls_is_asked_for() -> None:
    told = "locahost:1 is reachable from other machines; did you mean 'localhost'? set --tls-cert"
    with pytest.raises(ValueError, match=re.escape(told)):
        parse("--address", "locahost:1")


def test_a_flag_that_is_given_twice_counts_twice() -> None:
    origins = ["--http-cors-origin", "https://a.example", "--http-cors-origin", "http://b:8"]
    config = parse("--http-address", "localhost:1", *origins)
    assert config.listen.http_cors_origin == ("https://a.example", "http://b:8")
    assert "listen.http_cors_origin = https://a.example http://b:8" in config.describe()


def test_local_addresses() -> None:
    for address in ("127.0.0.1:1", "127.8.8.8:1", "localhost:1", "[::1]:1", "unix:/run/t.sock"):
        assert is_local_address(address)
        Config(listen=ListenConfig(address=address))
    assert not is_local_address("localhost.example.org:1")
    assert split_address("[::1]:50051") == ("::1", 50051)


def test_describe_shows_every_value_once() -> None:
    text = parse("--adapter-root", "r", "--preload", "a=b", "--token-file", "t").describe()
    lines = text.splitlines()
    assert len(lines) == len(DEFAULTS)
    assert "cache.kv_cache_bytes = auto" in lines
    assert "adapters.preload = a=b" in lines
    assert "security.token_file = t" in lines
    assert "model.model = -" in lines


def test_what_was_given_is_described_as_it_was_meant() -> None:
    sizes = ("--kv-cache-bytes", "900TB", "--adapter-host-bytes", "3GiB")
    preloads = [part for name in "abcde" for part in ("--preload", f"{name}=x/{name}")]
    given = ("--metrics-address", "none", *sizes, "--adapter-root", "r", *preloads)
    assert parse(*given).changes() == [
        "cache.kv_cache_bytes = 900TB",
        "adapters.adapter_root = r",
        "adapters.adapter_host_bytes = 3GiB",
        "adapters.preload = a=x/a b=x/b c=x/c and 2 more",
        "listen.metrics_address = none",
    ]


def test_tls_and_tokens_alone_are_fine_on_loopback() -> None:
    Config(security=SecurityConfig(token_file=Path("t")))
    assert not SecurityConfig(token_file=Path("t")).is_complete
