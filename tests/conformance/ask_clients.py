"""Sends requests with one of several Python clients, and prints the results as JSON.

python ask_clients.py CLIENT URL TOOLS_URL

The client's name is that of a function here. TOOLS_URL is a server whose template supports tools.
"""

from __future__ import annotations

import json
import sys
from typing import Any, Literal

import pydantic

CLIENT, URL, TOOLS_URL = sys.argv[1:]
QUESTION = "JSON with name, age: Ann is 31 years old."
TURNS: Any = [{"role": "user", "content": QUESTION}]
KEY = "none"


class Person(pydantic.BaseModel):
    name: Literal["Ann", "Bob"]
    age: int


def instructor_() -> dict[str, Any]:
    """The default mode calls a tool; the other one sends a response format."""
    import instructor  # type: ignore[import-not-found]
    import openai

    found = {}
    for mode, url, model in (("TOOLS", TOOLS_URL, "base"), ("JSON_SCHEMA", URL, "json")):
        client = instructor.from_openai(
            openai.OpenAI(base_url=url, api_key=KEY), mode=instructor.Mode[mode]
        )
        person = client.create(
            model=model,
            response_model=Person,
            messages=TURNS,
            max_tokens=100,
            temperature=0,
            max_retries=0,
        )
        found[mode] = type(person.age).__name__
    return found


def litellm_() -> dict[str, Any]:
    import litellm  # type: ignore[import-not-found]

    asked = {"messages": TURNS, "max_tokens": 6, "temperature": 0, "api_key": KEY}
    whole = litellm.completion(model="hosted_vllm/json", api_base=URL, **asked)
    stream = litellm.completion(model="openai/json", api_base=URL, stream=True, **asked)
    effort = litellm.completion(
        model="hosted_vllm/json", api_base=URL, reasoning_effort="low", **asked
    )
    vectors = litellm.embedding(
        model="hosted_vllm/base", api_base=URL, api_key=KEY, input=["one", "two"]
    )
    return {
        "whole": whole.choices[0].message.content,
        "stream": "".join(part.choices[0].delta.content or "" for part in stream),
        "effort": effort.choices[0].message.content,
        "vectors": len(vectors.data),
    }


def guidance_() -> dict[str, Any]:
    """The library guidance sends one grammar in two fields."""
    import guidance  # type: ignore[import-not-found]
    from guidance.models.experimental import VLLMModel  # type: ignore[import-not-found]

    model = VLLMModel("base", base_url=URL, api_key=KEY)
    with guidance.user():
        model += "Pick a colour."
    with guidance.assistant():
        model += guidance.select(["red", "blue"], name="colour")
    with guidance.user():
        model += "Pick a number."
    with guidance.assistant():
        model += guidance.gen("number", regex="[0-9]{3}", max_tokens=10)
    return {"colour": model["colour"], "number": model["number"]}


def outlines_() -> dict[str, Any]:
    import openai
    import outlines  # type: ignore[import-not-found]

    client = openai.OpenAI(base_url=URL, api_key=KEY)
    plain = outlines.from_openai(client, "json")
    vllm = outlines.from_vllm(client, "json")
    person = Person.model_validate_json(plain(QUESTION, Person, max_tokens=60))
    return {
        "age": type(person.age).__name__,
        "choice": vllm(QUESTION, Literal["yes", "no"], max_tokens=5),
        "regex": vllm(QUESTION, outlines.regex("[a-f]{4}"), max_tokens=9),
    }


def agents_() -> dict[str, Any]:
    """An agent calls a tool, through chat completions and through responses."""
    import agents  # type: ignore[import-not-found]
    import openai

    agents.set_tracing_disabled(True)
    calls: list[int] = []

    @agents.function_tool
    def double(number: int) -> int:
        """Twice a number."""
        calls.append(number)
        return 2 * number

    client = openai.AsyncOpenAI(base_url=TOOLS_URL, api_key=KEY)
    found: dict[str, Any] = {}
    for kind in (agents.OpenAIChatCompletionsModel, agents.OpenAIResponsesModel):
        settings = agents.ModelSettings(
            tool_choice="double",
            parallel_tool_calls=False,
            max_tokens=64,
            temperature=0,
            reasoning={"effort": "low"},
        )
        agent = agents.Agent(
            name="calculator",
            tools=[double],
            # The answer of a small model about the result does not matter.
            tool_use_behavior="stop_on_first_tool",
            model=kind(model="base", openai_client=client),
            model_settings=settings,
        )
        found[kind.__name__] = agents.Runner.run_sync(agent, "What is twice 21?").final_output
    return {**found, "calls": calls}


def pydantic_ai_() -> dict[str, Any]:
    """The default output mode calls a tool."""
    from pydantic_ai import Agent  # type: ignore[import-not-found]
    from pydantic_ai.models.openai import OpenAIChatModel  # type: ignore[import-not-found]
    from pydantic_ai.providers.openai import OpenAIProvider  # type: ignore[import-not-found]

    provider = OpenAIProvider(base_url=TOOLS_URL, api_key=KEY)
    agent = Agent(
        OpenAIChatModel("base", provider=provider),
        output_type=Person,
        model_settings={"max_tokens": 100, "temperature": 0},
    )
    return {"age": type(agent.run_sync(QUESTION).output.age).__name__}


def dspy_() -> dict[str, Any]:
    import dspy  # type: ignore[import-not-found]

    model = dspy.LM(
        "openai/json", api_base=URL, api_key=KEY, max_tokens=60, temperature=0, cache=False
    )
    (answer,) = model(QUESTION)
    return {"text": answer}


if __name__ == "__main__":
    print(json.dumps(globals()[f"{CLIENT}_"]()))
