"""The tokenizer of a request: the base's, or that of an adapter which has its own."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from turret.server.adapters.adapter import Adapter
from turret.server.api.limits import MAX_MIX_MEMBERS
from turret.server.constraints.constraint import KeptConstraints
from turret.server.engine.scheduling.request import AdapterTokenizer
from turret.v1 import adapters_pb2

if TYPE_CHECKING:
    # The server listens before torch is loaded, which takes seconds.
    from turret.server.adapters.registry.tokenizers import AdapterTokenizers
    from turret.server.constraints.compiler import ConstraintCompiler
    from turret.server.models.own_tokenizers import OwnTokenizers
    from turret.server.models.tokenizer import Tokenizer


class Vocabulary:
    """A tokenizer, and the compiler of constraints for it.

    Args:
        tokenizer: Turns text into tokens and back.
        constraints: Compiles what answers must match; None for one that is made when it is needed.
        own: How the engine knows it; None for the base's.
        kept: Of the vocabularies that share a budget for what is compiled, where ``constraints`` is
            not there; None for a budget of its own.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        constraints: ConstraintCompiler | None = None,
        own: AdapterTokenizer | None = None,
        kept: KeptConstraints | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.own = own
        if constraints is not None:
            kept = constraints.kept
        self.kept = KeptConstraints() if kept is None else kept
        self._constraints = constraints

    @property
    def constraints(self) -> ConstraintCompiler:
        """Belongs to one event loop, as the vocabulary does."""
        if self._constraints is None:
            from turret.server.constraints.compiler import ConstraintCompiler

            self._constraints = ConstraintCompiler(self.tokenizer, self.kept)
        return self._constraints

    def close(self) -> None:
        """Compile and render nothing more."""
        self.tokenizer.close()
        if self._constraints is not None:
            self._constraints.close()

    def forget(self) -> None:
        """Drop everything compiled, because no further request will use it."""
        if self._constraints is not None:
            self._constraints.forget()


class Vocabularies:
    """Finds the vocabulary of a request's adapters. Belongs to one event loop.

    Args:
        base: Of the base model.
        adapters: Knows which adapters have their own.
        tokenizers: Reads them.
    """

    def __init__(
        self, base: Vocabulary, adapters: AdapterTokenizers, tokenizers: OwnTokenizers
    ) -> None:
        self._base = base
        self._adapters = adapters
        self._tokenizers = tokenizers
        # Vocabularies by tokenizer digest and size. There are no more than tokenizers in memory.
        self._made: dict[tuple[str, int], Vocabulary] = {}
        # Reads in progress by adapter key, so that concurrent requests share one read.
        self._reading: dict[str, asyncio.Future[Tokenizer]] = {}

    def close(self) -> None:
        """Compile and render nothing more."""
        for vocabulary in (self._base, *self._made.values()):
            vocabulary.close()

    async def of(self, weights: Sequence[adapters_pb2.AdapterWeight]) -> Vocabulary:
        """The vocabulary for a request with these adapters.

        Whether they may stand together is not looked at; names that are not there are passed over.

        Raises:
            AdapterChangedError, AdapterCheckpointError: An adapter's tokenizer is not what it was.
        """
        if not 0 < len(weights) <= MAX_MIX_MEMBERS:
            return self._base
        adapter = self._adapters.find(weight.name for weight in weights)
        if adapter is None:
            return self._base
        rows = adapter.facts.vocab_size
        digest = adapter.facts.tokenizer
        tokenizer = self._tokenizers.find(digest, rows)
        if tokenizer is None:
            tokenizer = await self._read(adapter)
        return self._vocabulary(tokenizer, digest, rows)

    async def _read(self, adapter: Adapter) -> Tokenizer:
        key, facts = adapter.key, adapter.facts
        reading = self._reading.get(key)
        if reading is None:
            reading = asyncio.get_running_loop().run_in_executor(
                None,
                self._tokenizers.get,
                facts.tokenizer,
                facts.vocab_size,
                lambda: self._adapters.read(adapter),
            )
            self._reading[key] = reading
            reading.add_done_callback(functools.partial(self._was_read, key))
        # Shield the read, because other requests may wait for it.
        return await asyncio.shield(reading)

    def _was_read(self, key: str, reading: asyncio.Future[Tokenizer]) -> None:
        del self._reading[key]
        if not reading.cancelled():
            # Retrieve the exception, or asyncio logs it if no request waits any more.
            reading.exception()

    def _vocabulary(self, tokenizer: Tokenizer, digest: str, rows: int) -> Vocabulary:
        made = self._made.get((digest, rows))
        if made is None or made.tokenizer is not tokenizer:
            mine = digest, rows
            gone = [key for key in self._made if key == mine or key not in self._tokenizers]
            for key in gone:
                self._made.pop(key).forget()
            own = AdapterTokenizer(digest, tokenizer)
            made = Vocabulary(tokenizer, own=own, kept=self._base.kept)
            self._made[mine] = made
        return made
