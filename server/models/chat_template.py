"""Chat templates, which turn a conversation into the text that a model reads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from turret.server.adapters.adapter import TEMPLATE_FILE, TOKENIZER_FILES, OwnTemplate
from turret.server.basics import codes
from turret.server.basics.confined import Confined
from turret.server.basics.files import read_regular, unreadable
from turret.server.basics.names import closest
from turret.server.basics.turns import FairPool
from turret.server.errors import InvalidRequestError
from turret.server.words import Text, say

CPU_SECONDS = 2.0
MAX_BYTES = 256 << 20
# Twice the largest message that a client can send.
MAX_TEXT_BYTES = 8 << 20
_PROGRAM = Path(__file__).with_name("template_program.py")


@dataclass(frozen=True, slots=True)
class Rendering:
    """How a conversation is rendered.

    Attributes:
        variables: More variables for the template.
        begins_turn: Whether the text ends with the beginning of the assistant's turn.
        continues: Whether the text ends with the content of the last message.
    """

    variables: Mapping[str, Any] = field(default_factory=dict)
    begins_turn: bool = True
    continues: bool = False


USUAL = Rendering()


class ChatTemplate:
    """Renders conversations in a child process, because templates are untrusted code.

    Thread-safe. Short conversations have a separate process and thread, so that they do not wait
    for long ones. Each template has its own processes, so that a slow template delays no
    conversations with other templates.

    Args:
        templates: The template, or several by name, as in older tokenizers.
        variables: Special tokens by their names, such as ``bos_token``.
        like: A template whose processes this one uses; None for its own.
    """

    def __init__(
        self,
        templates: str | Mapping[str, str],
        variables: Mapping[str, str],
        like: ChatTemplate | None = None,
    ) -> None:
        self._templates = {"default": templates} if isinstance(templates, str) else templates
        self._variables = variables
        self._short = _Lane() if like is None else like._short
        self._long = _Lane() if like is None else like._long

    def pool(self, is_short: bool) -> FairPool:
        """The pool in which to call ``render`` for a short or a long conversation."""
        return (self._short if is_short else self._long).pool

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        is_short: bool,
        how: Rendering = USUAL,
    ) -> str:
        """The text of a conversation. Ignores ``how.continues``. Blocks.

        Raises:
            ValueError: The template rejects the messages, fails, or exceeds a limit.
            UnavailableError: The process was killed, or got hardly any processor time.
        """
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise ValueError(say("NO_DEFAULT_TEMPLATE", found=", ".join(self._templates)))
        job = {
            "template": self._templates[name],
            "variables": {
                "messages": messages,
                "tools": tools or None,
                "documents": None,
                "add_generation_prompt": how.begins_turn,
                **self._variables,
                **how.variables,
            },
        }
        return self._ask(job, is_short)

    def check(self) -> None:
        """Compile the templates. Blocks; errors are those of ``render``."""
        for template in self._templates.values():
            self._ask({"template": template}, is_short=True)

    def _ask(self, job: Mapping[str, Any], is_short: bool) -> str:
        lane = self._short if is_short else self._long
        return lane.confined.ask_one(job, "CHAT_TEMPLATE_UNANSWERED")["text"]

    def close(self) -> None:
        """End the processes and any rendering."""
        self._short.confined.close()
        self._long.confined.close()


class _Lane:
    def __init__(self) -> None:
        self.confined = Confined(
            _PROGRAM,
            cpu_seconds=CPU_SECONDS,
            max_bytes=MAX_BYTES,
            max_answer_bytes=MAX_TEXT_BYTES,
            packages=("jinja2", "markupsafe"),
        )
        self.pool = FairPool(ThreadPoolExecutor(1, "chat-template"))


# Features of a chat template beyond turns: tools, and blocks of reasoning.


ToolForm = Literal["hermes", "xml", "llama3", "mistral", "mistral11", "harmony"]

# Texts that mark tool calls, in each format. Tokenizers may have special tokens for them.
_MARKS: dict[ToolForm, tuple[str, ...]] = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "xml": ("<tool_call>", "</tool_call>"),
    "llama3": ("<|python_tag|>",),
    "mistral": ("[TOOL_CALLS]",),
    "mistral11": ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    "harmony": codes.MARKS,
}
# Adapters can bring templates, so these patterns must match in time linear in a template's length.
_ROLES = ("system", "user", "assistant", "tool", "developer")
_OPENING = re.compile(r"\{[{%]")
_TOOLS = re.compile(r"\btools\b")
# Matches a template whose prompt ends inside the block of reasoning, so that the answer contains
# only the end of the block.
_OPENS = re.compile(r"<think>(?:\\n|\n)*+['\"]?\s*+(?:-?[}%]\}|\{%)")


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """The format of a model's answers.

    Attributes:
        tools: The form in which the model calls tools; None if the template has no tools.
        has_reasoning: Whether answers may begin with ``<think>...</think>``.
        opens_reasoning: Whether the prompt ends in ``<think>``; None if that depends on the
            template's variables.
        marks: Special tokens around calls and channels, by their texts.
        has_call_ids: Whether the model writes an id for each call.
        has_channels: Whether answers are messages in channels: thoughts, calls, and text for the
            user.
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
            template: The template of the tokenizer.
            special: Ids of its special tokens, by their texts.
        """
        if isinstance(template, dict):
            # Older tokenizers have one template for chats with tools and one for other chats.
            template = template.get("tool_use") or template.get("default")
        if not isinstance(template, str):
            return cls()
        last = template.rpartition("add_generation_prompt")[2]
        opens = bool(_OPENS.search(last))
        may_close = opens and "</think>" in last
        form, has_channels = _form(template), _has_channels(template)
        marks = codes.MARKS if has_channels else () if form is None else _MARKS[form]
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

    Many templates write any role, but the model has learned only these roles. With another role,
    the answer would be wrong without an error.

    Args:
        template: The template of the tokenizer.
        role: The role of a message.
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
    """Whether ``tools`` occurs between an opening brace and the next closing one."""
    return any(
        (opening := _OPENING.search(part)) and _TOOLS.search(part, opening.end())
        for part in template.split("}")
    )


def _has_channels(template: str) -> bool:
    return codes.CHANNEL in template and codes.MESSAGE in template


def _form(template: str) -> ToolForm | None:
    if not _uses_tools(template):
        return None
    if _has_channels(template):
        # Some templates have channels for reasoning but no recipients for calls.
        return "harmony" if codes.FUNCTIONS in template else None
    if "<tool_call>" in template:
        return "xml" if "<function=" in template else "hermes"
    if "[TOOL_CALLS]" in template:
        return "mistral11" if "[ARGS]" in template else "mistral"
    if "<|python_tag|>" in template or "<|eom_id|>" in template or "ipython" in template:
        return "llama3"
    return None


# The chat template that an operator sets for the base model.


_CHATML = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# Templates that can be set by their names, with the tokens that end their turns.
_BUILT_IN = {"chatml": (_CHATML, "<|im_end|>")}


def base_template(path: Path) -> OwnTemplate:
    """The template in a file, which is compiled once to check it, or the built-in one of this name.

    Raises:
        InvalidRequestError: The file is not readable or not a template.
        UnavailableError: See ``ChatTemplate.render``.
    """
    # A name in a settings file has become a path in the directory of that file.
    if path.name in _BUILT_IN and not path.exists():
        text, end = _BUILT_IN[path.name]
        return OwnTemplate(path.name, {"default": text}, {"eos_token": end})
    try:
        data = read_regular(path)
    except OSError as error:
        raise InvalidRequestError.of("chat-template", unreadable(path, error)) from None
    most = TOKENIZER_FILES[TEMPLATE_FILE]
    if len(data) > most:
        why = say("FILE_TOO_LARGE", most=most)
        raise InvalidRequestError.of("chat-template", why)
    try:
        text = data.decode()
        template = ChatTemplate(text, {})
        try:
            template.check()
        finally:
            template.close()
    except UnicodeDecodeError:
        raise InvalidRequestError.of("chat-template", say("NOT_UTF8")) from None
    except ValueError as error:
        why = say("CHAT_TEMPLATE_INVALID", problem=error)
        raise InvalidRequestError.of("chat-template", why) from None
    return OwnTemplate(str(path), {"default": text})
