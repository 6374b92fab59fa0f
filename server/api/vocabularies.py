"""Finds a request's tokenizer and chat template: the base's, or those of the adapters."""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from turret.server.adapters.adapter import IN_CHAT, Adapter, AdapterRef, OwnTemplate
from turret.server.api.limits import MAX_MIX_MEMBERS, MAX_TEMPLATE_CHARS
from turret.server.basics.turns import FairPool, shielded
from turret.server.constraints.matcher import KeptConstraints
from turret.server.engine.scheduling.request import AdapterTokenizer
from turret.server.errors import InvalidRequestError
from turret.server.words import say
from turret.v1 import adapters_pb2

if TYPE_CHECKING:
    from turret.server.adapters.installer import AdapterTokenizers
    from turret.server.constraints.compiler import ConstraintCompiler
    from turret.server.models.own_tokenizers import OwnTokenizers, TokenizerKey
    from turret.server.models.tokenizer import Tokenizer


_FIELD = "chat.chat_template"
_READERS = 2


class Vocabulary:
    """A tokenizer, and the compiler of constraints for it.

    Args:
        tokenizer: Turns text into tokens and back.
        constraints: Compiles constraints; None for a compiler that is made when it is needed.
        own: The engine's interface to the vocabulary; None for the base's.
        kept: The compiled constraints of vocabularies that share a budget, if ``constraints`` is
            None; None for a budget of its own.
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
        """The compiler of constraints, which belongs to the vocabulary's event loop."""
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
        base: The base model's vocabulary.
        adapters: Finds adapters with their own tokenizer or chat template.
        tokenizers: Reads these tokenizers and templates.
        trusts_templates: Whether requests may bring a chat template.
    """

    def __init__(
        self,
        base: Vocabulary,
        adapters: AdapterTokenizers,
        tokenizers: OwnTokenizers,
        *,
        trusts_templates: bool = False,
    ) -> None:
        self._trusts_templates = trusts_templates
        self._base = base
        self._adapters = adapters
        self._tokenizers = tokenizers
        # Vocabularies by the key of the tokenizer, which includes the template in use, and by the
        # mix's own template. The two templates differ if the request brings one.
        self._made: dict[tuple[TokenizerKey, str], Vocabulary] = {}
        # Reads in progress, so that concurrent requests share one read.
        self._reading: dict[TokenizerKey, asyncio.Future[Tokenizer]] = {}
        # The number of requests that wait for each read.
        self._num_waiting: Counter[asyncio.Future[Tokenizer]] = Counter()
        # Reading a tokenizer or a template may take a child process several seconds.
        self._readers = FairPool(ThreadPoolExecutor(_READERS, "turret-tokenizers"))

    def close(self) -> None:
        """Compile and render nothing more."""
        self._readers.close()
        for vocabulary in (self._base, *self._made.values()):
            vocabulary.close()

    async def of(
        self,
        weights: Sequence[adapters_pb2.AdapterWeight],
        chat_template: str = "",
        *,
        draw: float | None = None,
        tenant: bytes = b"",
    ) -> Vocabulary:
        """The vocabulary for a request with these adapters.

        Args:
            weights: The adapters.
            chat_template: The chat template that the request brings; empty without one.
            draw: See ``AdapterRef``.
            tenant: The client's tenant. Tenants take turns in reading tokenizers.

        This does not check whether the adapters can be combined, and it ignores unknown names.

        Raises:
            AdapterChangedError, AdapterCheckpointError: An adapter's tokenizer has changed.
            InvalidRequestError: The request may not bring a template, or its template is invalid.
        """
        self._check_trust(chat_template)
        adapter, own_template = None, ""
        if 0 < len(weights) <= MAX_MIX_MEMBERS:
            adapter, own_template = self._adapters.find(
                AdapterRef(
                    name=weight.name,
                    generation=weight.generation if weight.HasField("generation") else None,
                    draw=draw,
                )
                for weight in weights
            )
        template = _replaced(own_template, chat_template) if chat_template else own_template
        if adapter is None and not template:
            return self._base
        key: TokenizerKey = ("", 0, template)
        if adapter is not None:
            key = adapter.facts.tokenizer, adapter.facts.vocab_size, template
        tokenizer = self._tokenizers.find(key)
        if tokenizer is None:
            try:
                tokenizer = await self._read(key, adapter, tenant)
            except InvalidRequestError as error:
                if not chat_template or error.args[0].reason != "CHAT_TEMPLATE_INVALID":
                    raise
                raise InvalidRequestError.of(_FIELD, error.args[0]) from None
        return self._vocabulary(tokenizer, key, own_template)

    def _check_trust(self, chat_template: str) -> None:
        if chat_template and not self._trusts_templates:
            raise InvalidRequestError.of(_FIELD, say("TEMPLATE_NOT_TRUSTED"))
        found, most = len(chat_template), MAX_TEMPLATE_CHARS
        if found > most:
            why = say("TOO_MANY_CHARACTERS", most=most, found=found)
            raise InvalidRequestError.of(_FIELD, why)

    async def _read(self, key: TokenizerKey, adapter: Adapter | None, tenant: bytes) -> Tokenizer:
        reading = self._reading.get(key)
        if reading is None:
            files = None if adapter is None else functools.partial(self._adapters.read, adapter)
            get = functools.partial(self._tokenizers.get, key, files)
            reading = asyncio.ensure_future(self._readers.run(tenant, get))
            self._reading[key] = reading
        self._num_waiting[reading] += 1
        try:
            # Shield the read, because other requests may wait for it.
            return await shielded(reading)
        finally:
            self._num_waiting[reading] -= 1
            if not self._num_waiting[reading]:
                del self._num_waiting[reading], self._reading[key]
                # If all clients disconnected, a queued read must not keep their template in memory.
                reading.cancel()

    def _vocabulary(self, tokenizer: Tokenizer, key: TokenizerKey, own_template: str) -> Vocabulary:
        mine = key, own_template
        made = self._made.get(mine)
        if made is None or made.tokenizer is not tokenizer:
            # Drop vocabularies whose tokenizer is no longer in memory.
            gone = [each for each in self._made if each == mine or each[0] not in self._tokenizers]
            for each in gone:
                self._made.pop(each).forget()
            digest, _, _ = key
            is_like = not digest and tokenizer.eos_token_ids == self._base.tokenizer.eos_token_ids
            made = Vocabulary(
                tokenizer,
                own=AdapterTokenizer((digest, own_template), tokenizer),
                kept=self._base.kept,
                like=self._base if is_like else None,
            )
            self._made[mine] = made
        return made


def _replaced(own_template: str, chat_template: str) -> str:
    """A request's template, with the special tokens of the one that it replaces."""
    tokens = OwnTemplate.from_json(own_template).tokens if own_template else {}
    return OwnTemplate(IN_CHAT, {"default": chat_template}, tokens).to_json()
