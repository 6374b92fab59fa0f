"""Features of a chat template beyond turns: tools, and blocks of reasoning."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from turret.server.basics import channels
from turret.server.basics.closest import closest
from turret.server.words import Text, say

ToolForm = Literal["hermes", "xml", "llama3", "mistral", "mistral11", "harmony"]

# Texts that mark tool calls, in each format. Tokenizers may have special tokens for them.
_MARKS: dict[ToolForm, tuple[str, ...]] = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "xml": ("<tool_call>", "</tool_call>"),
    "llama3": ("<|python_tag|>",),
    "mistral": ("[TOOL_CALLS]",),
    "mistral11": ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    "harmony": channels.MARKS,
}
# Adapters bring templates too, so these patterns match in time linear in a template's length.
_ROLES = ("system", "user", "assistant", "tool", "developer")
_OPENING = re.compile(r"\{[{%]")
_TOOLS = re.compile(r"\btools\b")
# Matches a template whose prompt ends inside the block: the answer contains only its end.
_OPENS = re.compile(r"<think>(?:\\n|\n)*+['\"]?\s*+(?:-?[}%]\}|\{%)")


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """How answers are to be read.

    Attributes:
        tools: The form in which the model calls tools; None if it is told of none.
        has_reasoning: Whether answers may begin with ``<think>...</think>``.
        opens_reasoning: Whether the prompt ends in ``<think>``; None if that depends on the
            template's variables.
        marks: Special tokens that stand around calls, and around channels, by their texts.
        has_call_ids: Whether a call has an id of the model's own.
        has_channels: Whether answers are messages in channels: of thoughts, of calls, of what is
            said.
    """

    tools: ToolForm | None = None
    has_reasoning: bool = False
    opens_reasoning: bool | None = False
    marks: Mapping[str, int] = field(default_factory=dict)
    has_call_ids: bool = False
    has_channels: bool = False

    @classmethod
    def of(cls, template: object, special: Mapping[str, int] | None = None) -> ChatFormat:
        """Read the format from a template; an empty one if there is none.

        Args:
            template: Of the tokenizer.
            special: Ids of its special tokens, by their texts.
        """
        if isinstance(template, dict):
            # Older tokenizers have one template for tools and one for other chats.
            template = template.get("tool_use") or template.get("default")
        if not isinstance(template, str):
            return cls()
        last = template.rpartition("add_generation_prompt")[2]
        opens = bool(_OPENS.search(last))
        may_close = opens and "</think>" in last
        form, has_channels = _form(template), _has_channels(template)
        marks = channels.MARKS if has_channels else () if form is None else _MARKS[form]
        return cls(
            form,
            "<think>" in template,
            None if may_close else opens,
            {mark: special[mark] for mark in marks if special and mark in special},
            form == "mistral11" and "[CALL_ID]" in template,
            has_channels,
        )


def unknown_role(template: object, role: str) -> Text | None:
    """Why a role is invalid; None for the common roles and those that occur in the template.

    Many templates write any role that they are given, and the model has learned none but these: an
    answer to another one is not what was asked for, and nothing says so.

    Args:
        template: Of the tokenizer.
        role: Who is said to speak.
    """
    if role in _ROLES:
        return None
    texts = template.values() if isinstance(template, dict) else (template,)
    word, space, _ = role.partition(" ")
    # For a role of several words, such as Granite's "document 1", the template may contain only its
    # beginning.
    names = (role, word + space) if word else ()
    if any(
        f"{quote}{name}{quote}" in str(text) for text in texts for name in names for quote in "'\""
    ):
        return None
    return say("NOT_ONE_OF", value=role, choices=", ".join(_ROLES), closest=closest(role, _ROLES))


def _uses_tools(template: str) -> bool:
    """Whether tools are named between an opening and the next brace that closes."""
    return any(
        (opening := _OPENING.search(part)) and _TOOLS.search(part, opening.end())
        for part in template.split("}")
    )


def _has_channels(template: str) -> bool:
    return channels.CHANNEL in template and channels.MESSAGE in template


def _form(template: str) -> ToolForm | None:
    if not _uses_tools(template):
        return None
    if _has_channels(template):
        # Some templates have channels for reasoning but no recipients for calls.
        return "harmony" if channels.FUNCTIONS in template else None
    if "<tool_call>" in template:
        return "xml" if "<function=" in template else "hermes"
    if "[TOOL_CALLS]" in template:
        return "mistral11" if "[ARGS]" in template else "mistral"
    if "<|python_tag|>" in template or "<|eom_id|>" in template or "ipython" in template:
        return "llama3"
    return None
