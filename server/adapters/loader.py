"""Disk to operators: read, choose the method, lower, check the budgets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from turret.server.adapters.adapter_root import AdapterRoot
from turret.server.adapters.base import BaseModel
from turret.server.adapters.checkpoint import AdapterCheckpoint, read_checkpoint
from turret.server.adapters.lowered import Lowered
from turret.server.adapters.methods import method_for
from turret.server.adapters.operators import AdapterOperators
from turret.server.errors import AdapterCheckpointError, BudgetExceededError


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """A lowered checkpoint and where it came from."""

    digest: str
    method: str
    bytes_disk: int
    lowered: Lowered


class AdapterLoader:
    """Stateless but for its settings; safe to use from several threads.

    Args:
        root: The allow-listed adapter root; None refuses every path.
        base: The base model as served.
        host_bytes: Most bytes one adapter's operators may take.
        max_rank: Largest rank served.
    """

    def __init__(self, root: Path | None, base: BaseModel, host_bytes: int, max_rank: int) -> None:
        self._root = AdapterRoot(root)
        self._base = base
        self._host_bytes = host_bytes
        self._max_rank = max_rank

    def read(self, path: str) -> AdapterCheckpoint:
        """Reads and hashes; see ``read_checkpoint`` for the errors."""
        # Operators take at least one serving element per weight, so more cannot fit.
        max_elements = self._host_bytes // self._base.dtype.itemsize
        return read_checkpoint(self._root, path, max_elements=max_elements)

    def lower(self, checkpoint: AdapterCheckpoint) -> LoadedAdapter:
        """Makes the operators.

        Raises:
            AdapterCheckpointError: Unsupported method, key or tensor.
            AdapterMismatchError: Made for another base.
            BudgetExceededError: Rank or bytes over the limit.
        """
        method = method_for(checkpoint)
        lowered = method.lower(checkpoint, self._base, self._max_rank)
        if lowered.num_bytes > self._host_bytes:
            raise BudgetExceededError(
                f"adapter {checkpoint.path!r} needs {lowered.num_bytes} bytes of host memory, the"
                f" budget for all adapters is {self._host_bytes}",
                metadata={"path": checkpoint.path, "bytes": str(lowered.num_bytes)},
            )
        return LoadedAdapter(checkpoint.digest, method.name, checkpoint.bytes_disk, lowered)

    def reload(self, path: str, digest: str) -> AdapterOperators:
        """Reads an adapter that was loaded before and insists on the same content.

        Raises:
            AdapterCheckpointError: The files changed since, or are gone.
        """
        checkpoint = self.read(path)
        if checkpoint.digest != digest:
            raise AdapterCheckpointError(
                f"adapter {path!r} changed on disk since it was loaded; unload it and load it"
                " again to serve the new files",
                metadata={"path": path, "digest": digest, "found_digest": checkpoint.digest},
                violations=[("path", "changed on disk since it was loaded")],
            )
        return self.lower(checkpoint).lowered.operators
