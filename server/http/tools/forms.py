"""The forms in which models write calls of tools."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from turret.server.basics.channels import CHANNEL


@dataclass(frozen=True, slots=True)
class Form:
    """How a model writes calls.

    Attributes:
        begin: Before the first call of an answer, or each one.
        end: After it.
        separators: What else may stand between two calls.
        is_bare: Calls may come without ``begin`` where the answer begins with them.
        is_list: Calls are entries of a JSON list.
        parameters: What the field with the arguments is called.
        syntax: Of one call: ``{"name": ..., "arguments": {...}}`` (json), a name and then the
            arguments (named), ``<function=NAME>`` with a ``<parameter=NAME>`` for each (xml), or a
            message to the tool (channels; see ``server/basics/channels.py``).
    """

    begin: str
    end: str = ""
    separators: str = ""
    is_bare: bool = False
    is_list: bool = False
    parameters: str = "arguments"
    syntax: Literal["json", "named", "xml", "channels"] = "json"


FORMS = {
    "hermes": Form("<tool_call>", "</tool_call>"),
    # Qwen3-Coder and later Qwen models.
    "xml": Form("<tool_call>", "</tool_call>", syntax="xml"),
    "llama3": Form("<|python_tag|>", separators=";", is_bare=True, parameters="parameters"),
    "mistral": Form("[TOOL_CALLS]", separators=",", is_bare=True, is_list=True),
    # Mistral's tokenizers from version 11 on write a mark before each call instead of a list.
    "mistral11": Form("[TOOL_CALLS]", syntax="named"),
    # gpt-oss: an answer ends with its call.
    "harmony": Form(CHANNEL, syntax="channels"),
}
# Marks of ``mistral11``: before the id of a call, and before its arguments.
CALL_ID, ARGUMENTS = "[CALL_ID]", "[ARGS]"
