"""Makes a turret server call a tool through LangChain, and prints the results as JSON.

python ask_langchain_tools.py BASE_URL
"""

from __future__ import annotations

import json
import sys
from typing import Any

from langchain_core.messages import HumanMessage, ToolMessage  # type: ignore[import-not-found]
from langchain_core.tools import tool  # type: ignore[import-not-found]
from langchain_openai import ChatOpenAI  # type: ignore[import-not-found]


@tool
def double(number: int) -> int:
    """Twice a number."""
    return 2 * number


options: Any = {"base_url": sys.argv[1], "api_key": "none", "temperature": 0, "max_retries": 0}
found: dict[str, Any] = {}
for name, is_response in (("chat", False), ("responses", True)):
    chat = ChatOpenAI(model="base", max_tokens=100, use_responses_api=is_response, **options)
    forced = chat.bind_tools([double], tool_choice="double", parallel_tool_calls=False)
    turns = [HumanMessage("What is twice 21?")]
    answer = forced.invoke(turns)
    (call,) = answer.tool_calls
    back = ToolMessage(str(2 * call["args"]["number"]), tool_call_id=call["id"])
    end = chat.invoke([*turns, answer, back])
    found[name] = {"tool": call["name"], "arguments": call["args"], "has_end": bool(end.content)}
print(json.dumps(found))
