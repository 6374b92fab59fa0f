"""Fields that ask for what turret does not do: refused, unless their value asks for nothing.

A field that is listed nowhere is ignored: clients send many, and most of them are for other
servers. One that is listed would change the answer, so to ignore it would be a wrong answer.
"""

from __future__ import annotations

from typing import Any

from turret.server.http.bodies.fields import Fields

_OLD_TOOLS = "send tools and tool_choice"
_NO_TEMPLATE = "the chat template is the model's own"
_OFF = "is not supported; leave it out"
_BY_TOKEN = "is not supported; logit_bias makes tokens likelier or not, a constraint forbids others"
# Also used for ``reasoning.effort`` of the Responses API.
NO_EFFORT = "is not supported: a model thinks as its template has it; leave it out, or send 'none'"
_IN_CHATS = "is for /v1/chat/completions"

# Field → values that ask for nothing (null does so everywhere), and what to say of others.
_EVERYWHERE: dict[str, tuple[tuple[Any, ...], str]] = {
    "structural_tag": ((), "send a constraint of another kind"),
    "guided_whitespace_pattern": ((), _OFF),
    "use_beam_search": ((False,), _OFF),
    "length_penalty": ((1, 1.0), _OFF),
    "prompt_logprobs": ((), "echo with logprobs reports the prompt's"),
    "truncate_prompt_tokens": ((), "a prompt is not cut: send one that fits"),
    "allowed_token_ids": ((), _BY_TOKEN),
    "bad_words": (([],), _BY_TOKEN),
    "logits_processors": (([],), _OFF),
    "skip_special_tokens": ((True,), "special tokens are never part of the text"),
    "return_token_ids": ((False,), _OFF),
    "return_tokens_as_token_ids": ((False,), _OFF),
    "priority": ((0,), _OFF),
    "lora": (([],), "name the adapter in model"),
    "lora_path": ((), "name the adapter in model"),
    "suffix": (("",), "is not supported: a prompt is continued, not filled in; leave it out"),
    "prompt_embeds": ((), _OFF),
}
_CHAT: dict[str, tuple[tuple[Any, ...], str]] = {
    "functions": (([],), _OLD_TOOLS),
    "function_call": (("none", "auto"), _OLD_TOOLS),
    "modalities": ((["text"],), "answers are text"),
    "audio": ((), "answers are text"),
    "prediction": ((), _OFF),
    "web_search_options": ((), _OFF),
    "reasoning_effort": (("none",), NO_EFFORT),
    "echo": ((False,), "is for /v1/completions"),
    "add_generation_prompt": ((True,), _NO_TEMPLATE),
    "continue_final_message": ((False,), _NO_TEMPLATE),
    "add_special_tokens": ((False,), _NO_TEMPLATE),
    "chat_template": ((), _NO_TEMPLATE),
    "chat_template_kwargs": (({},), _NO_TEMPLATE),
    "documents": (([],), _NO_TEMPLATE),
}
_COMPLETIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    "tools": (([],), _IN_CHATS),
    "functions": (([],), _IN_CHATS),
    "function_call": (("none", "auto"), _IN_CHATS),
    "add_special_tokens": ((True,), "send token ids to have none added"),
}


def refuse_unsupported(fields: Fields, *, is_chat: bool) -> None:
    """Note every field that turret would have to ignore."""
    own = _CHAT if is_chat else _COMPLETIONS
    for name, (neutral, why) in (_EVERYWHERE | own).items():
        value = fields.get(name)
        # Compare the types too: 1 equals True in Python.
        if value is None or any(type(value) is type(n) and value == n for n in neutral):
            continue
        fields.refuse(name, why)


def refused_fields() -> dict[str, list[str]]:
    """The fields that may be refused, sorted: by every path, of conversations, of prompts."""
    tables = {"everywhere": _EVERYWHERE, "conversations": _CHAT, "prompts": _COMPLETIONS}
    return {where: sorted(table) for where, table in tables.items()}
