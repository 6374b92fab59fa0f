"""The extra pass of a sequence that gives an adapter its scalings. No torch.

X-LoRA weighs its components by the final states of another pass over the same tokens: the base
model's or, with a ``scaling_pass_value``, its own at constant scalings. This *first pass* is a
sequence of its own, with the same tokens and with its own keys and values.
"""

from __future__ import annotations

from turret.server.engine.scheduling.sequence import Sequence
from turret.server.errors import InvalidRequestError
from turret.server.words import say


def add_first_pass(sequence: Sequence) -> None:
    """Give a sequence the first pass that its mix needs, if it needs one.

    Raises:
        InvalidRequestError: The mix holds two adapters that need one, or one and an adapter that
            puts something before the prompt.
    """
    mix = sequence.mix
    routed = [adapter for adapter, _ in mix.members if adapter.first_pass]
    if not routed:
        return
    if len(routed) > 1:
        names = ", ".join(adapter.name for adapter in routed)
        raise InvalidRequestError.of("adapters", say("SEVERAL_FIRST_PASSES", adapters=names))
    if sequence.num_virtual:
        said = say("FIRST_PASS_WITH_PREFIX", adapter=routed[0].name)
        raise InvalidRequestError.of("adapters", said)
    is_base = routed[0].first_pass == "base"
    own = mix.part([] if is_base else [(routed[0], 1.0)])
    sequence.first_pass = Sequence(sequence.request, own, sequence.arrival)
    # Share the token list: generated tokens are the first pass's next tokens too.
    sequence.first_pass.tokens = sequence.tokens
