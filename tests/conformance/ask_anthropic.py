"""Sends requests with Anthropic's Python client, and prints JSON for test_clients.py.

python ask_anthropic.py URL TOOLS_URL QUESTION
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import anthropic  # type: ignore[import-not-found]
import pydantic

URL, TOOLS_URL, QUESTION = sys.argv[1:]
ASKED: dict[str, Any] = {
    "model": "json",
    "max_tokens": 6,
    # The newest versions of the client have no parameter for the temperature.
    "extra_body": {"temperature": 0},
    "messages": [{"role": "user", "content": QUESTION}],
}
DOUBLE: Any = {
    "name": "double",
    "description": "Doubles a number.",
    "input_schema": {
        "type": "object",
        "properties": {"number": {"type": "integer"}},
        "required": ["number"],
        "additionalProperties": False,
    },
}


class Person(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    age: int


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


async def asynchronous() -> dict[str, str]:
    async with anthropic.AsyncAnthropic(base_url=URL, api_key="none") as client:
        whole = await client.messages.create(**ASKED)
        async with client.messages.stream(**ASKED) as stream:
            text = "".join([text async for text in stream.text_stream])
        return {"whole": text_of(whole), "stream": text}


def refused(client: anthropic.Anthropic) -> dict[str, Any]:
    image = {"type": "base64", "media_type": "image/png", "data": "AA=="}
    turn = {"role": "user", "content": [{"type": "image", "source": image}]}
    try:
        client.messages.create(**{**ASKED, "messages": [turn]})
    except anthropic.BadRequestError as error:
        body: Any = error.body
        return {"kind": body["error"]["type"], "param": body["error"]["param"]}
    return {}


def loop() -> dict[str, Any]:
    """An agent's loop of tool calls, with events, until the model answers with text."""
    turns: list[Any] = [{"role": "user", "content": "What is twice 21?"}]
    kinds, called = [], []
    with anthropic.Anthropic(base_url=TOOLS_URL, api_key="none") as client:
        for choice in ({"type": "any"}, {"type": "tool", "name": "double"}, {"type": "none"}):
            asked: dict[str, Any] = {"model": "base", "max_tokens": 64}
            asked["extra_body"] = {"temperature": 0}
            asked |= {"messages": turns, "tools": [DOUBLE], "tool_choice": choice}
            with client.messages.stream(**asked) as stream:
                events = [event.type for event in stream]
                message = stream.get_final_message()
            kinds.append(events[-1])
            turns.append({"role": "assistant", "content": message.content})
            results = []
            for block in message.content:
                if block.type == "tool_use":
                    called.append([block.name, type(block.input["number"]).__name__])
                    result = str(2 * block.input["number"])
                    results.append(
                        {"type": "tool_result", "tool_use_id": block.id, "content": result}
                    )
            if not results:
                return {"last": kinds[-1], "called": called, "reason": message.stop_reason}
            turns.append({"role": "user", "content": results})
    return {"called": called}


def main() -> None:
    with anthropic.Anthropic(base_url=URL, api_key="none") as client:
        whole = client.messages.create(**ASKED)
        with client.messages.stream(**ASKED) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        raw = [event.type for event in client.messages.create(**ASKED, stream=True)]
        count = client.messages.count_tokens(model="json", messages=ASKED["messages"])
        parsed = client.messages.parse(**{**ASKED, "max_tokens": 40}, output_format=Person)
        found = {
            "whole": text_of(whole),
            "stream": text,
            "reason": whole.stop_reason,
            "usage": final.usage.output_tokens,
            "prompt": whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0),
            "count": count.input_tokens,
            "ends": [raw[0], raw[-1]],
            "parsed": type(parsed.parsed_output.age).__name__ if parsed.parsed_output else None,
            "refused": refused(client),
        }
    print(json.dumps(found | {"async": asyncio.run(asynchronous()), "loop": loop()}))


if __name__ == "__main__":
    main()
