"""Which requests an adapter with a classification head takes, and which need one."""

from __future__ import annotations

from turret.server.adapters.mix import Mix
from turret.server.engine.scheduling.request import Request
from turret.server.errors import (
    AdapterClassifiesError,
    HeadMissingError,
    InvalidRequestError,
)
from turret.server.words import say


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
            raise InvalidRequestError.of(
                "adapters", say("SEVERAL_HEADS", adapters=", ".join(names))
            )
        raise HeadMissingError.of("adapters", say("HEAD_MISSING"))
    if names and request.pooling is None:
        said = say("ADAPTER_CLASSIFIES", adapters=", ".join(names))
        raise AdapterClassifiesError.of("adapters", said)
