"""How many entries each list and object in the body of a request may have, path by path.

Whatever is not named here has the limits of ``Shape()``.
"""

from __future__ import annotations

from turret.server.api.limits import (
    MAX_CHAT_MESSAGES,
    MAX_CHOICES,
    MAX_LOGIT_BIASES,
    MAX_MIX_MEMBERS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MAX_TOOL_CALLS,
    MAX_TOOLS,
)
from turret.server.http.exchange.shape import Shape

# More than the context of any model. The model's own limit is checked later.
MAX_TOKEN_IDS = 1 << 20
# OpenAI's limit.
MAX_METADATA = 16

_CHOICE = Shape(MAX_CHOICES)
_MIX = {"adapters": Shape(MAX_MIX_MEMBERS)}
_GENERATION = {
    **_MIX,
    "logit_bias": Shape(MAX_LOGIT_BIASES),
    "stop": Shape(MAX_STOP_STRINGS),
    "stop_token_ids": Shape(MAX_STOP_TOKEN_IDS),
    "structured_outputs": Shape(fields={"choice": _CHOICE}),
    "guided_choice": _CHOICE,
    "choice": _CHOICE,
}
_PARTS = Shape(MAX_CHAT_MESSAGES)
_TURN = Shape(fields={"content": _PARTS, "tool_calls": Shape(MAX_TOOL_CALLS)})
_MESSAGES = {"messages": Shape(MAX_CHAT_MESSAGES, items=_TURN)}
_ALLOWED = {"tools": Shape(MAX_TOOLS)}
_TOOLS = {
    "tools": Shape(MAX_TOOLS),
    "tool_choice": Shape(fields={**_ALLOWED, "allowed_tools": Shape(fields=_ALLOWED)}),
}
_IDS = Shape(MAX_TOKEN_IDS)
# Either one prompt as token ids or a list of prompts, which MAX_PROMPTS limits.
_PROMPTS = Shape(MAX_TOKEN_IDS, items=_IDS)
_ITEM = Shape(fields={"content": _PARTS, "output": _PARTS})

CHAT = Shape(fields={**_GENERATION, **_MESSAGES, **_TOOLS})
COMPLETIONS = Shape(fields={**_GENERATION, "prompt": _PROMPTS})
RESPONSES = Shape(
    fields={
        **_GENERATION,
        **_TOOLS,
        "input": Shape(MAX_CHAT_MESSAGES, items=_ITEM),
        "include": Shape(MAX_METADATA),
        "metadata": Shape(MAX_METADATA),
    }
)
INPUTS = Shape(fields={**_MIX, **_MESSAGES, "input": _PROMPTS})
TOKENIZE = Shape(fields={**_MIX, **_MESSAGES, **_TOOLS})
DETOKENIZE = Shape(fields={**_MIX, "tokens": _IDS})
# Adapters' names, paths and flags.
ADAPTER = Shape(MAX_METADATA)
