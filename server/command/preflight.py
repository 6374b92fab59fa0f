"""Checks that run before torch is imported and the model is read.

A start takes many seconds. Problems with files and ports are reported together in the first second.
The code that uses the files and ports checks them again when it opens them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import importlib.metadata
import os
import socket
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path

from turret.server import tracing
from turret.server.adapters.base import BaseSizes, ModuleSize
from turret.server.adapters.checkpoint.adapter_root import AdapterRoot, check_is_adapter
from turret.server.api.access import TokenTable
from turret.server.basics.files import read_regular, unreadable, unwritable
from turret.server.basics.machine import missing_for_triton
from turret.server.basics.names import HUB_SCHEME, closest, closest_path, how_to_add, is_remote
from turret.server.basics.settings import Violation, split_address, text_of
from turret.server.config import (
    AdapterConfig,
    Config,
    ListenConfig,
    ModelConfig,
    SecurityConfig,
    TelemetryConfig,
)
from turret.server.errors import TurretError
from turret.server.models.chat_template import base_template
from turret.server.models.decoding import LAYER_PREFIX
from turret.server.models.sources.check import FoundModel, check_model, check_skip_modules
from turret.server.remote import AdapterHub
from turret.server.words import Text, say

_MOST_THREADS = 1024
# Time limit for a connection to a server on this machine.
_CONNECT_SECONDS = 1.0


def problems(config: Config, *, may_run: bool = False) -> list[Violation]:
    """The problems that would keep the server from starting, by setting or variable.

    Args:
        config: The resolved configuration.
        may_run: Whether the settings may belong to a running fleet, which then uses the state
            directory and the addresses itself.
    """
    found: list[Violation] = []
    adapters = dataclasses.replace(config.adapters, state_dir=None) if may_run else config.adapters
    model = None
    with _noted(found, "model.model"):
        model = check_model(config.model.model)
    base = None if model is None else base_sizes(model)
    with _noted(found, "model.skip_modules"):
        if model is not None:
            names = config.model.skip_modules
            check_skip_modules(config.model.model, model, names, base and base.modules)
    with _noted(found, "model.chat_template"):
        if config.model.chat_template is not None:
            base_template(config.model.chat_template)
    return [
        *found,
        *_device(config.model),
        *_memory(config),
        *_adapters(
            adapters,
            None if model is None or adapters.allow_other_base else model.name,
            base,
            item_bytes=4 if config.model.dtype == "float32" else 2,
        ),
        *_files(config.security),
        *_telemetry(config.telemetry, os.environ),
        *([] if may_run else _addresses(config.listen)),
    ]


@contextlib.contextmanager
def _noted(found: list[Violation], field: str) -> Iterator[None]:
    """If the block raises an error, record it as a violation of a setting."""
    try:
        yield
    except TurretError as error:
        text = error.violations[0][1] if error.violations else error.message
        found.append(Violation(field, text_of(ValueError(text))))
    except OSError as error:
        text = say("FILE_UNREADABLE", path=error.filename, why=error.strerror)
        found.append(Violation(field, text))


def _device(config: ModelConfig) -> Iterator[Violation]:
    if config.device.startswith("cuda") and (why := without_cuda()):
        yield Violation("model.device", why)
    elif config.device.startswith("cuda") and (missing := missing_for_triton()):
        yield Violation("model.device", say("KERNELS_NEED", missing=missing))
    most = max(_MOST_THREADS, os.cpu_count() or 1)
    if (config.threads or 0) > most:
        yield Violation("model.threads", say("TOO_LARGE", most=most, value=config.threads))


def _telemetry(config: TelemetryConfig, environ: Mapping[str, str]) -> Iterator[Violation]:
    if not config.otel:
        return
    if tracing.missing_packages():
        packages, step = "opentelemetry-exporter-otlp", how_to_add("otel")
        yield Violation("telemetry.otel", say("NOT_INSTALLED", packages=packages, step=step))
    for name in tracing.PROTOCOL_VARIABLES:
        value = environ.get(name) or tracing.PROTOCOLS[0]
        if value not in tracing.PROTOCOLS:
            near = closest(value, tracing.PROTOCOLS)
            choices = ", ".join(tracing.PROTOCOLS)
            yield Violation(name, say("NOT_ONE_OF", choices=choices, value=value, closest=near))


def _memory(config: Config) -> Iterator[Violation]:
    wanted = config.cache.kv_cache_bytes or 0
    has_cpu_alone = config.model.device == "cpu" or _torch_version().endswith("+cpu")
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if has_cpu_alone and wanted > there:
        yield Violation("cache.kv_cache_bytes", say("ABOVE_MEMORY", value=wanted, most=there))


def without_cuda() -> Text | None:
    """The reason why torch cannot use any GPU of this machine; None if it may be able to."""
    return say("TORCH_WITHOUT_CUDA") if _torch_version().endswith("+cpu") else None


def _torch_version() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def base_sizes(model: FoundModel) -> BaseSizes | None:
    """The sizes of a base, without its weights; None for a mixture of experts, or if unknown."""
    projections = model.projections()
    if projections is None or projections.experts is not None:
        return None
    linears = projections.linears()
    found: dict[str, ModuleSize] = {}
    for number in range(projections.num_layers):
        for projection, slices in linears.items():
            for path, out, inner in slices if projections.has(number, projection) else ():
                name = f"{LAYER_PREFIX}.{number}.{path}"
                found[name] = ModuleSize(name, inner, out)
    return BaseSizes(
        name=model.name,
        model_type=model.model_type,
        modules=found,
        num_layers=projections.num_layers,
        hidden_size=projections.hidden_size,
        kv_width=projections.num_kv_heads * projections.head_dim,
        vocab_size=model.vocab_size,
    )


def _adapters(
    config: AdapterConfig, base: str | None, size: BaseSizes | None, *, item_bytes: int
) -> Iterator[Violation]:
    """The problems of adapters to preload. ``base`` is the base model's name; None allows any."""

    def look(root: AdapterRoot, place: str, path: str) -> None:
        # This loads the declarations of all methods, which most starts do not need.
        from turret.server.adapters.methods.check import check_files

        with root.open_directory(place, path) as directory:
            check_is_adapter(directory, path)
            check_files(
                directory,
                path,
                base=size,
                base_name=base,
                max_rank=config.max_rank,
                host_bytes=config.adapter_host_bytes,
                item_bytes=item_bytes,
            )

    root = config.adapter_root
    field = "adapters.adapter_root"
    is_usable = False
    if root is not None and not root.is_dir():
        near = None if root.exists() else closest_path(root, Path.is_dir)
        yield Violation(field, say("FOLDER_MISSING", path=root, closest=near))
    elif root is not None and not os.access(root, os.R_OK | os.X_OK):
        yield Violation(field, say("FILE_UNREADABLE", path=root, why=os.strerror(errno.EACCES)))
    else:
        is_usable = root is not None
    hub = AdapterHub(config.adapter_hub, config.max_upload_bytes)
    for name, path in config.preload:
        try:
            if path.startswith(HUB_SCHEME):
                # ``check`` contacts the hub, unless the path names a commit whose files are cached.
                place = hub.find(path, hub.check(path))
                if hub.root is not None and place is not None:
                    look(AdapterRoot(hub.root), place, path)
            elif root is not None and is_usable and not is_remote(path):
                look(AdapterRoot(root), path, path)
        except TurretError as error:
            yield Violation(f"adapters.preload.{name}", text_of(error))
    if config.state_dir is not None:
        yield from _state_dir(config.state_dir)


def _state_dir(path: Path) -> Iterator[Violation]:
    lock = path / "LOCK"
    field = "adapters.state_dir"
    if problem := unwritable(path):
        yield Violation(field, say("PATH_UNUSABLE", path=path, problem=problem))
    elif lock.exists():
        try:
            with lock.open("rb+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield Violation(field, say("STATE_DIR_IN_USE", path=path))
        except OSError as error:
            yield Violation(field, unreadable(lock, error))


def _files(config: SecurityConfig) -> Iterator[Violation]:
    for name in ("token_file", "tls_cert", "tls_key", "tls_client_ca"):
        path: Path | None = getattr(config, name)
        if path is None:
            continue
        try:
            read_regular(path)
        except OSError as error:
            yield Violation(f"security.{name}", unreadable(path, error))
            return
    if config.token_file is not None:
        try:
            TokenTable.parse(config.token_file)
        except ValueError as error:
            yield Violation("security.token_file", text_of(error))
    if config.tls_cert is None:
        return
    # Imported here because few servers have TLS.
    from turret.server.http.connection import tls_context

    try:
        tls_context(config)
    except ssl.SSLError as error:
        # gRPC would report this in five lines, without the flags.
        why = error.reason or str(error)
        yield Violation("security.tls_cert", say("TLS_FILES_UNUSABLE", why=why))


def _addresses(config: ListenConfig) -> Iterator[Violation]:
    taken: dict[tuple[str, int], str] = {}
    for name in ("address", "admin_address", "metrics_address", "http_address"):
        address: str | None = getattr(config, name)
        if address is None:
            continue
        field = f"listen.{name}"
        if address.startswith("unix:"):
            if text := _no_socket(Path(address.removeprefix("unix:"))):
                yield Violation(field, text)
            continue
        host, port = split_address(address)
        if port and (host, port) in taken:
            other = f"--{taken[host, port].replace('_', '-')}"
            yield Violation(field, say("ADDRESS_OF_OTHER", value=address, other=other))
        elif text := _bind(address, host, port):
            yield Violation(field, text)
        taken[host, port] = name


def _no_socket(path: Path) -> Text | None:
    """The reason why a unix socket cannot be created at a path; None if it can."""
    if not path.parent.is_dir():
        return say("FOLDER_MISSING", path=path.parent)
    if path.exists() and not path.is_socket():
        return say("NOT_A_SOCKET", path=path)
    # gRPC would replace any existing socket. A socket left by a dead server does not answer.
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other, contextlib.suppress(OSError):
        other.settimeout(_CONNECT_SECONDS)
        other.connect(str(path))
        return say("ADDRESS_TAKEN", value=f"unix:{path}")
    if problem := unwritable(path.parent):
        return say("PATH_UNUSABLE", path=path.parent, problem=problem)
    return None


def _bind(address: str, host: str, port: int) -> Text | None:
    """The reason why a listener cannot use an address; None if it can."""
    try:
        kind, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        return say("HOST_NOT_RESOLVED", host=host)
    try:
        with socket.socket(kind, socket.SOCK_STREAM) as listener:
            # Like the listeners, ignore connections that have just ended.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(where)
            listener.listen()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return say("ADDRESS_TAKEN", value=address)
        if error.errno == errno.EADDRNOTAVAIL:
            return say("ADDRESS_OF_ANOTHER_MACHINE", value=address)
        return say("ADDRESS_UNUSABLE", value=address, why=error.strerror)
    return None
