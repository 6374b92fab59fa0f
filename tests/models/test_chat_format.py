"""The formats of tools and reasoning, detected from chat templates."""

from __future__ import annotations

import time
from typing import Any

import pytest

from turret.server.models.chat_template import ChatFormat, unknown_role


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, ChatFormat()),
        ("{{ messages }}", ChatFormat()),
        ("{% if tools %}<tool_call>{% endif %}", ChatFormat("hermes")),
        ("{%- for t in tools %}[TOOL_CALLS]{% endfor %}", ChatFormat("mistral")),
        ("{% if tools %}<|python_tag|>{% endif %}", ChatFormat("llama3")),
        ("{% if tools %}call them as you like{% endif %}", ChatFormat()),
        ("{% if tools %}<tool_call><function=f>{% endif %}", ChatFormat("xml")),
        ("{% if tools %}[TOOL_CALLS]f[ARGS]{% endif %}", ChatFormat("mistral11")),
        (
            "{% if tools %}[TOOL_CALLS]f[CALL_ID]1[ARGS]{% endif %}",
            ChatFormat("mistral11", has_call_ids=True),
        ),
        ({"default": "x", "tool_use": "{{ tools }}<tool_call>"}, ChatFormat("hermes")),
        ("a <think> b</think>{% if add_generation_prompt %}x{% endif %}", ChatFormat(None, True)),
        (
            "{% if add_generation_prompt %}{{ 'assistant: <think>\\n' }}{% endif %}",
            ChatFormat(None, True, True),
        ),
        # An empty block turns off thinking.
        (
            "{% if add_generation_prompt %}{{ '<think>\\n</think>' }}{% endif %}",
            ChatFormat(None, True, False),
        ),
    ],
)
def test_the_format_is_detected_from_the_template(template: Any, expected: ChatFormat) -> None:
    assert ChatFormat.of(template) == expected


@pytest.mark.parametrize("template", ["<think>" + "\n" * 200_000, "{{" * 100_000])
def test_detection_takes_linear_time(template: str) -> None:
    """Templates are untrusted, and the detection blocks other work."""
    before = time.thread_time()
    assert not ChatFormat.of(template).opens_reasoning
    assert time.thread_time() - before < 1


def test_roles_are_the_common_ones_and_those_of_the_template() -> None:
    template = """{% if m.role == "ipython" or m.role.startswith('document ') %}critic{{ '' ~ ' ' }}
    {% endif %}"""
    for known in ("system", "user", "assistant", "tool", "developer", "ipython", "document 7"):
        assert unknown_role(template, known) is None
        assert unknown_role({"default": "x", "tool_use": template}, known) is None
    for other in ("critic", "python", "documents", "Ipython", "", " ", " user"):
        assert unknown_role(template, other) is not None


def test_marks_are_the_special_tokens_of_the_format() -> None:
    template = "{% if tools %}[TOOL_CALLS]f[ARGS]{% endif %}"
    special = {"[TOOL_CALLS]": 9, "[ARGS]": 32, "[INST]": 3, "<tool_call>": 4}
    assert ChatFormat.of(template, special).marks == {"[TOOL_CALLS]": 9, "[ARGS]": 32}
    assert ChatFormat.of("{{ messages }}", special).marks == {}
