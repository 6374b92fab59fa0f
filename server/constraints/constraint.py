"""A compiled constraint, shared by all requests that ask for it."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from turret.server.constraints.matcher import Alphabet, Matcher
from turret.server.errors import QueueFullError
from turret.server.words import say

if TYPE_CHECKING:
    # Types only: the GPU benchmark runs steps where llguidance is not installed.
    from llguidance import LLMatcher

# Copies of a matcher share one lexer's states, which are never freed. After a constraint has used
# this much processor time (thousands of ordinary answers), it starts with a new lexer.
RENEW_SECONDS = 0.5
# Approximate memory of one answer's position in the grammar, without the parts that answers share.
MATCHER_BYTES = 64 << 10


class Constraint:
    """Makes matchers, on one thread at a time.

    Args:
        make: Compiles the constraint for a value of ``forces``. If the first call succeeds, later
            calls do too.
        alphabet: The alphabet of the constraint's tokenizer.
        num_bytes: The approximate memory of the compiled form.
        forces: The value of ``forces`` (see ``copy``) with which matchers begin.
    """

    def __init__(
        self, make: Callable[[bool], LLMatcher], alphabet: Alphabet, num_bytes: int, *, forces: bool
    ) -> None:
        self._make = make
        self.forces = forces
        self._prototypes: dict[bool, LLMatcher] = {}
        self._alphabet = alphabet
        self._seconds = 0.0
        self.num_bytes = num_bytes

    def matcher(self) -> Matcher:
        """A matcher at the beginning of an answer."""
        if self._seconds > RENEW_SECONDS:
            self._renew()
        return Matcher(self, self._alphabet)

    # Called by matchers.

    def copy(self, *, forces: bool) -> LLMatcher:
        """A matcher of llguidance at the beginning of an answer, with the newest lexer.

        Args:
            forces: Whether forced text consists of the tokens that the tokenizer makes of it. If
                False, any tokens may spell it.
        """
        found = self._prototypes.get(forces)
        if found is None:
            found = self._prototypes[forces] = self._make(forces)
        return found.deep_copy()

    def renewed(self, *, forces: bool) -> LLMatcher:
        """A matcher of llguidance at the beginning of an answer, with an unused lexer."""
        self._renew()
        return self.copy(forces=forces)

    def count(self, seconds: float) -> None:
        """Count processor time that a matcher took."""
        self._seconds += seconds

    def _renew(self) -> None:
        self._prototypes.clear()
        self._seconds = 0.0


# The recently compiled constraints of all vocabularies.

MAX_CACHED = 64
MAX_CACHED_BYTES = 64 << 20
# Maximum memory of all constraints, with those that are only used by requests that wait or run. One
# bearer token may have half of it.
MAX_HELD_BYTES = 512 << 20


class KeptConstraints:
    """Keeps the most recently used constraints within one budget. Belongs to one event loop.

    Only ``hold`` may be called from any thread.

    Attributes:
        num_bytes: The approximate memory of the constraints.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._kept: OrderedDict[tuple[int, bytes], Constraint] = OrderedDict()
        self._owners = itertools.count()
        self._lock = threading.Lock()
        self._held: Counter[bytes] = Counter()
        # Constraints that have ended since the last call of ``hold``.
        self._ended: deque[tuple[bytes, int]] = deque()

    def __len__(self) -> int:
        return len(self._kept)

    def new_owner(self) -> int:
        """A number for a new vocabulary, because each vocabulary has its own compiled forms."""
        return next(self._owners)

    def find(self, owner: int, digest: bytes) -> Constraint | None:
        """Find a compiled form and mark it as the one used last."""
        found = self._kept.get((owner, digest))
        if found is not None:
            self._kept.move_to_end((owner, digest))
        return found

    def keep(self, owner: int, digest: bytes, constraint: Constraint) -> None:
        """Keep a new compiled form, and drop the least recently used ones."""
        self._kept[owner, digest] = constraint
        self.num_bytes += constraint.num_bytes
        while len(self._kept) > MAX_CACHED or self.num_bytes > MAX_CACHED_BYTES:
            self._drop(next(iter(self._kept)))

    def hold(self, constraint: Constraint, tenant: bytes, num_bytes: int) -> None:
        """Count the memory of a constraint until nothing refers to it.

        Raises:
            QueueFullError: All constraints, or those of this tenant, would take too much memory.
        """
        with self._lock:
            while self._ended:
                other, size = self._ended.popleft()
                self._held[other] -= size
            self._held = +self._held
            limits = [(self._held.total(), MAX_HELD_BYTES)]
            if tenant:
                limits.append((self._held[tenant], MAX_HELD_BYTES // 2))
            for held, most in limits:
                if held + num_bytes > most:
                    raise QueueFullError(say("CONSTRAINTS_FULL", held=held, most=most))
            self._held[tenant] += num_bytes
        weakref.finalize(constraint, self._ended.append, (tenant, num_bytes))

    def forget(self, owner: int) -> None:
        """Drop all compiled forms of one vocabulary."""
        for key in [key for key in self._kept if key[0] == owner]:
            self._drop(key)

    def _drop(self, key: tuple[int, bytes]) -> None:
        self.num_bytes -= self._kept.pop(key).num_bytes
