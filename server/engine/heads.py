"""Which requests an adapter with a classification head takes, and which need one."""

from __future__ import annotations

from turret.server.adapters.mix import Mix
from turret.server.engine.scheduling.request import Request
from turret.server.errors import InvalidRequestError


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
            why = f"has several classification heads, name one: {', '.join(names)}"
        else:
            why = (
                "has no classification head: name an adapter of task_type SEQ_CLS; for text or its"
                " probability there are Generate and Score"
            )
        raise InvalidRequestError.of("adapters", f"the mix {why}")
    if names and request.pooling is None:
        raise InvalidRequestError.of(
            "adapters",
            f"{', '.join(map(repr, names))}: trained to classify (task_type SEQ_CLS), not to write"
            " or score text; call Classify",
        )
