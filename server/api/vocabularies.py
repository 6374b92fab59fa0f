"""The tokenizer of a request, with its chat template: the base's, or those of its adapters."""

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
    from turret.server.adapters.tokenizer_files import TokenizerFiles
    from turret.server.constraints.compiler import ConstraintCompiler
    from turret.server.models.own_tokenizers import Key, OwnTokenizers
    from turret.server.models.tokenizer import Tokenizer


class Vocabulary:
    """A tokenizer, and the compiler of constraints for it.

    Args:
        tokenizer: Turns text into tokens and back.
        constraints: Compiles what answers must match; None for one that is made when it is needed.
        own: How the engine knows it; None for the base's.
        kept: Of the vocabularies that share a budget for what is compiled, where ``constraints`` is
            not there; None for a budget of its own.
        like: A vocabulary with the same tokens and end tokens, whose compiler is used; None for a
            compiler of its own.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        constraints: ConstraintCompiler | None = None,
        own: AdapterTokenizer | None = None,
        kept: KeptConstraints | None = None,
        like: Vocabulary | None = None,
    ) -> None:
        self._like = like
        self.tokenizer = tokenizer
        self.own = own
        if constraints is not None:
            kept = constraints.kept
        self.kept = KeptConstraints() if kept is None else kept
        self._constraints = constraints

    @property
    def constraints(self) -> ConstraintCompiler:
        """Belongs to one event loop, as the vocabulary does."""
        if self._like is not None:
            return self._like.constraints
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
        adapters: Knows which adapters have their own tokenizer or chat template.
        tokenizers: Reads them.
    """

    def __init__(
        self, base: Vocabulary, adapters: AdapterTokenizers, tokenizers: OwnTokenizers
    ) -> None:
        self._base = base
        self._adapters = adapters
        self._tokenizers = tokenizers
        # There are no more vocabularies than tokenizers in memory.
        self._made: dict[Key, Vocabulary] = {}
        # Reads in progress, so that concurrent requests share one read.
        self._reading: dict[Key, asyncio.Future[Tokenizer]] = {}

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
        adapter, chat_template = self._adapters.find(weight.name for weight in weights)
        if adapter is None and not chat_template:
            return self._base
        key: Key = ("", 0, chat_template)
        if adapter is not None:
            key = adapter.facts.tokenizer, adapter.facts.vocab_size, chat_template
        tokenizer = self._tokenizers.find(key)
        if tokenizer is None:
            tokenizer = await self._read(key, adapter)
        return self._vocabulary(tokenizer, key)

    async def _read(self, key: Key, adapter: Adapter | None) -> Tokenizer:
        def files() -> TokenizerFiles:
            assert adapter is not None, "the base's tokenizer is in memory"
            return self._adapters.read(adapter)

        reading = self._reading.get(key)
        if reading is None:
            loop = asyncio.get_running_loop()
            reading = loop.run_in_executor(None, self._tokenizers.get, key, files)
            self._reading[key] = reading
            reading.add_done_callback(functools.partial(self._was_read, key))
        # Shield the read, because other requests may wait for it.
        return await asyncio.shield(reading)

    def _was_read(self, key: Key, reading: asyncio.Future[Tokenizer]) -> None:
        del self._reading[key]
        if not reading.cancelled():
            # Retrieve the exception, or asyncio logs it if no request waits any more.
            reading.exception()

    def _vocabulary(self, tokenizer: Tokenizer, mine: Key) -> Vocabulary:
        made = self._made.get(mine)
        if made is None or made.tokenizer is not tokenizer:
            gone = [key for key in self._made if key == mine or key not in self._tokenizers]
            for key in gone:
                self._made.pop(key).forget()
            digest, _, chat_template = mine
            own = AdapterTokenizer((digest, chat_template), tokenizer)
            is_like = not digest and tokenizer.eos_token_ids == self._base.tokenizer.eos_token_ids
            like = self._base if is_like else None
            made = Vocabulary(tokenizer, own=own, kept=self._base.kept, like=like)
            self._made[mine] = made
        return made
