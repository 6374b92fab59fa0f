"""Checks that are possible before torch is imported and the model is read.

A start takes many seconds. What the file system and the ports already say is said in the first one,
all of it at once. The parts that own these things check them again when they open them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import importlib.metadata
import os
import re
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from turret.kernels.cpu.isas import ISAS, NATIVE, NO_NATIVE
from turret.server.adapters.base import BaseSizes, ModuleSize
from turret.server.adapters.checkpoint.adapter_root import AdapterRoot
from turret.server.adapters.checkpoint.no_adapter import check_is_adapter
from turret.server.api.access.tokens import TokenTable
from turret.server.basics.address import split_address
from turret.server.basics.byte_size import about_bytes
from turret.server.basics.closest import did_you_mean, path_meant
from turret.server.basics.counted import counted
from turret.server.basics.files import read_regular, unwritable
from turret.server.basics.hub_id import HUB_SCHEME
from turret.server.basics.triton_needs import missing_for_triton
from turret.server.command.threads import available_cpus
from turret.server.config import (
    AdapterConfig,
    Config,
    ListenConfig,
    ModelConfig,
    SecurityConfig,
)
from turret.server.errors import InvalidRequestError, TurretError
from turret.server.hub.adapters import AdapterHub
from turret.server.models.decoding.arch import LAYER_PREFIX, MODULES, Projections
from turret.server.models.families import FAMILIES
from turret.server.models.sources.check import (
    check_model,
    name_of_model,
    size_of_model,
    told_sizes,
)
from turret.server.words import say

_MOST_THREADS = 1024
# A path that is followed by another NAME=PATH.
_SEVERAL = re.compile(r"[,\s]\s*[a-z0-9._-]+=")
# Time limit for a connection to a server on this machine.
_CONNECT_SECONDS = 1.0


def problems(config: Config, *, may_run: bool = False, any_port: bool = True) -> list[str]:
    """One line for each thing that would keep the server from starting, named by its flag.

    Args:
        config: The resolved configuration.
        may_run: What uses the state directory and the addresses may be what is to be changed.
        any_port: Whether port 0, which picks a free one, is an address.
    """
    adapters = dataclasses.replace(config.adapters, state_dir=None) if may_run else config.adapters
    model_type, of_model = _model(config.model.model)
    base = base_sizes(config.model.model, model_type) if model_type else None
    takes_any = bool(of_model) or adapters.allow_other_base
    return [
        *of_model,
        *_device(config.model, os.environ),
        *_memory(config),
        *_adapters(
            adapters,
            None if takes_any else name_of_model(config.model.model),
            base,
            item_bytes=4 if config.model.dtype == "float32" else 2,
        ),
        *_files(config.security),
        *([] if may_run else _addresses(config.listen, any_port)),
    ]


def notes(config: Config) -> list[str]:
    """Likely mistakes that do not keep the server from starting."""
    threads, there = config.model.threads or 0, available_cpus()
    if threads <= there or threads > _most_threads():
        # Counts above _most_threads() are rejected elsewhere.
        return []
    return [
        f"--threads: {threads} of them take turns on {counted(there, 'processor')}, which is slower"
    ]


def _model(model: Path | None) -> tuple[str, list[str]]:
    """The model's ``model_type``, or why it cannot be served."""
    try:
        return check_model(model), []
    except InvalidRequestError as error:
        return "", [f"--{error.message}"]
    except OSError as error:
        return "", [f"--model: {error.filename}: {error.strerror}"]


def _device(config: ModelConfig, environ: Mapping[str, str]) -> Iterator[str]:
    if config.device.startswith("cuda") and (why := without_cuda()):
        yield f"--device: {config.device} was asked for, but {why}"
    elif config.device.startswith("cuda") and (missing := missing_for_triton()):
        yield (
            f"--device: {config.device} was asked for, whose kernels are compiled here: {missing} "
            "must be installed"
        )
    if (config.threads or 0) > _most_threads():
        yield f"--threads: {config.threads} is more than any machine computes with"
    isa = environ.get("TURRET_ISA") or ISAS[0]
    if isa not in ISAS:
        meant = did_you_mean(isa, ISAS)
        yield f"TURRET_ISA: {isa!r} is none of {', '.join(ISAS)}{meant}"
    native = environ.get("TURRET_NATIVE") or NATIVE[0]
    if native.lower() not in (*NATIVE, *NO_NATIVE):
        yield f"TURRET_NATIVE: {native!r} is none of {', '.join((*NO_NATIVE, *NATIVE))}"


def _most_threads() -> int:
    return max(_MOST_THREADS, os.cpu_count() or 1)


def _memory(config: Config) -> Iterator[str]:
    wanted = config.cache.kv_cache_bytes or 0
    has_cpu_alone = config.model.device == "cpu" or _torch_version().endswith("+cpu")
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if has_cpu_alone and wanted > there:
        yield (
            f"--kv-cache-bytes: {about_bytes(wanted)} is more than this machine's memory,"
            f" {about_bytes(there)}"
        )


def without_cuda() -> str:
    """Why torch cannot use any GPU of this machine; "" if it may."""
    if not _torch_version().endswith("+cpu"):
        return ""
    return (
        "torch is installed for CPUs alone (docs/kernels.md); `pip install torch` brings one for"
        " NVIDIA's GPUs"
    )


def _torch_version() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def base_sizes(model: Path | None, model_type: str) -> BaseSizes | None:
    """The sizes of a base that are known before it is read; None for a mixture, or if unknown."""
    size, told = size_of_model(model), told_sizes(model, model_type)
    if size is None or told is None or told.get("experts") is not None:
        return None
    modules = FAMILIES[model_type].modules.get(model_type, MODULES)
    projections = Projections(model_type=model_type, modules=modules, **told)
    linears = projections.linears()
    found: dict[str, ModuleSize] = {}
    for number in range(projections.num_layers):
        for projection, slices in linears.items():
            for path, out, inner in slices if projections.has(number, projection) else ():
                name = f"{LAYER_PREFIX}.{number}.{path}"
                found[name] = ModuleSize(name, inner, out)
    return BaseSizes(
        name=name_of_model(model),
        model_type=model_type,
        modules=found,
        num_layers=projections.num_layers,
        hidden_size=projections.hidden,
        kv_width=projections.keys,
        vocab_size=size[2],
    )


def _adapters(
    config: AdapterConfig, base: str | None, size: BaseSizes | None, *, item_bytes: int
) -> Iterator[str]:
    """``base`` is the name of the base model that adapters must be for; None allows any."""

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
    preload = [(name, path) for name, path in config.preload if not path.startswith(HUB_SCHEME)]
    if root is not None and not root.is_dir():
        what = "is no directory" if root.exists() else "does not exist"
        near = "" if root.exists() else path_meant(root, Path.is_dir)
        step = near or "; it is the directory in which every adapter has a directory of its own"
        yield f"--adapter-root: {root} {what}{step}"
    elif root is not None and not os.access(root, os.R_OK | os.X_OK):
        yield f"--adapter-root: {root} cannot be read by this user"
    elif root is not None:
        for name, path in preload:
            yield from _preload(name, path, lambda path=path: look(AdapterRoot(root), path, path))
    hub = AdapterHub(config.adapter_hub, config.max_upload_bytes)
    for name, path in config.preload:
        if path.startswith(HUB_SCHEME):
            yield from _preload(name, path, lambda path=path: _look_in_hub(hub, path, look))
    if config.state_dir is not None:
        yield from _state_dir(config.state_dir)


def _look_in_hub(hub: AdapterHub, path: str, look: Callable[[AdapterRoot, str, str], None]) -> None:
    """Ask the hub for adapters that are not cached, and check those that are."""
    place = hub.find(path, hub.check(path))
    if hub.root is not None and place is not None:
        look(AdapterRoot(hub.root), place, path)


def _preload(name: str, path: str, look: Callable[[], None]) -> Iterator[str]:
    try:
        look()
    except TurretError as error:
        problem = error.message
        if _SEVERAL.search(path):
            problem = "names several: repeat --preload for each; in TURRET_PRELOAD commas part them"
        yield say("PRELOAD_FAILED", name=name, path=path, problem=problem)


def _state_dir(path: Path) -> Iterator[str]:
    lock = path / "LOCK"
    if problem := unwritable(path):
        yield f"--state-dir: {path} {problem}"
    elif lock.exists():
        try:
            with lock.open("rb+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield (
                f"--state-dir: another server uses {path}; stop it, or give this one a directory of"
                " its own"
            )
        except OSError as error:
            yield f"--state-dir: {lock}: {error.strerror}"


def _files(config: SecurityConfig) -> Iterator[str]:
    for flag in ("token_file", "tls_cert", "tls_key", "tls_client_ca"):
        path: Path | None = getattr(config, flag)
        if path is None:
            continue
        try:
            read_regular(path)
        except OSError as error:
            near = "" if path.exists() else path_meant(path, Path.is_file)
            yield f"--{flag.replace('_', '-')}: {path}: {error.strerror}{near}"
            return
    if config.token_file is not None:
        try:
            TokenTable.parse(config.token_file)
        except ValueError as error:
            yield str(error)
    yield from _tls(config)


def _tls(config: SecurityConfig) -> Iterator[str]:
    """TLS errors, which gRPC would report in five lines each, without naming our flags."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if config.tls_cert is not None and config.tls_key is not None:
        try:
            # An empty password keeps OpenSSL from asking for one at the terminal.
            context.load_cert_chain(config.tls_cert, config.tls_key, password=lambda: b"")
        except ssl.SSLError as error:
            why = (
                "do not belong together"
                if error.reason == "KEY_VALUES_MISMATCH"
                else f"hold no PEM certificate and key without a password ({_reason(error)})"
            )
            yield f"--tls-cert, --tls-key: {config.tls_cert} and {config.tls_key} {why}"
    if config.tls_client_ca is not None:
        try:
            context.load_verify_locations(config.tls_client_ca)
        except ssl.SSLError as error:
            yield f"--tls-client-ca: {config.tls_client_ca} holds no certificate ({_reason(error)})"


def _reason(error: ssl.SSLError) -> str:
    return error.reason or str(error)


def _addresses(config: ListenConfig, any_port: bool) -> Iterator[str]:
    taken: dict[tuple[str, int], str] = {}
    for name in ("address", "admin_address", "metrics_address", "http_address"):
        address: str | None = getattr(config, name)
        flag = f"--{name.replace('_', '-')}"
        if address is None:
            continue
        if address.startswith("unix:"):
            if problem := _no_socket(Path(address.removeprefix("unix:"))):
                yield f"{flag}: {problem}"
            continue
        host, port = split_address(address)
        if port and (host, port) in taken:
            yield f"{flag}: {address} is that of {taken[host, port]} already"
        elif problem := _bind(host, port, any_port):
            yield f"{flag}: {address} {problem}"
        taken[host, port] = flag


def _no_socket(path: Path) -> str:
    """Why a unix socket cannot be made at a path; empty if it can."""
    if not path.parent.is_dir():
        return f"{path.parent} is no directory"
    if path.is_dir():
        return f"{path} is a directory; name a file in it, such as unix:{path / 'turret.sock'}"
    if path.exists() and not path.is_socket():
        return f"{path} is a file already, and no socket; name one that is not there"
    # gRPC would replace any existing socket. A socket that a dead server left does not answer.
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other, contextlib.suppress(OSError):
        other.settimeout(_CONNECT_SECONDS)
        other.connect(str(path))
        return f"{path} is taken: another process listens there"
    if not os.access(path.parent, os.W_OK | os.X_OK):
        return f"{path.parent} cannot be written by this user; name a socket elsewhere"
    return ""


def _bind(host: str, port: int, any_port: bool) -> str:
    """Why a listener cannot use an address; empty if it can."""
    try:
        kind, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        return f"has a host that this machine cannot look up: {host}"
    try:
        with socket.socket(kind, socket.SOCK_STREAM) as listener:
            # As the listeners do, ignore connections that only just ended.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(where)
            listener.listen()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            instead = "port 0 picks a free one" if any_port else "give it another port"
            return f"is taken: another process listens there; {instead}"
        if error.errno == errno.EADDRNOTAVAIL:
            return "is no address of this machine; 0.0.0.0 stands for all that it has"
        return f"cannot be had: {error.strerror}"
    return ""
