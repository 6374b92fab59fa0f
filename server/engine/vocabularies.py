"""Which requests an adapter with its own vocabulary or chat template takes."""

from __future__ import annotations

from turret.server.adapters.chat_template import template_of
from turret.server.adapters.mix import Mix
from turret.server.engine.scheduling.request import Request
from turret.server.errors import InvalidRequestError, UnavailableError
from turret.server.words import say


def check_vocabulary(request: Request, mix: Mix) -> int:
    """Refuse a request whose tokens are not those of its adapters.

    Returns:
        Logits of the model that answers; 0 for as many as the base has.

    Raises:
        InvalidRequestError: Several adapters have a vocabulary of their own, or one that has is not
            there as a whole: a token has no part of a row where the base has none. Or it is there
            with one before or beside which the base computes.
        UnavailableError: The adapter was replaced since the request was tokenised.
    """
    own = [(a, weight) for a, weight in mix.members if a.facts.vocab_size]
    made_by = ("", "") if request.own_tokenizer is None else request.own_tokenizer.content
    if len(own) > 1 or any(weight != 1.0 for _, weight in own):
        names = ", ".join(adapter.name for adapter, _ in own)
        raise InvalidRequestError.of("adapters", say("VOCABULARY_NOT_ALONE", adapters=names))
    if own and (partial := _parts_of_the_base(mix)):
        said = say("VOCABULARY_WITH_PARTIAL", adapter=own[0][0].name, partial=partial)
        raise InvalidRequestError.of("adapters", said)
    digest = own[0][0].facts.tokenizer if own else ""
    if made_by != (digest, template_of(adapter.facts for adapter, _ in mix.members)):
        raise UnavailableError(say("TOKENIZER_REPLACED"))
    return own[0][0].facts.vocab_size if own else 0


def _parts_of_the_base(mix: Mix) -> str:
    """The adapter of a mix that does not act on all that is computed; empty without one.

    Before an invocation, and in a first pass, keys and values are those of the base, and shared.
    """
    found = (a.name for a, _ in mix.members if a.facts.invocation or a.facts.first_pass)
    return next(found, "")
