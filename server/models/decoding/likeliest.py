"""The likeliest tokens of rows, without all of their logits."""

from __future__ import annotations

import contextlib
import math

import torch

from turret.kernels.likeliest import MOST_ROWS, Screen, likeliest_tokens
from turret.server.models.decoding.decoder import Decoder

# AMX's tiles need at least this many outputs. Each output is computed separately, but with fewer
# outputs the order of its sum differs.
_LEAST_OUTPUTS = 16
# A cap can make distinct logits equal. This is the case for logits closer than _CAP_SLACK times the
# cap, which covers its own error, and for logits beyond _CAP_REACH times the cap.
_CAP_SLACK, _CAP_REACH = 1e-3, 4.0


class LikeliestTokens:
    """Tells tokens from a part of a head's bytes, the same as all logits would (``Screen``).

    Args:
        decoder: Its head stays as it is.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._screen: Screen | None = None
        self._slack, self._most = 0.0, float("inf")
        scale, cap = decoder.arch.logit_scale, decoder.arch.logit_softcap
        if scale > 0.0 and Screen.serves(decoder.head):
            # A head with a non-finite weight cannot be screened.
            with contextlib.suppress(ValueError):
                self._screen = Screen(decoder.head)
        if cap is not None and scale > 0.0:
            self._slack = _CAP_SLACK * cap / scale
            self._most = cap * math.tanh(_CAP_REACH)

    @property
    def is_of_use(self) -> bool:
        """Whether there is a copy of the head to find tokens with."""
        return self._screen is not None

    def find(self, hidden: torch.Tensor) -> list[int] | None:
        """The token with the largest logit of each row; of equal ones the first.

        Args:
            hidden: Final-norm hidden states, ``[rows, hidden]``.

        Returns:
            None where the logits have to tell.
        """
        if self._screen is None or hidden.shape[0] > MOST_ROWS:
            return None
        tokens = self._screen.outputs(hidden, self._slack)
        if tokens is None:
            return None
        if len(tokens) == 1 and self._most == float("inf"):
            return [int(tokens)] * hidden.shape[0]
        if len(tokens) < _LEAST_OUTPUTS:
            # Pad with the first token: of equal logits the first is chosen, so the result stays the
            # same.
            tokens = torch.cat((tokens, tokens[:1].expand(_LEAST_OUTPUTS - len(tokens))))
        rows = self._decoder.head.index_select(0, tokens)
        logits = self._decoder.some_logits(hidden, rows)
        if self._most < float("inf") and float(logits.abs().max()) > self._most:
            return None
        found: list[int] = tokens[likeliest_tokens(logits)].tolist()
        return found

    def was_of_no_use(self) -> None:
        """Skip the next calls, because the tokens that the last one found were of no use."""
        if self._screen is not None:
            self._screen.pause()
