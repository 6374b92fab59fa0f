"""The settings of ``turret serve``: one frozen dataclass per concern.

Each field has a help text. The flags, the variables, the keys of the TOML file and the docs are
generated from the fields. The error for an invalid value names its field (``basics/settings.py``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator
from pydantic.dataclasses import dataclass

from turret.server.basics.names import (
    HUB_SCHEME,
    HubId,
    is_below_remote,
    is_remote,
    is_remote_path,
    model_place,
    no_adapter_name,
)
from turret.server.basics.settings import (
    GIB,
    MIB,
    TABLE,
    Bytes,
    Checked,
    Names,
    Place,
    Seconds,
    Switch,
    Violation,
    Whole,
    is_local_address,
    setting,
    split_address,
)
from turret.server.words import say

# Defaults on a CPU. On CUDA they depend on free memory.
KV_CACHE_BYTES = 256 * MIB
ADAPTER_DEVICE_BYTES = 512 * MIB

# A host name without a port, and an origin as browsers send it: no path and no trailing slash.
_HOST = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?", re.IGNORECASE)
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#]+")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")


def _device(value: str) -> str:
    if not _DEVICE.fullmatch(value):
        raise ValueError(say("NOT_ONE_OF", choices="auto, cpu, cuda, cuda:N", value=value))
    return value


def _host_port(value: str) -> str:
    split_address(value)
    return value


def _rpc_address(value: str) -> str:
    return value if value.startswith("unix:") and value != "unix:" else _host_port(value)


def _model(value: Any) -> Any:
    return model_place(value) if isinstance(value, str) and value else value


def _pairs(value: Any) -> Any:
    """Pairs of name and path: from ``NAME=PATH``, a list, a comma-separated text, or a table."""
    if isinstance(value, dict):
        return list(value.items())
    parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    if not isinstance(parts, list | tuple):
        return value
    return [_pair(part) if isinstance(part, str) else part for part in parts]


def _pair(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (equals and name and path):
        raise ValueError(say("NOT_NAME_PATH", value=text))
    return name, path


HostPort = Annotated[str, AfterValidator(_host_port)]
RpcAddress = Annotated[str, AfterValidator(_rpc_address)]
Model = Annotated[Place, BeforeValidator(_model)]
Preloads = Annotated[tuple[tuple[str, str], ...], BeforeValidator(_pairs)]


@dataclass(frozen=True, slots=True, kw_only=True, config=TABLE)
class ModelConfig:
    """The base model, its device and its precision."""

    model: Model | None = setting(
        None,
        "base model: a directory in Hugging Face format, org/name[@revision] of the hub, or a .gguf"
        " file (default: the bundled model)",
        shown="DIR|ORG/NAME|FILE",
    )
    chat_template: Place | None = setting(
        None,
        "chat template of the base model: a Jinja file, or chatml for the built-in one (default:"
        " the model's own)",
        shown="FILE|chatml",
    )
    device: Annotated[str, AfterValidator(_device)] = setting(
        "auto",
        "device of the model: auto, cpu, cuda, or cuda:N",
        shown="DEVICE",
    )
    dtype: Literal["bfloat16", "float16", "float32"] = setting(
        "bfloat16", "dtype of activations and of the weights that are not 4-bit"
    )
    skip_modules: Names = setting(
        (),
        "module that stays in 16 bits when a model is quantised, such as q_proj or"
        " layers.0.mlp.down_proj; repeatable",
        shown="MODULE",
    )
    quantize_all: Switch = setting(
        False,
        "also quantise the modules that a bitsandbytes 4-bit checkpoint keeps in 16 bits: less"
        " memory, but not the base that adapters were trained on",
    )

    threads: Whole | None = setting(
        None,
        "number of threads that compute on a CPU (default: OMP_NUM_THREADS, else the available"
        " processors)",
        ge=1,
    )
    head_screen: Switch = setting(
        True,
        "on a CPU, keep an int8 copy of the output head, which makes greedy steps faster (default:"
        " keep it)",
    )


@dataclass(frozen=True, slots=True, kw_only=True, config=TABLE)
class CacheConfig:
    """Memory of the sequences in flight."""

    kv_cache_bytes: Bytes | None = setting(
        None,
        "size of the paged KV cache (default: 256MiB; on CUDA the remaining device memory)",
        ge=MIB,
    )


@dataclass(frozen=True, slots=True, kw_only=True, config=TABLE)
class SchedulerConfig(Checked):
    """Limits on waiting requests, on running requests, and on one step."""

    max_num_seqs: Whole | None = setting(
        None, "maximum number of running sequences (default: 64; on CUDA 256)", ge=1
    )
    max_num_batched_tokens: Whole | None = setting(
        None, "maximum number of tokens in one step (default: 512; on CUDA 2048)", ge=1
    )
    max_queued_requests: Whole = setting(
        1024,
        "maximum number of waiting requests; further ones get RESOURCE_EXHAUSTED",
        ge=1,
    )
    max_queued_bytes: Bytes = setting(
        512 * MIB,
        "maximum memory of waiting and running requests with their answers, and of messages;"
        " further requests get RESOURCE_EXHAUSTED",
        ge=MIB,
    )
    preempt_after_seconds: Seconds = setting(
        5.0,
        "time that a request waits for a place or for memory before it may preempt another one; 0:"
        " never",
        ge=0,
    )
    speculation: Literal["auto", "prompt", "off"] = setting(
        "auto",
        "on a CPU, draft tokens and verify several in one step; answers stay the same. prompt"
        " drafts from the request alone, auto also from earlier answers",
    )
    max_requests_per_token: Whole = setting(
        0, "maximum number of waiting and running requests per bearer token; 0: no limit", ge=0
    )
    max_requests_per_peer: Whole = setting(
        0, "maximum number of waiting and running requests per client address; 0: no limit", ge=0
    )

    def faults(self) -> Iterator[Violation]:
        tokens, seqs = self.max_num_batched_tokens, self.max_num_seqs
        if tokens is not None and seqs is not None and tokens < seqs:
            # Every running sequence decodes one token in a step.
            text = say("BELOW_OTHER", other="--max-num-seqs", value=tokens, least=seqs)
            yield Violation("scheduler.max_num_batched_tokens", text)

    def sizes(self, device_type: str) -> tuple[int, int]:
        """``max_num_seqs`` and ``max_num_batched_tokens``, with a device's defaults.

        If only one of them is set, the default of the other is adjusted to it.
        """
        seqs, tokens = (64, 512) if device_type == "cpu" else (256, 2048)
        if self.max_num_seqs is not None:
            seqs, tokens = self.max_num_seqs, max(tokens, self.max_num_seqs)
        if self.max_num_batched_tokens is not None:
            tokens = self.max_num_batched_tokens
        return min(seqs, tokens), tokens


@dataclass(frozen=True, slots=True, kw_only=True, config=TABLE)
class AdapterConfig(Checked):
    """The adapters that may be loaded, and the memory that they may take."""

    adapter_root: Place | None = setting(
        None, "the only directory from which adapters are loaded (default: none)"
    )
    state_dir: Place | None = setting(
        None,
        "directory that keeps registrations, uploads and fused adapters across restarts (default:"
        " nothing is kept)",
    )
    adapter_hub: Names = setting(
        (),
        "organisation or user of the Hugging Face hub whose adapters may be loaded, or '*' for all;"
        " repeatable",
        shown="ORG",
    )
    adapter_remote: Names = setting(
        (),
        "s3:// or oci:// prefix below which adapters may be loaded; needs --state-dir; repeatable",
        shown="PREFIX",
    )
    max_upload_bytes: Bytes = setting(
        2 * GIB, "maximum size of an adapter that is uploaded or downloaded", ge=1
    )
    adapter_host_bytes: Bytes = setting(GIB, "host memory for adapter weights", ge=1)
    adapter_device_bytes: Bytes | None = setting(
        None,
        "device memory for adapter weights (default: 512MiB; on CUDA a seventh of the free memory)",
        ge=1,
    )
    keep_generations: Whole = setting(
        0, "number of replaced generations of each adapter that requests can still use", ge=0
    )
    max_rank: Whole = setting(128, "highest rank of an adapter", ge=1)
    allow_other_base: Switch = setting(
        False, "serve adapters whose config names another base model, if the shapes fit"
    )
    strict_base: Switch = setting(
        False,
        "reject adapters that were trained on other weights of the base (default: warn)",
    )
    allow_dense_adapters: Switch = setting(
        False, "serve adapters whose updates are as large as the weights they change"
    )
    allow_merged_twice: Switch = setting(
        False, "serve requests for adapters that are merged into the base, and apply them twice"
    )
    training: Switch = setting(
        False, "let callers with the role 'training' train adapters on the served base"
    )
    training_bytes: Bytes = setting(
        4 * GIB,
        "memory for adapters in training, about 32 bytes per parameter",
        ge=1,
    )
    preload: Preloads = setting(
        (),
        "adapter to load at startup, as NAME=PATH; PATH is relative to --adapter-root, or is"
        " hub:org/name[@revision], s3://… or oci://…; repeatable",
        shown="NAME=PATH",
    )

    def faults(self) -> Iterator[Violation]:
        yield from self._preloads_at_fault()
        for org in self.adapter_hub:
            if org != "*" and HubId.find(f"{org}/name") is None:
                yield Violation("adapters.adapter_hub", say("NOT_AN_ORGANISATION", value=org))
        for prefix in self.adapter_remote:
            if not is_remote_path(prefix):
                yield Violation("adapters.adapter_remote", say("NOT_A_REMOTE", value=prefix))
        for name in ("adapter_remote", "training"):
            if getattr(self, name) and self.state_dir is None:
                yield Violation(f"adapters.{name}", say("NEEDS_FIELD", other="--state-dir"))

    def _preloads_at_fault(self) -> Iterator[Violation]:
        names = [name for name, _ in self.preload]
        for name in dict.fromkeys(names):
            if text := no_adapter_name(name):
                yield Violation("adapters.preload", text)
            elif names.count(name) > 1:
                yield Violation("adapters.preload", say("DUPLICATE", value=name))
        for name, path in self.preload:
            field = f"adapters.preload.{name}"
            if is_remote(path):
                if not any(is_below_remote(path, prefix) for prefix in self.adapter_remote):
                    yield Violation(field, say("NEEDS_FIELD", other="--adapter-remote"))
                continue
            if not path.startswith(HUB_SCHEME):
                if self.adapter_root is None:
                    yield Violation(field, say("NEEDS_FIELD", other="--adapter-root"))
                continue
            hub_id = HubId.find(path.removeprefix(HUB_SCHEME))
            if hub_id is None:
                yield Violation(field, say("NOT_A_HUB_PATH", value=path))
            elif not {"*", hub_id.org} & set(self.adapter_hub):
                yield Violation(field, say("NEEDS_FIELD", other=f"--adapter-hub {hub_id.org}"))


@dataclass(frozen=True, slots=True, kw_only=True, config=TABLE)
class ListenConfig(Checked):
    """The addresses of the server. Port 0 selects a free port."""

    address: RpcAddress = setting(
        "127.0.0.1:50051", "HOST:PORT or unix:PATH of the gRPC server", shown="ADDRESS"
    )
    admin_address: RpcAddress | None = setting(
        None,
        "separate HOST:PORT for the Adapters service (default: on --address)",
        shown="ADDRESS",
    )
    metrics_address: HostPort | None = setting(
        "127.0.0.1:9464",
        "HOST:PORT of the Prometheus endpoint, or 'none'",
        shown="ADDRESS",
    )
    http_address: HostPort | None = setting(
        None, "HOST:PORT of the OpenAI-compatible HTTP server (default: none)", shown="ADDRESS"
    )
    http_cors_origin: Names = setting(
        (),
        "origin whose pages may call the HTTP server (https://example.org), or '*'; repeatable",
        shown="ORIGIN",
    )
    http_allowed_host: Names = setting(
        (),
        "host name by which clients may call an HTTP server without tokens, besides localhost and"
        " IP addresses, or '*'; repeatable",
        shown="NAME",
    )

    def faults(self) -> Iterator[Violation]:
        for name, values, form, shown in (
            ("http_cors_origin", self.http_cors_origin, _ORIGIN, "SCHEME://HOST[:PORT]"),
            ("http_allowed_host", self.http_allowed_host, _HOST, "a name without a port"),
        ):
            if values and self.http_address is None:
                yield Violation(f"listen.{name}", say("NEEDS_FIELD", other="--http-address"))
            for value in values:
                if value != "*" and not form.fullmatch(value):
                    yield Violation(f"listen.{name}", say("NOT_OF_FORM", value=value, form=shown))

    @property
    def call_addresses(self) -> tuple[str, ...]:
        """Every address that answers calls, over any protocol."""
        http = self.http_address
        return self.rpc_addresses if http is None else (*self.rpc_addresses, http)

    @property
    def rpc_addresses(self) -> tuple[str, ...]:
        """Every address that answers gRPC."""
        return (self.address,) if self.admin_address is None else (self.address, self.admin_address)


@dataclass(frozen=True, slots=True, kw_only=True, config=TABLE)
class SecurityConfig(Checked):
    """Who may call the server. Without a token file, every caller has every role."""

    token_file: Place | None = setting(
        None, "file of bearer tokens, one per line: TOKEN ROLE[,ROLE]"
    )
    tls_cert: Place | None = setting(None, "PEM certificate chain of the server")
    tls_key: Place | None = setting(None, "PEM private key of the server")
    tls_client_ca: Place | None = setting(
        None, "PEM certificates of the authorities that must sign clients' certificates (mTLS)"
    )
    trust_request_chat_template: Switch = setting(
        False, "accept chat templates in requests, like vLLM's flag of this name"
    )
    insecure: Switch = setting(False, "serve other machines without TLS or tokens")
    share_prefixes: Switch = setting(
        False,
        "treat all bearer tokens as one client, which has one prefix cache: faster, but response"
        " times then reveal what others asked",
    )

    def faults(self) -> Iterator[Violation]:
        pair = {"tls_cert": self.tls_cert, "tls_key": self.tls_key}
        missing = [name for name, path in pair.items() if path is None]
        for name, path in {**pair, "tls_client_ca": self.tls_client_ca}.items():
            if path is not None and missing:
                text = say("NEEDS_FIELD", other=f"--{missing[0].replace('_', '-')}")
                yield Violation(f"security.{name}", text)
                return

    @property
    def is_complete(self) -> bool:
        """Whether TLS and tokens are both set."""
        return self.tls_cert is not None and self.token_file is not None


@dataclass(frozen=True, slots=True, kw_only=True, config=TABLE)
class LifecycleConfig:
    """How the server stops."""

    grace_seconds: Seconds = setting(
        30.0, "time that running requests get to finish after SIGTERM", ge=0
    )


@dataclass(frozen=True, slots=True, kw_only=True, config=TABLE)
class LogConfig:
    """The log, which is written to standard error."""

    log_format: Literal["text", "json"] = setting(
        "text", "text: lines for people, with key=value; json: one object per line"
    )
    verbose: Switch = setting(False, "also log details, and every setting at startup")


@dataclass(frozen=True, slots=True, kw_only=True, config=TABLE)
class TelemetryConfig:
    """Metrics and traces for other tools."""

    metrics_aliases: Literal["vllm"] | None = setting(
        None, "also report, under vLLM's names, the metrics that routers read (default: none)"
    )
    otel: Switch = setting(
        False,
        "export metrics and a trace of each inference request over OTLP; needs turret[otel]",
    )


@dataclass(frozen=True, slots=True, kw_only=True, config=TABLE)
class Config(Checked):
    """The settings of the whole server, from all sources.

    Raises:
        ValueError: An address is open to other machines without both TLS and tokens, and
            ``--insecure`` is not set.
    """

    model: ModelConfig = ModelConfig()
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    adapters: AdapterConfig = AdapterConfig()
    listen: ListenConfig = ListenConfig()
    security: SecurityConfig = SecurityConfig()
    lifecycle: LifecycleConfig = LifecycleConfig()
    log: LogConfig = LogConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    def faults(self) -> Iterator[Violation]:
        if self.security.is_complete or self.security.insecure:
            return
        for name in ("address", "admin_address", "http_address"):
            address: str | None = getattr(self.listen, name)
            if address is not None and not is_local_address(address):
                text = say("ADDRESS_EXPOSED", value=address)
                yield Violation(f"listen.{name}", text)
