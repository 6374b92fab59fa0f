"""Token ids of chats, by the two calls that the server makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from turret.server.models.tokenizer import Tokenizer


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] = (),
    **how: Any,
) -> list[int]:
    """``render_chat``, then ``encode_rendered``."""
    return tokenizer.encode_rendered(tokenizer.render_chat(messages, tools, **how))
