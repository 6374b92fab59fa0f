"""The constraint that a client asks for, before it is compiled."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

Kind = Literal["json_schema", "json_object", "regex", "grammar", "choice"]

# Longest text of a constraint; compiling and following one costs time and stack in proportion.
MAX_CONSTRAINT_CHARS = 1 << 16
MAX_CHOICES = 1024


@dataclass(frozen=True, slots=True)
class ConstraintSpec:
    """What to compile.

    Attributes:
        kind: How ``texts`` is to be read; the name of the field that it came in.
        texts: A schema, a regular expression, a grammar, or the texts to choose from.
    """

    kind: Kind
    texts: tuple[str, ...] = ()

    @property
    def num_chars(self) -> int:
        return sum(map(len, self.texts))

    @property
    def digest(self) -> bytes:
        """Names what is asked for: equal ones have one compiled form."""
        # Each answer to each prompt looks its constraint up, so do not loop over a thousand texts.
        lengths = ",".join(map(str, map(len, self.texts)))
        whole = f"{self.kind} {lengths} {''.join(self.texts)}"
        return hashlib.sha256(whole.encode()).digest()
