"""The extra pass of a sequence that gives an adapter its scalings. No torch.

X-LoRA weighs its components by the final states of another pass over the same tokens: the base
model's or, with a ``scaling_pass_value``, its own at constant scalings. A *guide* is that pass: a
sequence beside the one it guides, with its tokens and with keys and values of its own.
"""

from __future__ import annotations

from turret.server.adapters.mix import Mix
from turret.server.engine.scheduling.request import Request
from turret.server.engine.scheduling.sequence import Sequence
from turret.server.errors import InvalidRequestError
from turret.server.words import say


def add_guide(sequence: Sequence) -> None:
    """Give a sequence the guide that its mix needs, if it needs one.

    Raises:
        InvalidRequestError: The mix holds two adapters that need one, or one and an adapter that
            puts something before the prompt.
    """
    mix = sequence.mix
    guided = [adapter for adapter, _ in mix.members if adapter.first_pass]
    if not guided:
        return
    if len(guided) > 1:
        names = ", ".join(adapter.name for adapter in guided)
        raise InvalidRequestError.of("adapters", say("SEVERAL_FIRST_PASSES", adapters=names))
    if sequence.num_virtual:
        said = say("FIRST_PASS_WITH_PREFIX", adapter=guided[0].name)
        raise InvalidRequestError.of("adapters", said)
    is_base = guided[0].first_pass == "base"
    own = mix.part([] if is_base else [(guided[0], 1.0)])
    sequence.guide = _guide_of(sequence.request, own, sequence)


def _guide_of(request: Request, mix: Mix, sequence: Sequence) -> Sequence:
    guide = Sequence(request, mix, sequence.arrival)
    # Share the token list: generated tokens are the guide's next tokens too.
    guide.tokens = sequence.tokens
    return guide
