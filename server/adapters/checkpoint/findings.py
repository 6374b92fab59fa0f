"""Collects everything wrong with an adapter, so that one answer names it all."""

from __future__ import annotations

import torch

from turret.server.errors import AdapterCheckpointError, AdapterMismatchError

# A hostile file can break thousands of rules; the answer stays readable and small.
MAX_REPORTED = 64


class Findings:
    """What is wrong with a checkpoint itself, and what does not fit the base, in the order found.

    Args:
        path: The adapter, as messages name it.
        base: The base's name, for messages; "" while nothing is compared with a base.
    """

    def __init__(self, path: str, base: str = "") -> None:
        self._path = path
        self._base = base
        # Dictionaries, as ordered sets: a fault that two checks see is told once.
        self._faults: dict[tuple[str, str], None] = {}
        self._mismatches: dict[tuple[str, str], None] = {}

    def add(self, field: str, why: str) -> None:
        """A fault of the checkpoint itself: ``field`` names a key, a file or a tensor."""
        self._faults.setdefault((field, why))

    def mismatch(self, field: str, why: str) -> None:
        """Something that may be sound, but not on this base."""
        self._mismatches.setdefault((field, why))

    @property
    def fields(self) -> frozenset[str]:
        """The fields with a fault."""
        return frozenset(field for field, _ in self._faults)

    @property
    def mismatched(self) -> frozenset[str]:
        """The fields that do not fit the base."""
        return frozenset(field for field, _ in self._mismatches)

    def check_shape(
        self, name: str, tensor: torch.Tensor, *shapes: tuple[int, ...], of_base: bool = True
    ) -> bool:
        """Whether the tensor has one of the shapes; else a mismatch, or a fault."""
        if tuple(tensor.shape) in shapes:
            return True
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        report = self.mismatch if of_base else self.add
        report(name, f"has shape {list(tensor.shape)}, expected {wanted}")
        return False

    def raise_if_any(self) -> None:
        """Raises what was found; faults of the checkpoint itself come first.

        Raises:
            AdapterCheckpointError: Unsupported or inconsistent; its message and ``violations`` name
                everything at fault (past ``MAX_REPORTED``, how many more there are).
            AdapterMismatchError: Sound, but for another base; likewise.
        """
        if self._faults:
            shown, text = _summary(self._faults)
            raise AdapterCheckpointError(
                f"adapter {self._path!r} cannot be served: {text}",
                metadata={"path": self._path, "violation_count": str(len(self._faults))},
                violations=shown,
            )
        if self._mismatches:
            shown, text = _summary(self._mismatches)
            raise AdapterMismatchError(
                f"adapter {self._path!r} does not fit base model {self._base!r}: {text}",
                metadata={"path": self._path, "base_model": self._base},
                violations=shown,
            )


def _summary(found: dict[tuple[str, str], None]) -> tuple[list[tuple[str, str]], str]:
    """The findings to report, and all of them as one sentence."""
    shown = list(found)[:MAX_REPORTED]
    hidden = len(found) - len(shown)
    if hidden:
        shown.append(("", f"and {hidden} more"))
    return shown, "; ".join(f"{field}: {why}" if field else why for field, why in shown)
