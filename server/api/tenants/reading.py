"""Checks the sequences and settings of a pass, whatever the protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from turret.lazy_torch import torch
from turret.server.api.violations import Violations
from turret.server.training.losses import LOSSES, TARGETS
from turret.server.training.trainer import MAX_SEQUENCE_TOKENS, Datum

if TYPE_CHECKING:
    from turret.server.models.describe import ModelInfo

# The maximum number of sequences in a request.
MAX_DATUMS = 1024
MAX_SETTINGS = 16
SHOWN_CHARS = 40
# The losses are computed in float32.
_MOST_FLOAT32 = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class AskedPass:
    """A pass as the client asks for it.

    Attributes:
        data: The sequences.
        loss: A name in ``LOSSES``.
        settings: The settings of the loss.
        is_forward_only: Whether to compute no gradients.
    """

    data: Sequence[Datum]
    loss: str
    settings: Mapping[str, float]
    is_forward_only: bool


class Refused(Exception):
    """Raised when a value is invalid, after the violation has been recorded."""


class DatumReader:
    """Checks sequences, and notes violations.

    Args:
        info: The model, which sets the limits on tokens.
        violations: Receives the violations.
    """

    def __init__(self, info: ModelInfo, violations: Violations) -> None:
        self._info = info
        self._violations = violations

    def check_tokens(self, tokens: np.ndarray, path: str) -> None:
        """Check a sequence.

        Raises:
            Refused: It is empty or too long, or has tokens outside of the vocabulary.
        """
        self.check(len(tokens) > 0, path, "EMPTY")
        most = min(self._info.max_model_len, MAX_SEQUENCE_TOKENS)
        fits = len(tokens) <= most
        self.check(fits, path, "PROMPT_TOO_LONG", length=len(tokens), limit=most, unit="tokens")
        self._check_vocabulary(tokens, path)

    def input(self, name: str, numbers: np.ndarray, length: int, path: str) -> Any:
        """An input of a loss as a tensor: int64 for targets, otherwise fp32.

        Raises:
            Refused: Its length differs from the sequence's, or it has a number that is not allowed.
        """
        count = len(numbers)
        self.check(count == length, path, "NOT_AS_LONG", expected=length, found=count)
        if name == TARGETS:
            self._check_vocabulary(numbers, path)
        else:
            is_finite = bool(np.isfinite(numbers).all())
            self.check(is_finite, path, "NOT_FINITE", dtype="float32")
        # The copy is writable and in the machine's byte order, as torch requires.
        return torch.from_numpy(numbers.astype(np.int64 if name == TARGETS else np.float32))

    def check(self, ok: bool, path: str, reason: str, **params: Any) -> None:
        """Record a violation unless ``ok``.

        Raises:
            Refused: There is a violation.
        """
        self._violations.check(ok, path, reason, **params)
        if not ok:
            raise Refused

    def _check_vocabulary(self, tokens: np.ndarray, path: str) -> None:
        size = self._info.vocab_size
        outside = np.flatnonzero((tokens < 0) | (tokens >= size))
        if len(outside):
            value = int(tokens[outside[0]])
            self.check(False, f"{path}[{outside[0]}]", "NOT_A_TOKEN", value=value, size=size)


def check_loss(loss: str, count: int, violations: Violations, path: str) -> bool:
    """Check the name of a loss and the number of sequences.

    Returns:
        Whether the sequences can be read.
    """
    choices, shown = ", ".join(LOSSES), loss[:SHOWN_CHARS]
    violations.check(loss in LOSSES, path, "NOT_ONE_OF", value=shown, choices=choices)
    violations.check(count > 0, "data", "EMPTY")
    return violations.check_count(count, MAX_DATUMS, "data") and loss in LOSSES


def check_settings(
    loss: str, settings: Mapping[str, float], violations: Violations, path: str
) -> None:
    """Check the settings of a loss. The loss itself may be unknown."""
    known = LOSSES[loss].settings if loss in LOSSES else settings
    for name, value in settings.items():
        shown = name[:SHOWN_CHARS]
        violations.check(name in known, f"{path}.{shown}", "UNKNOWN_FIELD", name=shown)
        is_finite = abs(value) <= _MOST_FLOAT32
        violations.check(is_finite, f"{path}.{shown}", "NOT_FINITE", dtype="float32")
