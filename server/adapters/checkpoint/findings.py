"""Collects everything wrong with a checkpoint, so that one answer names it all."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from turret.server.errors import AdapterCheckpointError, AdapterMismatchError

# A hostile file can break thousands of rules; the answer stays readable and small.
MAX_REPORTED = 64


class Violations:
    """``(field, description)`` pairs in the order found; one description per field and text."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], None] = {}

    def add(self, field: str, description: str) -> None:
        self._found.setdefault((field, description))

    @property
    def fields(self) -> frozenset[str]:
        return frozenset(field for field, _ in self._found)

    def __bool__(self) -> bool:
        return bool(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def raise_if_any(self, path: str) -> None:
        """Raises what was collected.

        Raises:
            AdapterCheckpointError: At least one violation was added; its message and
                ``violations`` name every one (past ``MAX_REPORTED``, how many more there are).
        """
        if not self._found:
            return
        shown = list(self._found)[:MAX_REPORTED]
        hidden = len(self._found) - len(shown)
        if hidden:
            shown.append(("", f"and {hidden} more"))
        text = "; ".join(f"{field}: {why}" if field else why for field, why in shown)
        raise AdapterCheckpointError(
            f"adapter {path!r} cannot be served: {text}",
            metadata={"path": path, "violation_count": str(len(self._found))},
            violations=shown,
        )


@dataclass(slots=True)
class Findings:
    """What is wrong: with the checkpoint itself, or with it on this base."""

    violations: Violations = field(default_factory=Violations)
    mismatches: list[tuple[str, str]] = field(default_factory=list)

    def check_shape(
        self, name: str, tensor: torch.Tensor, *shapes: tuple[int, ...], of_base: bool = True
    ) -> bool:
        """Whether the tensor has one of the shapes; else a mismatch, or a violation."""
        if tuple(tensor.shape) in shapes:
            return True
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        why = f"has shape {list(tensor.shape)}, expected {wanted}"
        if of_base:
            self.mismatches.append((name, why))
        else:
            self.violations.add(name, why)
        return False

    def raise_if_any(self, path: str, base: str) -> None:
        """Raises what was found; faults of the checkpoint itself come first.

        Raises:
            AdapterCheckpointError: Unsupported or inconsistent; names everything at fault.
            AdapterMismatchError: Sound, but for another base; names everything that does not fit.
        """
        self.violations.raise_if_any(path)
        if not self.mismatches:
            return
        shown = self.mismatches[:MAX_REPORTED]
        more = len(self.mismatches) - len(shown)
        text = "; ".join(f"{name}: {why}" for name, why in shown)
        raise AdapterMismatchError(
            f"adapter {path!r} does not fit base model {base!r}: {text}"
            + (f"; and {more} more" if more else ""),
            metadata={"path": path, "base_model": base},
            violations=shown,
        )
