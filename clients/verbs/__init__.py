"""The client verbs of the ``turret`` command.

Each verb sets ``func(args) -> int``, which returns the exit code: 0 on success, 1 if a call failed,
2 if an argument is invalid, 130 if interrupted.
"""

from __future__ import annotations

import os

# gRPC's C++ library logs what errors already report. It reads this variable when it is loaded.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

# Verb → its line in the help, and the name of the function that adds it. Modules are imported on
# demand, so unused verbs cost a command nothing.
VERBS = {
    "generate": ("complete a prompt", "turret.clients.verbs.generate:add_generate"),
    "chat": ("talk to the model", "turret.clients.verbs.generate:add_chat"),
    "score": ("print log probabilities of a prompt", "turret.clients.verbs.texts:add_score"),
    "classify": ("label texts", "turret.clients.verbs.texts:add_classify"),
    "embed": ("turn texts into vectors", "turret.clients.verbs.texts:add_embed"),
    "eval": ("evaluate adapters on a test set", "turret.clients.verbs.eval:add_eval"),
    "adapters": ("manage adapters", "turret.clients.verbs.adapters:add_adapters"),
    "health": (
        "exit 0 if a server is serving, 1 if not",
        "turret.clients.verbs.health:add_health",
    ),
}
