"""Collects everything wrong with an adapter, so that one answer names it all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from turret.server.errors import VIOLATION_COUNT, AdapterCheckpointError, AdapterMismatchError

# A hostile file can break thousands of rules; the answer stays readable and small.
MAX_REPORTED = 64
# Most characters of findings in a message; the first one is always included whole. The error's
# violations list all that are reported.
_MOST_CHARS = 400
# Most characters of the field names that a message lists after those findings.
_MOST_NAMES = 600
# If more fields than this share a fault, the message counts them instead of listing them.
_MOST_ALIKE = 3


class HasShape(Protocol):
    """A tensor, or the entry of one in a file's header."""

    @property
    def shape(self) -> Sequence[int]: ...


class Findings:
    """The faults of a checkpoint and its mismatches with the base, in the order found.

    Args:
        path: The adapter, as messages name it.
        base: The base's name, for messages; "" while nothing is compared with a base.
    """

    def __init__(self, path: str, base: str = "") -> None:
        self._path = path
        self._base = base
        # Starts the message about a mismatch, because one cause often explains many wrong shapes.
        self.cause = ""
        # Dictionaries serve as ordered sets, so a fault that two checks find is reported once.
        self._faults: dict[tuple[str, str], None] = {}
        self._mismatches: dict[tuple[str, str], None] = {}

    def add(self, field: str, why: str) -> None:
        """A fault of the checkpoint itself: ``field`` names a key, a file or a tensor."""
        self._faults.setdefault((field, why))

    def mismatch(self, field: str, why: str) -> None:
        """Adds a finding that may be correct in itself but does not fit this base."""
        self._mismatches.setdefault((field, why))

    def add_all(self, other: Findings) -> None:
        """Everything that another part of the same checkpoint's reading found."""
        self._faults |= other._faults
        self._mismatches |= other._mismatches
        self.cause = self.cause or other.cause

    @property
    def fields(self) -> frozenset[str]:
        """The fields with a fault."""
        return frozenset(field for field, _ in self._faults)

    @property
    def mismatched(self) -> frozenset[str]:
        """The fields that do not fit the base."""
        return frozenset(field for field, _ in self._mismatches)

    def check_shape(
        self, name: str, tensor: HasShape, *shapes: tuple[int, ...], of_base: bool = True
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
            AdapterCheckpointError: Unsupported or inconsistent; ``violations`` name everything at
                fault (past ``MAX_REPORTED``, how many more there are), the message the beginning.
            AdapterMismatchError: Sound, but for another base; likewise.
        """
        if self._faults:
            shown, text = _summary(self._faults, _MOST_NAMES)
            raise AdapterCheckpointError(
                f"adapter {self._path!r} cannot be served: {text}",
                metadata={"path": self._path, VIOLATION_COUNT: str(len(self._faults))},
                violations=shown,
            )
        if self._mismatches:
            shown, text = _summary(self._mismatches)
            cause = self.cause and f"{self.cause}; "
            raise AdapterMismatchError(
                f"adapter {self._path!r} does not fit base model {self._base!r}: {cause}{text}",
                metadata={
                    "path": self._path,
                    "base_model": self._base,
                    VIOLATION_COUNT: str(len(self._mismatches)),
                },
                violations=shown,
            )


def _summary(
    found: dict[tuple[str, str], None], most_names: int = 0
) -> tuple[list[tuple[str, str]], str]:
    """The findings to report, and as one sentence the first of them and the fields of others.

    Args:
        found: All of them.
        most_names: Most characters of those other fields.
    """
    shown = list(found)[:MAX_REPORTED]
    # A fault that all layers share is reported once.
    alike = Counter(why for _, why in found)
    folded: set[str] = set()
    lines: list[str] = []
    told, size = 0, 0
    rest: list[str] = []
    for field, why in found:
        if why in folded:
            continue
        others = alike[why] - 1 if alike[why] > _MOST_ALIKE and field else 0
        name = f"{field} and {others} others" if others else field
        line = f"{name}: {why}" if name else why
        if rest or (lines and size + len(line) > _MOST_CHARS):
            rest.append(field)
            continue
        lines.append(line)
        size += len(line)
        told += 1 + others
        if others:
            folded.add(why)
    text, named = "; ".join(lines), 0
    for field in rest[: MAX_REPORTED - len(lines)]:
        if named + len(field) > most_names:
            break
        text += f"{', ' if named else '; also '}{field}"
        named += len(field)
        told += 1
    if hidden := len(found) - told:
        text += f"; and {hidden} more"
    if len(found) > len(shown):
        shown.append(("", f"and {len(found) - len(shown)} more"))
    return shown, text
