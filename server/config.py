"""What an operator can set: one frozen dataclass per concern.

Each field carries its help text (with the unit) as metadata; ``server/command`` derives flags, the
file's keys and the variables from it. ``__post_init__`` rejects a bad value with a ``ValueError``
that names the flag.
"""

# ruff: noqa: RUF009 -- `_flag` only calls `dataclasses.field`.

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from turret.server.basics.address import is_local_address, split_address
from turret.server.basics.byte_size import GIB, MIB, format_byte_size
from turret.server.basics.closest import did_you_mean
from turret.server.basics.hub_id import ADAPTER_NAME, HUB_SCHEME, HubId, no_adapter_name

# Defaults on a CPU. On CUDA they depend on free memory.
KV_CACHE_BYTES = 256 * MIB
ADAPTER_DEVICE_BYTES = 512 * MIB

# Number of --preload entries in the startup log; each is logged again when it is loaded.
_PRELOADS_SHOWN = 3

# The Origin header of browsers: no path and no trailing slash.
_HOST = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?", re.IGNORECASE)
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#]+")

_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")


def _flag(default: Any, help_text: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help_text, **metadata})


def _at_least(config: object, least: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        # This form also rejects NaN.
        if value is not None and not value >= least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which base model, where and in which precision."""

    model: Path | None = _flag(
        None,
        "base model: a directory in Hugging Face format, org/name[@revision] of the hub, or a .gguf"
        " file (default: the embedded model)",
        metavar="DIR|ORG/NAME|FILE",
        hub=True,
    )
    device: str = _flag(
        "auto",
        "where the model runs: auto, cpu, cuda or cuda:N, the N-th visible device from 0",
        metavar="DEVICE",
    )
    dtype: Literal["bfloat16", "float16", "float32"] = _flag(
        "bfloat16", "dtype of activations and of the weights that are not 4-bit"
    )

    threads: int | None = _flag(
        None,
        "threads that compute on a CPU (default: OMP_NUM_THREADS, else the processors that affinity"
        " and the container's quota allow)",
        unit="threads",
    )
    head_screen: bool = _flag(
        True,
        "keep an int8 copy of the output head on a CPU, half of the head's bytes, from which the"
        " tokens of greedy steps are told: without it the same tokens, slower (default: keep it)",
    )

    def __post_init__(self) -> None:
        _at_least(self, 1, "threads")
        if not _DEVICE.fullmatch(self.device):
            said = repr(self.device) + did_you_mean(self.device, ("auto", "cpu", "cuda", "cuda:0"))
            raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, not {said}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Memory of the sequences in flight."""

    kv_cache_bytes: int | None = _flag(
        None,
        "size of the paged KV cache (default: 256MiB; on CUDA what the largest step leaves free)",
        unit="bytes",
    )

    def __post_init__(self) -> None:
        _at_least(self, MIB, "kv_cache_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """How many requests wait, run and fit into one step."""

    max_num_seqs: int | None = _flag(
        None, "sequences running at once (default: 64; on CUDA 256)", unit="sequences"
    )
    max_num_batched_tokens: int | None = _flag(
        None, "tokens computed in one step (default: 512; on CUDA 2048)", unit="tokens"
    )
    max_queued_requests: int = _flag(
        1024, "requests waiting before new ones get RESOURCE_EXHAUSTED", unit="requests"
    )
    max_queued_bytes: int = _flag(
        512 * MIB,
        "memory of requests that wait or run, messages and unread answers too, before new"
        " ones get RESOURCE_EXHAUSTED",
        unit="bytes",
    )
    preempt_after_seconds: float = _flag(
        5.0,
        "how long a request waits before a mix that was served more yields a place; 0 is for ever",
        unit="seconds",
    )
    speculation: Literal["auto", "prompt", "off"] = _flag(
        "auto",
        "on a CPU, guess tokens and check several in one step, where that pays; answers stay the"
        " same. auto guesses from the request and its adapters' earlier answers, prompt from the"
        " request alone",
    )
    max_requests_per_token: int = _flag(
        0, "waiting and running requests of one bearer token; 0 is no limit", unit="requests"
    )
    max_requests_per_peer: int = _flag(
        0, "waiting and running requests of one client address; 0 is no limit", unit="requests"
    )

    def __post_init__(self) -> None:
        _at_least(self, 0, "preempt_after_seconds", "max_requests_per_token")
        _at_least(self, 0, "max_requests_per_peer")
        _at_least(self, 1, "max_num_seqs", "max_num_batched_tokens", "max_queued_requests")
        _at_least(self, MIB, "max_queued_bytes")
        tokens, seqs = self.max_num_batched_tokens, self.max_num_seqs
        if tokens is not None and seqs is not None and tokens < seqs:
            raise ValueError(
                "--max-num-batched-tokens must be at least --max-num-seqs: every running sequence "
                f"decodes one token a step ({tokens} < {seqs})"
            )

    def sizes(self, device_type: str) -> tuple[int, int]:
        """``max_num_seqs`` and ``max_num_batched_tokens``, with a device's defaults.

        One that was set and one that was not never contradict each other.
        """
        seqs, tokens = (256, 2048) if device_type == "cuda" else (64, 512)
        if self.max_num_seqs is not None:
            seqs, tokens = self.max_num_seqs, max(tokens, self.max_num_seqs)
        if self.max_num_batched_tokens is not None:
            tokens = self.max_num_batched_tokens
        return min(seqs, tokens), tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """Which adapters may be loaded and how much memory they may take."""

    adapter_root: Path | None = _flag(
        None, "the only directory adapters are loaded from (default: loading is refused)"
    )
    state_dir: Path | None = _flag(
        None,
        "directory that registrations survive a restart in, and that uploads and fused adapters are"
        " kept in; one server and one base model each (default: neither)",
    )
    adapter_hub: tuple[str, ...] = _flag(
        (),
        "organisation or user of the Hugging Face hub whose adapters may be loaded, as"
        " hub:org/name[@revision], or '*' for all; repeatable",
        metavar="ORG",
    )
    max_upload_bytes: int = _flag(
        2 * GIB, "most bytes of one adapter that is uploaded or fetched from the hub", unit="bytes"
    )
    adapter_host_bytes: int = _flag(GIB, "host memory for adapter weights", unit="bytes")
    adapter_device_bytes: int | None = _flag(
        None,
        "device memory for adapter weights (default: 512MiB; on CUDA an eighth of what is free)",
        unit="bytes",
    )
    max_rank: int = _flag(128, "highest rank of an adapter", unit="rank")
    allow_other_base: bool = _flag(
        False, "serve adapters that say they were trained for another base model, if shapes fit"
    )
    allow_dense_adapters: bool = _flag(
        False, "serve adapters whose updates are as large as the weights they change"
    )
    preload: tuple[tuple[str, str], ...] = _flag(
        (),
        "adapter to load before serving, its path relative to --adapter-root or"
        " hub:org/name[@revision]; repeatable",
    )

    def __post_init__(self) -> None:
        _at_least(self, 1, "adapter_host_bytes", "adapter_device_bytes", "max_rank")
        _at_least(self, 1, "max_upload_bytes")
        names = [name for name, _ in self.preload]
        for name in names:
            if not ADAPTER_NAME.fullmatch(name):
                raise ValueError(f"--preload: {no_adapter_name(name)}")
            if names.count(name) > 1:
                raise ValueError(f"--preload: the name {name!r} is given twice")
        for org in self.adapter_hub:
            if org != "*" and HubId.find(f"{org}/name") is None:
                raise ValueError(f"--adapter-hub: {org!r} is neither '*' nor an organisation")
        for name, path in self.preload:
            if not path.startswith(HUB_SCHEME):
                if self.adapter_root is None:
                    raise ValueError("--preload needs --adapter-root")
                continue
            hub_id = HubId.find(path.removeprefix(HUB_SCHEME))
            if hub_id is None:
                raise ValueError(f"--preload {name}: {path!r} is not hub:org/name[@revision]")
            if not {"*", hub_id.org} & set(self.adapter_hub):
                raise ValueError(f"--preload {name}: {path!r} needs --adapter-hub {hub_id.org}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenConfig:
    """Where the server listens. Port 0 picks a free port."""

    address: str = _flag("127.0.0.1:50051", "HOST:PORT or unix:PATH of the gRPC server")
    admin_address: str | None = _flag(
        None, "separate HOST:PORT for the Adapters service (default: on --address)"
    )
    metrics_address: str | None = _flag(
        "127.0.0.1:9464", "HOST:PORT of the Prometheus endpoint, or 'none'"
    )
    http_address: str | None = _flag(
        None, "HOST:PORT of the OpenAI-compatible HTTP server (default: none)"
    )
    http_cors_origin: tuple[str, ...] = _flag(
        (),
        "origin whose pages may call the HTTP server, as https://example.org, or '*'; repeatable",
        metavar="ORIGIN",
    )
    http_allowed_host: tuple[str, ...] = _flag(
        (),
        "host name that the HTTP server may be called by, beside localhost and addresses, or '*';"
        " without tokens other names are refused; repeatable",
        metavar="NAME",
    )

    def __post_init__(self) -> None:
        for name in ("address", "admin_address", "metrics_address", "http_address"):
            value = getattr(self, name)
            takes_path = name in ("address", "admin_address")
            if value is None or (takes_path and value.startswith("unix:") and value != "unix:"):
                continue
            try:
                split_address(value)
            except ValueError as error:
                other = "" if name == "address" else ", nor 'none'"
                raise ValueError(f"--{name.replace('_', '-')}: {error}{other}") from None
        for flag, values, form, shown in (
            ("--http-cors-origin", self.http_cors_origin, _ORIGIN, "SCHEME://HOST[:PORT]"),
            ("--http-allowed-host", self.http_allowed_host, _HOST, "a name without a port"),
        ):
            if values and self.http_address is None:
                raise ValueError(f"{flag} needs --http-address")
            for value in values:
                if value != "*" and not form.fullmatch(value):
                    raise ValueError(f"{flag}: {value!r} is neither '*' nor {shown}")

    @property
    def call_addresses(self) -> tuple[str, ...]:
        """Every address that answers calls, through whichever door."""
        http = self.http_address
        return self.rpc_addresses if http is None else (*self.rpc_addresses, http)

    @property
    def rpc_addresses(self) -> tuple[str, ...]:
        """Every address that answers gRPC."""
        return (self.address,) if self.admin_address is None else (self.address, self.admin_address)


@dataclass(frozen=True, slots=True, kw_only=True)
class SecurityConfig:
    """Who may call. Without a token file every caller has every role."""

    token_file: Path | None = _flag(None, "file of bearer tokens, a line each: TOKEN ROLE[,ROLE]")
    tls_cert: Path | None = _flag(None, "PEM certificate chain of the server")
    tls_key: Path | None = _flag(None, "PEM private key of the server")
    tls_client_ca: Path | None = _flag(
        None, "PEM authorities; clients must then present a certificate (mTLS)"
    )
    insecure: bool = _flag(False, "serve other machines without TLS or without tokens")
    share_prefixes: bool = _flag(
        False,
        "let requests with different tokens share the prefix cache and drafts: faster, but their"
        " timing then tells what others asked (default: each token has its own)",
    )

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key need each other")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("--tls-client-ca needs --tls-cert and --tls-key")

    @property
    def is_complete(self) -> bool:
        """TLS and tokens are both set."""
        return self.tls_cert is not None and self.token_file is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class LifecycleConfig:
    """How the server stops."""

    grace_seconds: float = _flag(
        30.0, "time running requests get to finish after SIGTERM", unit="seconds"
    )

    def __post_init__(self) -> None:
        _at_least(self, 0, "grace_seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """What is written to standard error."""

    log_format: Literal["text", "json"] = _flag(
        "text", "text: a line for people, with key=value; json: an object a line"
    )
    verbose: bool = _flag(False, "log details too, and every setting at the start")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole server, resolved.

    Raises:
        ValueError: A non-local address without TLS and tokens, and no ``--insecure``.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    adapters: AdapterConfig = field(default_factory=AdapterConfig)
    listen: ListenConfig = field(default_factory=ListenConfig)
    security: SecurityConfig = field(default_factory=SecurityConfig)
    lifecycle: LifecycleConfig = field(default_factory=LifecycleConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        if self.security.is_complete or self.security.insecure:
            return
        for name in ("address", "admin_address", "http_address"):
            address: str | None = getattr(self.listen, name)
            if address is not None and not is_local_address(address):
                meant = did_you_mean(split_address(address)[0], ("localhost",))
                raise ValueError(
                    f"--{name.replace('_', '-')}: {address} is reachable from other machines"
                    f"{meant or ':'} set --tls-cert, --tls-key and --token-file, or say --insecure"
                )

    def describe(self) -> str:
        """The resolved values, one ``section.field = value`` a line."""
        return "\n".join(line for line, _ in self._lines())

    def changes(self) -> list[str]:
        """The lines of :meth:`describe` whose values are not the defaults."""
        return [line for line, is_default in self._lines() if not is_default]

    def _lines(self) -> Iterator[tuple[str, bool]]:
        for section in dataclasses.fields(self):
            part = getattr(self, section.name)
            for entry in dataclasses.fields(part):
                value: Any = getattr(part, entry.name)
                shown = _shown(entry, value)
                yield f"{section.name}.{entry.name} = {shown}", value == entry.default


def _shown(entry: dataclasses.Field[Any], value: Any) -> str:
    """A value as the listing at the start has it."""
    if value is None and entry.default is not None:
        return "none"
    if value is None:
        return "auto" if "unit" in entry.metadata else "-"
    if entry.metadata.get("unit") == "bytes":
        return format_byte_size(value)
    if entry.name == "preload":
        pairs = [f"{name}={path}" for name, path in value]
        more = len(pairs) - _PRELOADS_SHOWN
        value = (*pairs[:_PRELOADS_SHOWN], *([f"and {more} more"] if more > 0 else []))
    return (" ".join(value) if isinstance(value, tuple) else str(value)) or "-"
