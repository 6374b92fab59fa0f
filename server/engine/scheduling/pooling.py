"""What a request asks of its prompt's final states, instead of an answer. No torch."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class PoolingKind(enum.Enum):
    """Which final states become one: that of the last token, or the mean over the text's tokens.

    Soft tokens and a prefix are no text: they are left out of the mean.
    """

    LAST = "last"
    MEAN = "mean"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooling:
    """How a prompt becomes a vector.

    Attributes:
        kind: Which states count.
        dimensions: How many numbers of the state are kept, from the first; None keeps all.
        classifies: Whether the state goes through the classification head of the mix, whose
            numbers are the vector; then nothing is cut or normalised.
        normalize: Whether what is kept is divided by its Euclidean length.
    """

    kind: PoolingKind = PoolingKind.LAST
    dimensions: int | None = None
    normalize: bool = True
    classifies: bool = False
