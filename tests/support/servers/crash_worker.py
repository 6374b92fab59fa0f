"""Processes that change a registry with a state directory until they are killed.

cd tests/support && python -m servers.crash_worker ADAPTER_ROOT STATE_DIR
"""

from __future__ import annotations

import json
import os
import random
import select
import sys
from pathlib import Path
from typing import NamedTuple

from builders.registries import Waiter, refs, stage_directory, tiny_base

from turret.server.adapters.adapter import AdapterInfo
from turret.server.adapters.registry.registry import AdapterRegistry
from turret.server.adapters.state_dir import StateDir

NAMES = ("x", "y", "z")
PATHS = ("a", "b", "c", "d")

# Created once, before any worker is forked.
_BASE = tiny_base()


class Entry(NamedTuple):
    """The registration of a name."""

    uuid: str
    generation: int
    digest: str
    pinned: bool
    kept: tuple[int, ...] = ()


class Operation(NamedTuple):
    """The next operation of the process."""

    kind: str
    name: str
    path: str = ""
    pinned: bool = False


def entry_of(record: AdapterInfo) -> Entry:
    kept = record.kept_generations
    return Entry(record.uuid, record.generation, record.facts.digest, record.pinned, kept)


def open_registry(root: Path, state_path: Path, keep_generations: int = 1) -> AdapterRegistry:
    state = StateDir(state_path, 1 << 20)
    state.bind(_BASE.name, _BASE.digest)
    return AdapterRegistry(root, _BASE, 1 << 24, 64, state=state, keep_generations=keep_generations)


def choose(draw: random.Random, registry: AdapterRegistry) -> Operation:
    """An operation that can succeed."""
    name, path = draw.choice(NAMES), draw.choice(PATHS)
    known = {record.name: record for record in registry.list()}
    if name not in known:
        return Operation(draw.choice(("load", "upload")), name, path, draw.random() < 0.3)
    kinds = ["replace", "replace_upload", "unpin" if known[name].pinned else "pin"]
    if not known[name].pinned:
        kinds.append("unload")
    if known[name].kept_generations:
        return Operation(draw.choice((*kinds, "rollback")), name, path)
    return Operation(draw.choice(kinds), name, path)


def perform(registry: AdapterRegistry, root: Path, operation: Operation) -> None:
    kind, name, path, pinned = operation
    if kind in ("upload", "replace_upload"):
        staged = stage_directory(registry, root / path)
        registry.upload(name, staged, pinned=pinned, replace=kind == "replace_upload")
        staged.discard()
    elif kind == "load":
        registry.load(name, path, pinned=pinned)
    elif kind == "replace":
        registry.replace(name, path)
    elif kind == "rollback":
        # Also forwards, to a generation with a higher number.
        registry.rollback(name, registry.get(name).kept_generations[-1])
    else:
        getattr(registry, kind)(name)


def say(message: object) -> None:
    """Write one line atomically, so that a killed process has either written it or not."""
    line = json.dumps(message).encode() + b"\n"
    assert len(line) <= select.PIPE_BUF
    os.write(sys.stdout.fileno(), line)


def entries_of(registry: AdapterRegistry) -> dict[str, Entry]:
    return {record.name: entry_of(record) for record in registry.list()}


def work(root: Path, state_path: Path, seed: int) -> None:
    """Print the restored state and whether it can be served, then work forever."""
    registry = open_registry(root, state_path)
    registry.restore()
    entries = entries_of(registry)
    uploads = sorted(path.name for path in (state_path / "files").iterdir())
    incoming = len(list((state_path / "incoming").iterdir()))
    errors = []
    for name in entries:
        waiter = Waiter(registry.acquire(refs(name)))
        if not waiter.was_resident:
            errors.append(waiter.wait().error)
        registry.release(waiter.mix)
    say([os.getpid(), entries, uploads, incoming, [str(e) for e in errors if e is not None]])
    draw = random.Random(seed)
    while True:
        operation = choose(draw, registry)
        say(["begin", operation])
        perform(registry, root, operation)
        say(["end", entries_of(registry)])


def main() -> None:
    """For each seed on stdin, fork a worker and wait until it has ended."""
    root, state_path = Path(sys.argv[1]), Path(sys.argv[2])
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                work(root, state_path, int(line))
            finally:
                os._exit(1)
        os.waitpid(child, 0)
        say(["over"])


if __name__ == "__main__":
    main()
