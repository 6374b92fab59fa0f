"""Which requests an adapter with a classification head takes, and which need one."""

from __future__ import annotations

from turret.server.adapters.mix import Mix
from turret.server.engine.scheduling.request import Request
from turret.server.errors import (
    AdapterClassifiesError,
    HeadMissingError,
    InvalidRequestError,
)


def check_heads(request: Request, mix: Mix) -> None:
    """Refuse a request that the mix's adapters were not trained for.

    Raises:
        InvalidRequestError: To classify, exactly one adapter has a head; to generate or to score,
            none.
    """
    names = [adapter.name for adapter, _ in mix.members if adapter.head is not None]
    if request.classifies:
        if len(names) == 1:
            return
        if names:
            why = f"the mix has several classification heads, name one: {', '.join(names)}"
            raise InvalidRequestError.of("adapters", why)
        raise HeadMissingError.of("adapters", "no adapter has a classification head (SEQ_CLS)")
    if names and request.pooling is None:
        raise AdapterClassifiesError.of(
            "adapters",
            f"{', '.join(map(repr, names))}: trained to classify (SEQ_CLS), not to write or score"
            " text",
        )
