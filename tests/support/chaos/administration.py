"""Admin calls that change the registered adapters, and the states they may leave if interrupted."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from turret.clients.client import TurretClient

NAMES = ("x", "y", "z")
PATHS = ("a", "b", "c")
SECONDS = 60.0


class Entry(NamedTuple):
    """The adapter that is registered under a name."""

    uuid: str
    generation: int
    digest: str
    pinned: bool


State = dict[str, Entry]


class Operation(NamedTuple):
    """A call that is about to be made."""

    kind: str
    name: str
    path: str = ""


class Administrator:
    """Makes calls to a server.

    Args:
        address: The address of the server.
        root: The directory of its adapters.
    """

    def __init__(self, address: str, root: Path) -> None:
        self.client = TurretClient(address, max_retries=0, timeout=SECONDS)
        self._root = root

    def state(self) -> State:
        listed = self.client.adapters.list()
        return {a.name: Entry(a.uuid, a.generation, a.digest, a.pinned) for a in listed}

    def generate(self, *names: str) -> str:
        """Return a short answer, which is the same for the same weights."""
        answer = self.client.generate(
            "a b c", adapters=names, max_tokens=3, ignore_eos=True, temperature=0
        )
        return answer.text

    def choose(self, source: random.Random, state: State) -> Operation:
        """Choose a call that can succeed."""
        name, path = source.choice(NAMES), source.choice(PATHS)
        if name not in state:
            kinds = ["load", "upload"] + ["fuse"] * (2 if len(state) >= 2 else 0)
            return Operation(source.choice(kinds), name, path)
        kinds = ["replace", "replace_upload", "merge", "merge", "unmerge"]
        kinds += ["unpin"] if state[name].pinned else ["pin", "unload", "force"]
        return Operation(source.choice(kinds), name, path)

    def perform(self, operation: Operation, state: State) -> None:
        """Make the call.

        Raises:
            TurretRpcError: The call failed, or the server died.
        """
        kind, name, path = operation
        adapters, folder = self.client.adapters, self._root / path
        calls: dict[str, Callable[[], object]] = {
            "load": lambda: adapters.load(name, path),
            "replace": lambda: adapters.replace(name, path),
            "upload": lambda: adapters.upload(name, folder),
            "replace_upload": lambda: adapters.upload(name, folder, replace=True),
            "unload": lambda: adapters.unload(name),
            "force": lambda: adapters.unload(name, mode="force"),
            "pin": lambda: adapters.pin(name),
            "unpin": lambda: adapters.unpin(name),
            "fuse": lambda: adapters.fuse(name, sorted(state)[:2], combination="exact"),
            "merge": lambda: adapters.merge(name),
            "unmerge": adapters.unmerge,
        }
        calls[kind]()


def is_before_or_after(operation: Operation, before: State, found: State) -> bool:
    """Whether an interrupted call left the state from before it or from after it."""
    kind, name, _ = operation
    if {n: e for n, e in found.items() if n != name} != {
        n: e for n, e in before.items() if n != name
    }:
        return False
    old, new = before.get(name), found.get(name)
    if old == new:
        return True
    if kind in ("load", "upload", "fuse"):
        return old is None and new is not None and (new.generation, new.pinned) == (1, False)
    if kind in ("unload", "force"):
        return new is None
    if old is None or new is None:
        return False
    if kind in ("pin", "unpin"):
        return new == old._replace(pinned=kind == "pin")
    if kind in ("replace", "replace_upload"):
        same = (new.uuid, new.pinned) == (old.uuid, old.pinned)
        return same and new.generation == old.generation + 1 and new.digest != old.digest
    return False
