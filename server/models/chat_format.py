"""What a chat template knows beside turns: tools, and blocks of reasoning."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

ToolForm = Literal["hermes", "llama3", "mistral"]

NO_TOOLS = "this model's chat template knows no tools, or calls them in a form that is not read"
_USES_TOOLS = re.compile(r"\{[{%][^}]*\btools\b")
# A prompt that ends within the block: the answer has only its end.
_OPENS = re.compile(r"<think>(?:\\n|\n)*['\"]?\s*(?:-?[}%]\}|\{%)")


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """How answers are to be read.

    Attributes:
        tools: The form in which the model calls tools; None if it is told of none.
        has_reasoning: Whether answers may begin with ``<think>...</think>``.
        opens_reasoning: Whether the prompt ends in ``<think>``.
    """

    tools: ToolForm | None = None
    has_reasoning: bool = False
    opens_reasoning: bool = False

    @classmethod
    def of(cls, template: object) -> ChatFormat:
        """What a template says of itself; nothing if there is none."""
        if isinstance(template, dict):
            # Older tokenizers have one template for tools and one for other chats.
            template = template.get("tool_use") or template.get("default")
        if not isinstance(template, str):
            return cls()
        last = template.rpartition("add_generation_prompt")[2]
        opens = bool(_OPENS.search(last)) and "</think>" not in last
        return cls(_form(template), "<think>" in template, opens)


def _form(template: str) -> ToolForm | None:
    if not _USES_TOOLS.search(template):
        return None
    if "<tool_call>" in template:
        # Qwen3-Coder's and others' calls are XML within the same tag.
        return None if "<function=" in template else "hermes"
    if "[TOOL_CALLS]" in template:
        return None if "[ARGS]" in template or "[CALL_ID]" in template else "mistral"
    if "<|python_tag|>" in template or "<|eom_id|>" in template or "ipython" in template:
        return "llama3"
    return None
