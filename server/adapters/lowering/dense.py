"""Updates that are as large as the weights they change: what they take, and whether they may."""

from __future__ import annotations

from collections.abc import Iterator

from turret.server.adapters.base import BaseModel
from turret.server.adapters.checkpoint.adapter_checkpoint import AdapterCheckpoint
from turret.server.adapters.operators.adapter_operators import AdapterOperators
from turret.server.adapters.operators.dense import Dense
from turret.server.errors import BudgetExceededError

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
    what = (
        f"adapter {checkpoint.path!r} is {kind}: its updates are as large as the weights they"
        f" change and would take {needed} bytes"
    )
    limit = (
        f", the budget for all adapters is {max_bytes}; `turret serve --adapter-host-bytes` sets it"
        if max_bytes
        else f", which is served only with `turret serve {ALLOW}`"
    )
    raise BudgetExceededError(
        what + limit, metadata={"path": checkpoint.path, "bytes": str(needed), "flag": ALLOW}
    )


def _folders(path: str) -> Iterator[str]:
    """The paths of all modules that a tensor with this name may belong to."""
    while path := path.rpartition(".")[0]:
        yield path


def dense_warnings(operators: AdapterOperators) -> tuple[str, ...]:
    """The warnings about an adapter's whole matrices, if it has any."""
    modules = [*operators.modules.values(), *([operators.head] if operators.head else [])]
    parts = (part for module in modules for part in module.operators)
    total = sum(part.num_bytes for part in parts if isinstance(part, Dense))
    if not total:
        return ()
    why = (
        f"its updates are as large as the weights they change: {total} bytes in host memory and"
        " again on the device, all of which a step with the adapter reads"
    )
    return (why,)
