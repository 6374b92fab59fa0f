"""The fuzz targets: functions that must return normally or raise a documented error for any bytes.

A target raises only if something is broken: an undocumented exception, the status INTERNAL, an
adapter that was accepted but cannot be described to clients, or more time or memory than the size
of the input justifies.
"""

from __future__ import annotations

import contextlib
import functools
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from builders.registries import tiny_base
from fuzz.guided import ORDER
from fuzz.protocols import METHODS, PATHS, TRAINING_PATHS, Protocols
from fuzz.recipes import body

from turret.server.adapters.adapter import CONFIG_FILE, TENSORS_FILE, Source
from turret.server.adapters.checkpoint.reader import parse_config, read_header
from turret.server.adapters.loader import AdapterLoader
from turret.server.adapters.state_dir import SavedRegistration
from turret.server.api.access import TokenTable
from turret.server.errors import TurretError
from turret.v1 import adapters_pb2

MAX_BYTES = 1 << 16
# The maximum number of calls of an input, so that it stays within its time budget.
_MOST_CALLS = 8
_HTTP = frozenset((200, 400, 404, 409, 413, 415, 429, 501))
_GRPC = frozenset(
    (
        *("OK", "INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "FAILED_PRECONDITION"),
        *("RESOURCE_EXHAUSTED", "ABORTED", "UNAVAILABLE"),
    )
)


# The budget of an input: a base and an amount per byte, of processor time and memory. Measuring
# coverage makes everything a few times slower.
_SECONDS, _SECONDS_PER_BYTE = 2.0, 4e-6
_MEMORY, _MEMORY_PER_BYTE = 64 << 20, 128


class Broken(AssertionError):
    """The server gave a forbidden answer, or one that cost too much."""


class Targets:
    """All fuzz targets, by name.

    Args:
        folder: The directory for files.

    Attributes:
        by_name: Name → function of the bytes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "fuzzed").mkdir()
        self._loader = AdapterLoader(folder, tiny_base(), 1 << 26, 64)
        self._protocols = Protocols(folder)
        self.by_name: dict[str, Callable[[bytes], None]] = {
            name: functools.partial(_within_budget, getattr(self, name)) for name in ORDER
        }

    def close(self) -> None:
        self._protocols.close()

    def header(self, data: bytes) -> None:
        """Input: the beginning of a tensor file."""
        with contextlib.suppress(ValueError):
            read_header(io.BytesIO(data), len(data))

    def config(self, data: bytes) -> None:
        """Input: an adapter's config."""
        with contextlib.suppress(TurretError):
            parse_config(data, "x")

    def folder(self, data: bytes) -> None:
        """Input: both files of an adapter, after two bytes with the length of the config."""
        split = 2 + int.from_bytes(data[:2], "little")
        place = self._folder / "fuzzed"
        (place / CONFIG_FILE).write_bytes(data[2:split])
        (place / TENSORS_FILE).write_bytes(data[split:])
        try:
            loaded = self._loader.lower(self._loader.read_new(Source("fuzzed")))
        except TurretError:
            return
        saved = SavedRegistration(
            name="x",
            uuid="u",
            generation=1,
            pinned=False,
            source=Source("fuzzed"),
            facts=loaded.facts,
        )
        if SavedRegistration.from_json(saved.to_json()) != saved:
            raise Broken("the registration does not survive a restart")
        facts = loaded.facts
        adapters_pb2.Adapter(
            digest=facts.digest,
            method=facts.method,
            ranks=facts.ranks,
            target_modules=facts.target_modules,
            base_model=facts.base_model,
            warnings=facts.warnings,
        ).SerializeToString()

    def registration(self, data: bytes) -> None:
        """Input: a file of the state directory. The server must start with any content."""
        with contextlib.suppress(ValueError):
            SavedRegistration.from_json(data).to_json()

    def tokens(self, data: bytes) -> None:
        """Input: a token file."""
        path = self._folder / "tokens"
        path.write_bytes(data)
        path.chmod(0o600)
        with contextlib.suppress(ValueError):
            TokenTable.read(path).roles_of("x")

    def message(self, data: bytes) -> None:
        """Input: a byte for the method, then its messages, each after two bytes of length."""
        method = METHODS[data[0] % len(METHODS)] if data else METHODS[0]
        code = self._protocols.call(method, parts_of(data[1:]))
        if code not in _GRPC:
            raise Broken(f"{method.full_name}: {code}")
        if method.containing_service.name == "Adapters" and not self._protocols.is_listed():
            raise Broken(f"{method.full_name}: adapters cannot be listed any more")

    def http(self, data: bytes) -> None:
        """Input: a byte for the path, then the body."""
        path = PATHS[data[0] % len(PATHS)] if data else PATHS[0]
        status = self._protocols.post(path, data[1:])
        if status not in _HTTP:
            raise Broken(f"{path}: {status}")

    def bodies(self, data: bytes) -> int:
        """Input: a byte for the path, then the recipe of a body of up to 4 MiB."""
        made = body(data[1:])
        self.http(data[:1] + made)
        return len(made)

    def training(self, data: bytes) -> None:
        """Input: calls of one session. Each has a byte for the path, then its length and body."""
        calls = calls_of(data)
        statuses = self._protocols.train(calls)
        if not (_HTTP | {410}).issuperset(statuses):
            raise Broken(f"{[path for path, _ in calls]}: {statuses}")


def _within_budget(target: Callable[[bytes], int | None], data: bytes) -> None:
    """Run a target, which returns the size of the data if that differs from the input's."""
    # Reset the kernel's record of the peak memory: an earlier peak would hide this one.
    Path("/proc/self/clear_refs").write_text("5")
    start, before = time.process_time(), _peak_bytes()
    size = target(data) or len(data)
    seconds, grown = time.process_time() - start, _peak_bytes() - before
    if seconds > _SECONDS + _SECONDS_PER_BYTE * size:
        raise Broken(f"{seconds:.1f} s of processor time for {size} bytes")
    if grown > _MEMORY + _MEMORY_PER_BYTE * size:
        raise Broken(f"{grown >> 20} MiB of memory for {size} bytes")


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split(maxsplit=1)[0]) << 10


def calls_of(data: bytes) -> list[tuple[str, bytes]]:
    """The paths and bodies of an input of the target ``training``."""
    calls = []
    while data and len(calls) < _MOST_CALLS:
        path = TRAINING_PATHS[data[0] % len(TRAINING_PATHS)]
        end = 3 + int.from_bytes(data[1:3], "little")
        calls.append((path, data[3:end]))
        data = data[end:]
    return calls


def parts_of(data: bytes) -> Iterator[bytes]:
    """The messages of an input of the target ``message``."""
    while data:
        end = 2 + int.from_bytes(data[:2], "little")
        yield data[2:end]
        data = data[end:]


@contextlib.contextmanager
def opened() -> Iterator[Targets]:
    """The targets, with a separate folder."""
    with tempfile.TemporaryDirectory() as name:
        targets = Targets(Path(name))
        try:
            yield targets
        finally:
            targets.close()
