"""The commands that serve a trained adapter, ask it, and renew it."""

from __future__ import annotations

import shlex
from pathlib import Path

from turret.server.config import ADAPTER_NAME
from turret.training.run.folder import RunFolder
from turret.training.settings.ranks import SERVED_RANK
from turret.training.settings.resolve import Resolved


def what_next(resolved: Resolved, folder: RunFolder) -> str:
    """Where the adapter is, and what to type to serve it, to ask it, and to renew it.

    Args:
        resolved: The run, which is done.
        folder: What it wrote.
    """
    base = resolved.config.base.model
    model = "" if base is None else f" --model {shlex.quote(base)}"
    root = shlex.quote(str(folder.path))
    name = shlex.quote(adapter_name(folder.path))
    verb = "classify" if resolved.dataset.labels else "generate"
    # Suggest --chat only if the adapter was trained on chats.
    chat = " --chat" if any(each.turns for row in resolved.dataset.train for each in row) else ""
    return (
        f"adapter written: {folder.adapter}\n"
        f"serve it:  turret serve{model} --adapter-root {root} --preload {name}=adapter"
        f"{max_rank_flag(resolved)}\n"
        f"ask it:    turret {verb}{chat} -a {name} 'YOUR PROMPT'\n"
        f"renew it:  turret adapters replace {name} adapter  (where that server runs already)"
    )


def adapter_name(run: Path) -> str:
    """What the adapter of a run is called where nobody names it: as the run's directory is."""
    return run.name if ADAPTER_NAME.fullmatch(run.name) else "mine"


def max_rank_flag(resolved: Resolved) -> str:
    """`` --max-rank N`` where a server would refuse the adapter without it."""
    rank = resolved.method.served_rank(resolved.config.method, resolved.base)
    return f" --max-rank {rank}" if rank > SERVED_RANK else ""
