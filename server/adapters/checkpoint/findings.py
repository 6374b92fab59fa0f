"""Collects everything wrong with an adapter, so that one answer names it all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Protocol

from turret.server.errors import AdapterCheckpointError, AdapterMismatchError, InvalidRequestError
from turret.server.words import Text, say

# A hostile file can break thousands of rules; the answer stays readable and small.
MAX_REPORTED = 64
# Most kinds of findings that a message describes, and most other fields that it lists for each.
# The error's violations have all that are reported.
_MOST_KINDS = 5
_MOST_ALIKE = 3

Finding = tuple[str, Text]


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
        # Start the message about a mismatch, because one cause often explains many wrong shapes.
        self.causes: tuple[Text, ...] = ()
        # Dictionaries serve as ordered sets, so a fault that two checks find is reported once.
        self._faults: dict[Finding, None] = {}
        self._mismatches: dict[Finding, None] = {}

    def add(self, field: str, why: Text) -> None:
        """A fault of the checkpoint itself: ``field`` names a key, a file or a tensor."""
        self._faults.setdefault((field, why))

    def mismatch(self, field: str, why: Text) -> None:
        """Adds a finding that may be correct in itself but does not fit this base."""
        self._mismatches.setdefault((field, why))

    def add_all(self, other: Findings) -> None:
        """Everything that another part of the same checkpoint's reading found."""
        self._faults |= other._faults
        self._mismatches |= other._mismatches
        self.causes = self.causes or other.causes

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
        report(name, say("WRONG_SHAPE", shape=list(tensor.shape), expected=wanted))
        return False

    def raise_if_any(self, **more: str) -> None:
        """Raises what was found; faults of the checkpoint itself come first.

        Args:
            more: Further metadata of faults of the checkpoint.

        Raises:
            AdapterCheckpointError: Unsupported or inconsistent; ``violations`` name everything at
                fault (past ``MAX_REPORTED``, how many more there are), the message the beginning.
            AdapterMismatchError: Sound, but for another base; likewise.
        """
        if self._faults:
            text = say(
                "ADAPTER_UNUSABLE",
                path=self._path,
                violation_count=len(self._faults),
                found=_summary(self._faults),
                **more,
            )
            raise AdapterCheckpointError(text, violations=_reported(self._faults))
        if self._mismatches:
            text = say(
                "ADAPTER_MISFIT",
                path=self._path,
                base_model=self._base,
                violation_count=len(self._mismatches),
                found=_summary(self._mismatches, self.causes),
            )
            raise AdapterMismatchError(text, violations=_reported(self._mismatches))


def refuse_all(found: Sequence[Finding]) -> None:
    """Raises one error for all that is wrong with a request.

    Raises:
        InvalidRequestError: Something is.
    """
    if found:
        raise InvalidRequestError.of_all(found)


def _reported(found: dict[Finding, None]) -> list[Finding]:
    shown = list(islice(found, MAX_REPORTED))
    if len(found) > len(shown):
        shown.append(("", say("MORE", count=len(found) - len(shown))))
    return shown


def _summary(found: Iterable[Finding], causes: Iterable[Text] = ()) -> Text:
    """One sentence for each reason, about the first field with it."""
    alike: dict[str, list[Finding]] = {}
    for field, why in found:
        alike.setdefault(why.reason, []).append((field, why))
    kinds = list(alike.values())
    lines = list(causes)
    for (field, why), *others in kinds[:_MOST_KINDS]:
        if others:
            fields = ", ".join(name for name, _ in others[:_MOST_ALIKE])
            count = len(others)
            lines.append(say("FINDING_AND_MORE", field=field, why=why, count=count, fields=fields))
        else:
            lines.append(say("FINDING", field=field, why=why))
    if hidden := sum(map(len, kinds[_MOST_KINDS:])):
        lines.append(say("MORE", count=hidden))
    return say("FINDINGS", found="; ".join(lines), first=lines[0])
