"""Admin calls that change the registered adapters, and the states they may leave if interrupted."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from turret.clients.adapter_files import upload_messages
from turret.v1 import adapters_pb2 as pb
from turret.v1 import adapters_pb2_grpc, inference_pb2, inference_pb2_grpc

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
        self.channel = grpc.insecure_channel(address)
        self._stub = adapters_pb2_grpc.AdaptersStub(self.channel)
        self._inference = inference_pb2_grpc.InferenceStub(self.channel)
        self._root = root

    def state(self) -> State:
        request = pb.ListAdaptersRequest(page_size=100)
        state: State = {}
        while True:
            answer = self._stub.ListAdapters(request, timeout=SECONDS)
            for a in answer.adapters:
                state[a.name] = Entry(a.uuid, a.generation, a.digest, a.pinned)
            if not answer.next_page_token:
                return state
            request.page_token = answer.next_page_token

    def is_merged(self) -> bool:
        state = self._stub.GetMergeState(pb.GetMergeStateRequest(), timeout=SECONDS)
        return len(state.adapters) > 0

    def generate(self, *names: str) -> str:
        """Return a short answer, which is the same for the same weights."""
        request = inference_pb2.GenerateRequest(prompt="a b c")
        request.stop.max_tokens = 3
        request.stop.ignore_eos = True
        request.sampling.temperature = 0
        for name in names:
            request.adapters.add(name=name)
        return self._inference.Generate(request, timeout=SECONDS).text

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
            grpc.RpcError: The call failed, or the server died.
        """
        kind, name, path = operation
        calls: dict[str, Callable[[], Any]] = {
            "load": lambda: self._stub.LoadAdapter(
                pb.LoadAdapterRequest(name=name, path=path), timeout=SECONDS
            ),
            "replace": lambda: self._stub.ReplaceAdapter(
                pb.ReplaceAdapterRequest(name=name, path=path), timeout=SECONDS
            ),
            "upload": lambda: self._upload(name, path, replace=False),
            "replace_upload": lambda: self._upload(name, path, replace=True),
            "unload": lambda: self._unload(name, "DRAIN"),
            "force": lambda: self._unload(name, "FORCE"),
            "pin": lambda: self._stub.PinAdapter(pb.PinAdapterRequest(name=name), timeout=SECONDS),
            "unpin": lambda: self._stub.UnpinAdapter(
                pb.UnpinAdapterRequest(name=name), timeout=SECONDS
            ),
            "fuse": lambda: self._fuse(name, sorted(state)[:2]),
            "merge": lambda: self._merge(name),
            "unmerge": lambda: self._stub.UnmergeAdapters(
                pb.UnmergeAdaptersRequest(), timeout=SECONDS
            ),
        }
        calls[kind]()

    def _upload(self, name: str, path: str, *, replace: bool) -> None:
        messages = upload_messages(name, self._root / path, pinned=False, replace=replace)
        self._stub.UploadAdapter(iter(list(messages)), timeout=SECONDS)

    def _unload(self, name: str, mode: str) -> None:
        request = pb.UnloadAdapterRequest(name=name, mode=mode)  # type: ignore[arg-type]
        self._stub.UnloadAdapter(request, timeout=SECONDS)

    def _fuse(self, name: str, members: list[str]) -> None:
        request = pb.FuseAdaptersRequest(name=name, combination="exact")
        for member in members:
            request.adapters.add(name=member)
        self._stub.FuseAdapters(request, timeout=SECONDS)

    def _merge(self, name: str) -> None:
        request = pb.MergeAdaptersRequest()
        request.adapters.add(name=name)
        self._stub.MergeAdapters(request, timeout=SECONDS)


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
