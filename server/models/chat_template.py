"""A chat template: what makes the text of a conversation that a model reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from turret.server.basics.confined.confined import Confined, ConfinedError
from turret.server.errors import UnavailableError
from turret.server.words import say

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
    """Renders conversations in a child process, since templates are code that strangers wrote.

    Thread-safe. Short conversations have a process and a thread of their own, so that they do not
    wait for long ones. Each template has its own processes, so that a slow template delays nobody
    else's conversations.

    Args:
        templates: The template; or several by name, as older tokenizers have them.
        variables: Special tokens by their names, such as ``bos_token``.
    """

    def __init__(self, templates: str | Mapping[str, str], variables: Mapping[str, str]) -> None:
        self._templates = {"default": templates} if isinstance(templates, str) else templates
        self._variables = variables
        self._short, self._long = _Lane(), _Lane()

    def executor(self, is_short: bool) -> Executor:
        """The executor on which to call ``render`` for a short or a long conversation."""
        return (self._short if is_short else self._long).executor

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        is_short: bool,
        how: Rendering = USUAL,
    ) -> str:
        """The text of a conversation, as if ``how.continues`` were not set. Blocks.

        Raises:
            ValueError: The template refuses the messages, fails, or takes too much.
            UnavailableError: The process was ended, or got hardly any processor time.
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
        try:
            (answer,) = (self._short if is_short else self._long).confined.ask(job)
        except ConfinedError as error:
            if error.is_over_limit:
                raise ValueError(*error.args) from None
            raise UnavailableError(say("CHAT_TEMPLATE_UNANSWERED", problem=error)) from None
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["text"]

    def close(self) -> None:
        """End the processes, and with them what they render."""
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
        self.executor = ThreadPoolExecutor(1, "chat-template")
