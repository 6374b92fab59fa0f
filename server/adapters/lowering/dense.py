"""Updates that are as large as the weights they change: what they take, and whether they may."""

from __future__ import annotations

from collections.abc import Iterator

from turret.server.adapters.base import BaseModel
from turret.server.adapters.checkpoint.adapter_checkpoint import AdapterCheckpoint
from turret.server.adapters.operators.adapter_operators import AdapterOperators
from turret.server.adapters.operators.dense import Dense
from turret.server.errors import BudgetExceededError
from turret.server.words import Text, say

ALLOW = "--allow-dense-adapters"


def check_dense(checkpoint: AdapterCheckpoint, base: BaseModel, max_bytes: int | None) -> None:
    """Refuses an adapter of whole matrices before any of them is made.

    Args:
        checkpoint: A checkpoint of a method whose updates are dense.
        base: The base they would be made for.
        max_bytes: Most bytes they may take; 0 where the server allows none, None is any.

    Raises:
        BudgetExceededError: They would take more.
    """
    if max_bytes is None:
        return
    adapted = {name for tensor in checkpoint.tensors for name in _folders(tensor)}
    sizes = [base.modules[name] for name in adapted & base.modules.keys()]
    needed = sum(m.out_features * m.in_features for m in sizes) * base.dtype.itemsize
    if needed <= max_bytes:
        return
    kind = str(checkpoint.config.get("peft_type")).upper()
    facts = {"path": checkpoint.path, "method": kind, "bytes": needed}
    if max_bytes:
        raise BudgetExceededError(say("DENSE_OVER_BUDGET", **facts, host_bytes=max_bytes))
    raise BudgetExceededError(say("DENSE_NOT_ALLOWED", **facts, flag=ALLOW))


def _folders(path: str) -> Iterator[str]:
    """The paths of all modules that a tensor with this name may belong to."""
    while path := path.rpartition(".")[0]:
        yield path


def dense_warnings(operators: AdapterOperators) -> tuple[Text, ...]:
    """The warnings about an adapter's whole matrices, if it has any."""
    modules = [*operators.modules.values(), *([operators.head] if operators.head else [])]
    parts = (part for module in modules for part in module.operators)
    total = sum(part.num_bytes for part in parts if isinstance(part, Dense))
    return (say("LARGE_UPDATES", bytes=total),) if total else ()
