"""Compiled constraints, and matchers, which follow an answer and determine its next tokens."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from turret.server.constraints.grammar import MAX_CONSTRAINT_CHARS, shortened
from turret.server.errors import BudgetExceededError, InvalidRequestError, QueueFullError
from turret.server.words import say

if TYPE_CHECKING:
    # Types only: the GPU benchmark runs steps where llguidance is not installed.
    from llguidance import LLMatcher, LLTokenizer


# Facts about a tokenizer's tokens that do not depend on the constraint.

Words = np.ndarray[tuple[int], np.dtype[np.int32]]


class Alphabet:
    """The tokens of one tokenizer.

    Args:
        texts: The text of each token; empty for special tokens.
        num_drawable: The number of tokens, from the first on, for which the model has logits.
    """

    def __init__(self, texts: list[bytes], num_drawable: int) -> None:
        self.num_words = (len(texts) + 31) // 32
        times = Counter(texts)
        self._plain = bytes(bool(t) and times[t] == 1 for t in texts[:num_drawable])
        self._drawable: Words | None = None
        if num_drawable < len(texts):
            self._drawable = words_of(range(num_drawable), self.num_words)

    def is_plain(self, token_id: int) -> bool:
        """Whether a token can be drawn, has a text, and no other token has the same text."""
        return token_id < len(self._plain) and self._plain[token_id] == 1

    def is_drawable(self, token_id: int) -> bool:
        """Whether the model has a logit for a token."""
        return token_id < len(self._plain)

    def keep_drawable(self, words: Words) -> bool:
        """Remove from a mask, in place, the tokens that cannot be drawn.

        Args:
            words: ``[num_words]`` int32, with at least one token.

        Returns:
            Whether any token is left.
        """
        if self._drawable is None:
            return True
        words &= self._drawable
        return bool(words.any())


def alphabet_of(native: LLTokenizer, num_drawable: int) -> Alphabet:
    """Make the alphabet of a tokenizer by reading each token: 25 ms for 50,000 tokens."""
    texts = [
        b"" if native.is_special_token(token) else native.decode_bytes([token])
        for token in range(native.vocab_size)
    ]
    return Alphabet(texts, num_drawable)


def special_of(native: LLTokenizer) -> dict[int, str]:
    """The special tokens of a tokenizer that a grammar can name, with their texts."""
    texts = {
        token: native.decode_bytes([token]).decode(errors="replace")
        for token in range(native.vocab_size)
        if native.is_special_token(token)
    }
    return {token: text for token, text in texts.items() if text}


def words_of(token_ids: Iterable[int], num_words: int) -> Words:
    """``[num_words]`` int32 with the bits of these tokens set; tokens past the end are ignored."""
    bits = np.zeros(32 * num_words, dtype=np.uint8)
    bits[[token for token in token_ids if token < 32 * num_words]] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


# Threads with large stacks, because llguidance follows nested rules by recursion.
#
# On an ordinary stack of 8 MiB, a grammar of a few thousand nested rules crashes the process. The
# length of a constraint limits how deeply its rules nest, so these stacks are large enough for
# every accepted constraint (measured: 2 KiB per rule, of at least 8 characters). A stack only
# reserves address space, and takes memory only where it is used.

STACK_BYTES = MAX_CONSTRAINT_CHARS * (4 << 10)

_lock = threading.Lock()


@contextlib.contextmanager
def _roomy_stacks() -> Iterator[None]:
    # The stack size is a setting of the whole process, so a thread that starts elsewhere meanwhile
    # gets it, too.
    with _lock:
        before = threading.stack_size(STACK_BYTES)
        try:
            yield
        finally:
            threading.stack_size(before)


def start_roomy(thread: threading.Thread) -> None:
    """Start a thread with a stack of ``STACK_BYTES``."""
    with _roomy_stacks():
        thread.start()


def roomy_executor(
    num_threads: int, name: str, initializer: Callable[[], None] | None = None
) -> ThreadPoolExecutor:
    """An executor whose threads, all of them started, have stacks of ``STACK_BYTES``."""
    executor = ThreadPoolExecutor(num_threads, name, initializer=initializer)
    together = threading.Barrier(num_threads + 1)
    with _roomy_stacks():
        for _ in range(num_threads):
            executor.submit(together.wait)
    together.wait()
    return executor


# Processor time that one answer's matcher may take: an initial amount, and more for each token.
# Ordinary grammars take 0.1 ms a token; a literal of 65,536 characters takes 40 ms.
_FIRST_SECONDS = 2.0
_TOKEN_SECONDS = 0.005
# llguidance's message when the lexer that all matchers of a constraint share is full.
_LEXER_FULL = "too many states"


class Matcher:
    """One answer's position in a grammar. Use it from one thread at a time.

    *Forced text* is text that the grammar requires at a position, such as the rest of a choice. If
    the matcher ``forces``, this text consists of the tokens that the tokenizer makes of it.
    Otherwise, any tokens may spell it.

    Args:
        source: The constraint.
        alphabet: The alphabet of the constraint's tokenizer.
    """

    def __init__(self, source: Constraint, alphabet: Alphabet) -> None:
        self._source = source
        self._alphabet = alphabet
        self._forces = source.forces
        self._native = source.copy(forces=self._forces)
        self._tokens: list[int] = []
        self._seconds = 0.0

    @property
    def num_tokens(self) -> int:
        """The number of tokens so far."""
        return len(self._tokens)

    def check(self, token_ids: Sequence[int]) -> None:
        """Check that the constraint allows the beginning of an answer.

        Raises:
            InvalidRequestError: The constraint does not allow it.
        """
        num_allowed = self._native.validate_tokens(list(token_ids))
        if num_allowed < len(token_ids):
            said = say("TOKEN_FORBIDDEN", index=num_allowed)
            raise InvalidRequestError.of("answer_so_far", said)

    def advance(self, token_id: int) -> None:
        """Advance by a token, which the last mask allowed.

        Raises:
            InvalidRequestError: The grammar is too complex to continue.
        """
        self._tokens.append(token_id)
        self._follow(lambda: self._native.consume_token(token_id), again=lambda: None)

    def try_advance(self, token_id: int, withheld: Collection[int] = ()) -> int | None:
        """Advance by a token if the mask allows it, or else by the only token that it allows.

        This costs a tenth as much as a mask.

        Args:
            token_id: The token.
            withheld: See ``mask``.

        Returns:
            The token by which it advanced; None if the mask is needed to decide.

        Raises:
            InvalidRequestError: The grammar is too complex to continue.
            BudgetExceededError: The answer's matcher has taken too much processor time.
        """
        taken: int | None = None

        def look() -> None:
            nonlocal taken
            token = self._forced()
            if token is None and token_id not in withheld:
                token = token_id
            taken = None
            if token is not None and self._alphabet.is_plain(token):
                taken = token if self._native.try_consume_tokens([token]) else None

        self._follow(look, again=look)
        self._check_time()
        if taken is not None:
            self._tokens.append(taken)
        return taken

    def mask(self, withheld: Collection[int] = ()) -> Words:
        """The tokens that may come next: token ``t`` is bit ``t % 32`` of word ``t // 32``.

        Args:
            withheld: Tokens that are forbidden as long as another token is allowed.

        Returns:
            ``[num_words]`` int32.

        Raises:
            InvalidRequestError: The grammar is too complex to continue.
            BudgetExceededError: The answer's matcher has taken too much processor time, or no token
                that can be drawn may come next.
        """
        words: Words = np.empty(self._alphabet.num_words, dtype=np.int32)
        pointer, size = words.ctypes.data, words.nbytes

        def fill() -> None:
            self._forced()
            self._native.unsafe_compute_mask_ptr(pointer, size)

        self._follow(fill, again=fill)
        self._check_time()
        # The mask is not empty, because llguidance would have reported an error.
        if not self._alphabet.keep_drawable(words):
            raise BudgetExceededError(say("CONSTRAINT_DEAD_END"))
        return without(words, withheld)

    def _check_time(self) -> None:
        if self._seconds > _FIRST_SECONDS + _TOKEN_SECONDS * len(self._tokens):
            raise BudgetExceededError(say("CONSTRAINT_TOO_SLOW"))

    def _forced(self) -> int | None:
        """The only allowed token, if the grammar forces a text here; otherwise None."""
        if not self._forces:
            return None
        forced = self._native.compute_ff_tokens()
        if not forced:
            return None
        token = forced[0]
        is_plain = self._alphabet.is_plain(token)
        if is_plain or (
            self._alphabet.is_drawable(token) and self._native.validate_tokens([token])
        ):
            return token
        # The forced text equals the name of a special token, so the tokenizer returns that token.
        # The grammar does not allow this token here, or the model has no logit for it, so let any
        # tokens spell the text from now on.
        self._forces = False
        self._native = self._source.copy(forces=False)
        self._native.consume_tokens(self._tokens)
        return None

    def _follow(self, work: Callable[[], object], again: Callable[[], object]) -> None:
        """Call ``work``. If the lexer is full, make a new native matcher and call ``again``.

        The new matcher first consumes all tokens so far. Other answers may have filled the lexer,
        and an answer must not depend on other answers.
        """
        start = time.thread_time()
        work()
        if self._native.is_error() and _LEXER_FULL in self._native.get_error():
            self._native = self._source.renewed(forces=self._forces)
            if self._native.consume_tokens(self._tokens):
                again()
        seconds = time.thread_time() - start
        self._seconds += seconds
        self._source.count(seconds)
        if self._native.is_error():
            problem = shortened(self._native.get_error())
            # A retry would end at the same place, so do not report a lack of resources.
            raise InvalidRequestError(say("CONSTRAINT_TOO_COMPLEX", problem=problem))


def without(words: Words, withheld: Collection[int]) -> Words:
    """A mask without some tokens, unless it would then be empty."""
    size = 32 * words.shape[0]
    # Common case: the mask contains none of the withheld tokens.
    present = [t for t in withheld if t < size and words[t >> 5] >> (t & 31) & 1]
    if not present:
        return words
    rest = words.copy()
    bits = rest.view(np.uint32)
    for token in present:
        bits[token >> 5] &= np.uint32(~(1 << (token & 31)) & 0xFFFFFFFF)
    return rest if rest.any() else words


# Compiled constraints, shared by all requests that ask for the same one.

# Copies of a matcher share one lexer's states, which are never freed. After a constraint has used
# this much processor time (thousands of ordinary answers), it starts with a new lexer.
RENEW_SECONDS = 0.5
# Approximate memory of one answer's position in the grammar, without the parts that answers share.
MATCHER_BYTES = 64 << 10


class Constraint:
    """A compiled constraint, which makes matchers. Use it from one thread at a time.

    Args:
        make: Compiles the constraint for a value of ``forces``. If the first call succeeds, later
            calls do too.
        alphabet: The alphabet of the constraint's tokenizer.
        num_bytes: The approximate memory of the compiled form.
        forces: The value of ``forces`` (see ``Matcher``) with which matchers begin.
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

    # Matchers call the methods below.

    def copy(self, *, forces: bool) -> LLMatcher:
        """A matcher of llguidance at the beginning of an answer, with the newest lexer.

        Args:
            forces: See ``Matcher``.
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
# Maximum memory of all constraints, including those that only waiting or running requests use. One
# bearer token may have half of it.
MAX_HELD_BYTES = 512 << 20


class KeptConstraints:
    """Keeps the most recently used constraints within one budget. Belongs to one event loop.

    Only ``hold`` may be called from any thread.

    Attributes:
        num_bytes: The approximate memory of the kept constraints.
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
