"""The client verbs of the ``turret`` command.

Each verb sets ``func(args) -> int``, which returns the exit code: 0 on success, 1 if a call failed,
2 if an argument is invalid, 130 if interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os

# gRPC's C++ library logs what errors already report. It reads this variable when it is loaded.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

# Each verb has a function ``add_VERB`` in the module of its name, or in the one in _PLACES. Modules
# are imported on demand, so unused verbs cost a command nothing.
VERBS = {
    "generate": "complete a prompt",
    "chat": "talk to the model",
    "score": "print log probabilities of a prompt",
    "classify": "label texts",
    "embed": "turn texts into vectors",
    "eval": "evaluate adapters on a test set",
    "adapters": "manage adapters",
    "health": "exit 0 if a server is serving, 1 if not",
}
_PLACES = {"chat": "generate", "score": "texts", "classify": "texts", "embed": "texts"}


def add_verb(subparsers: argparse._SubParsersAction[argparse.ArgumentParser], name: str) -> None:
    """Add one of ``VERBS`` to a command's parser."""
    module = importlib.import_module(f"{__name__}.{_PLACES.get(name, name)}")
    getattr(module, f"add_{name}")(subparsers, VERBS[name])


def add_verbs(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add all verbs to a command's parser."""
    for name in VERBS:
        add_verb(subparsers, name)
