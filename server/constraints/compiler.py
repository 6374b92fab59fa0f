"""Compiles constraints off the event loop, and shares recently compiled ones."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import threading
from pathlib import Path
from typing import Any, Protocol

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from turret.server.basics.confined import Confined
from turret.server.basics.turns import FairPool, Limit, Places, shielded
from turret.server.basics.work import PANICS_ARE_ERRORS, work_in_background
from turret.server.constraints.grammar import ConstraintSpec, grammar_of, refusal, unforced
from turret.server.constraints.matcher import (
    STACK_BYTES,
    Alphabet,
    Constraint,
    KeptConstraints,
    alphabet_of,
    roomy_executor,
    special_of,
)
from turret.server.errors import BudgetExceededError, InvalidRequestError
from turret.server.words import say

NUM_THREADS = 2
# Maximum number of constraints that are being compiled or waited for at a time.
MAX_RUNNING = 64
# Maximum number of such constraints for one bearer token, which leaves a quarter of the places to
# others.
MAX_RUNNING_OF_TOKEN = 48
# Much longer than the half second that the slowest constraint within the limits took.
COMPILE_SECONDS = 20.0
# Approximate size of a short constraint, and of the fixed part of a longer one.
_FIXED_BYTES = 1 << 20
# A regular expression can take memory and time that grow with the square of its length, up to 40 GB
# and minutes for the longest ones. llguidance does not limit them, and its threads cannot be
# stopped. So a child process first compiles every constraint that is not short.
_SHORT_CHARS = 256
_TRIAL_SECONDS = 2.0
# Memory limit: the stack of the thread that compiles, the process itself, and the compiled form.
_TRIAL_BYTES = STACK_BYTES + (256 << 20)
_PROGRAM = Path(__file__).with_name("trial_program.py")
# Token slices: if every token that matches one of these expressions is allowed, llguidance allows
# them together instead of one by one. An expression with a count, such as [a-z ]{1,500}, has a
# state per character and never reuses a mask, which takes 0.5 ms without slices and 0.02 ms with
# them (49,152 tokens).
_SLICES = ["[a-z ]{1,16}", "[a-zA-Z ]{1,16}", *LLTokenizer.general_slices()]
_LIMITS: dict[str, Any] = {
    # All answers under one constraint share the states of its lexer, which take at most 45 MB.
    "max_lexer_states": 1 << 15,
    # Limits the items of one parser step, because all running requests wait for the step. If the
    # grammar is ambiguous, a step's time grows with the square of this number: 6 ms at this limit,
    # 0.3 s at llguidance's own, which is five times as high. Ordinary grammars and most schemas
    # need less than a fifth of this limit (49,152 tokens).
    "step_max_items": 10_000,
    "verbose_errors": False,
}
_Followable = tuple[LLTokenizer, Alphabet]


class TokenSource(Protocol):
    """The part of a tokenizer that the compiler needs."""

    eos_token_ids: frozenset[int]
    vocab_size: int

    def serialized(self) -> str:
        """The tokenizer in the format of ``tokenizer.json``."""
        ...


class ConstraintCompiler:
    """Compiles constraints for one tokenizer. ``compile`` belongs to one event loop.

    Args:
        tokens: The model's tokenizer. Another thread begins to read it, which takes half a second
            or more.
        kept: Keeps compiled constraints; None for a new store with a budget of its own.
    """

    def __init__(self, tokens: TokenSource, kept: KeptConstraints | None = None) -> None:
        self._tokens = tokens
        self._lock = threading.Lock()
        self._native: _Followable | InvalidRequestError | None = None
        threads = roomy_executor(NUM_THREADS, "constraints", work_in_background)
        threads.submit(self._tokenizer)
        self._pool = FairPool(threads)
        self.kept = KeptConstraints() if kept is None else kept
        self._owner = self.kept.new_owner()
        self._running: dict[bytes, asyncio.Future[Constraint]] = {}
        self._places = Places()
        self._special = "{}"
        self._trial = Confined(
            _PROGRAM,
            cpu_seconds=_TRIAL_SECONDS,
            max_bytes=_TRIAL_BYTES,
            max_answer_bytes=1 << 20,
            packages=("llguidance",),
        )

    def close(self) -> None:
        """Compile nothing more."""
        self._pool.close()
        self._trial.close()

    def forget(self) -> None:
        """Drop everything that was compiled."""
        self.kept.forget(self._owner)

    async def compile(self, spec: ConstraintSpec, tenant: bytes = b"") -> Constraint:
        """The compiled form of a constraint, whose length has already been checked.

        Args:
            spec: The constraint.
            tenant: Identifies the client's bearer token; empty if all requests share one queue.

        Raises:
            InvalidRequestError: The constraint cannot be read or met. The error lists the invalid
                parts.
            QueueFullError: In total or for this tenant, too many others are being compiled, or the
                compiled ones take too much memory.
            BudgetExceededError: The compilation took too long.
        """
        key = spec.digest
        found = self.kept.find(self._owner, key)
        if found is not None:
            return found
        future = self._running.get(key)
        if future is None:
            limits = [Limit("all", MAX_RUNNING, "TOO_MANY_COMPILATIONS")]
            if tenant:
                most = MAX_RUNNING_OF_TOKEN
                limits.append(Limit(tenant, most, "TOO_MANY_COMPILATIONS_OF_TOKEN"))
            held = contextlib.ExitStack()
            held.enter_context(self._places.hold(*limits))
            job = functools.partial(self._compile_held, spec, tenant)
            future = asyncio.ensure_future(self._pool.run(tenant, job))
            self._running[key] = future
            future.add_done_callback(functools.partial(self._keep, key, held))
        try:
            # Shield the compilation, because other requests may wait for it, and later ones find
            # its result.
            async with asyncio.timeout(COMPILE_SECONDS):
                return await shielded(future)
        except TimeoutError:
            said = say("COMPILATION_TOO_SLOW", seconds=COMPILE_SECONDS)
            raise BudgetExceededError(said) from None

    def _keep(
        self, key: bytes, held: contextlib.ExitStack, future: asyncio.Future[Constraint]
    ) -> None:
        del self._running[key]
        held.close()
        if future.cancelled() or future.exception() is not None:
            return
        self.kept.keep(self._owner, key, future.result())

    # The methods below run on the compiler's threads.

    def _compile_held(self, spec: ConstraintSpec, tenant: bytes) -> Constraint:
        """Compile a constraint, and count its measured memory until it is freed."""
        constraint = self._compile(spec)
        self.kept.hold(constraint, tenant, constraint.num_bytes - _FIXED_BYTES)
        return constraint

    @PANICS_ARE_ERRORS
    def _compile(self, spec: ConstraintSpec) -> Constraint:
        tokenizer = self._tokenizer()
        if isinstance(tokenizer, InvalidRequestError):
            raise InvalidRequestError.of(spec.kind, tokenizer.message)
        native, alphabet = tokenizer
        grammar = grammar_of(spec)

        def make(forces: bool) -> LLMatcher:
            limits = LLParserLimits(**_LIMITS)
            asked = grammar if forces else unforced(grammar)
            made = LLMatcher(native, asked, log_level=0, limits=limits)
            if made.is_error():
                raise refusal(spec, made.get_error())
            return made

        measured = self._measured_in_child(spec, grammar, native.vocab_size)
        # Counts and repeated terminals can force texts of megabytes, and llguidance holds the
        # interpreter's lock while it tokenises them. So only choices, which are no longer than the
        # client's message, force tokens.
        constraint = Constraint(
            make, alphabet, _FIXED_BYTES + measured, forces=spec.kind == "choice"
        )
        # Compute the first mask: it fails if a grammar matches nothing or is too wide at its start.
        matcher = constraint.matcher()
        try:
            matcher.mask()
        except (BudgetExceededError, InvalidRequestError) as error:
            raise InvalidRequestError.of(spec.kind, error.message) from None
        return constraint

    def _measured_in_child(self, spec: ConstraintSpec, grammar: str, vocab_size: int) -> int:
        """The approximate memory of a constraint, in addition to the fixed part.

        Raises:
            InvalidRequestError: The constraint cannot be compiled within the limits.
            UnavailableError: The child process is not available.
        """
        if spec.num_chars <= _SHORT_CHARS:
            return 0
        job = {
            "grammar": unforced(grammar),
            "limits": _LIMITS,
            "stack_bytes": STACK_BYTES,
            "special": self._special,
            "ends": json.dumps(sorted(self._tokens.eos_token_ids)),
            "vocab_size": vocab_size,
        }
        try:
            found = self._trial.ask_one(job, "CONSTRAINT_UNTRIED")
        except ValueError as error:
            said = say("CONSTRAINT_TOO_COMPLEX", problem=error)
            raise InvalidRequestError.of(spec.kind, said) from None
        if found["fault"]:
            raise refusal(spec, found["fault"])
        return found["bytes"]

    def _tokenizer(self) -> _Followable | InvalidRequestError:
        """The tokenizer for llguidance, or the reason why llguidance cannot use it."""
        with self._lock:
            if self._native is None:
                self._native = self._read_tokenizer()
            return self._native

    def _read_tokenizer(self) -> _Followable | InvalidRequestError:
        ends = sorted(self._tokens.eos_token_ids)
        if not ends:
            return InvalidRequestError(say("NO_END_TOKEN"))
        try:
            with PANICS_ARE_ERRORS:
                native = LLTokenizer(self._tokens.serialized(), eos_token=ends, slices=_SLICES)
                self._special = json.dumps(special_of(native))
                return native, alphabet_of(native, self._tokens.vocab_size)
        except Exception as error:
            return InvalidRequestError(say("TOKENIZER_UNUSABLE", problem=error))
