"""Collects everything wrong with a checkpoint, so that one answer names it all."""

from __future__ import annotations

from turret.server.errors import AdapterCheckpointError

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
