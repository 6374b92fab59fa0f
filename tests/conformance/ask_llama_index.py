# /// script
# dependencies = ["llama-index-llms-openai-like>=0.8", "llama-index-embeddings-openai-like>=0.4"]
# ///
"""Sends requests with LlamaIndex, and prints the results as JSON.

uv run ask_llama_index.py URL TOOLS_URL

TOOLS_URL is a server whose template supports tools. LlamaIndex needs an older version of OpenAI's
client than the other clients, so ``uv`` installs it in an environment of its own.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import pydantic
from llama_index.core.llms import ChatMessage  # type: ignore[import-not-found]
from llama_index.core.tools import FunctionTool  # type: ignore[import-not-found]
from llama_index.embeddings.openai_like import (  # type: ignore[import-not-found]
    OpenAILikeEmbedding,
)
from llama_index.llms.openai_like import OpenAILike  # type: ignore[import-not-found]

URL, TOOLS_URL, QUESTION = sys.argv[1:]


class Person(pydantic.BaseModel):
    """A person."""

    name: str = pydantic.Field(max_length=20)
    age: int


def double(number: int) -> int:
    """Twice a number."""
    return 2 * number


def client(model: str, url: str = URL, **more: Any) -> Any:
    options = {"is_chat_model": True, "temperature": 0, "max_tokens": 6, "context_window": 8192}
    return OpenAILike(model=model, api_base=url, api_key="none", **{**options, **more})


turns = [ChatMessage(role="user", content=QUESTION)]
chat = client("json")
raw = client("base", is_chat_model=False)
strict = client("json", max_tokens=60, should_use_structured_outputs=True)
tools = client("base", TOOLS_URL, max_tokens=60, is_function_calling_model=True)
called = tools.chat_with_tools(
    [FunctionTool.from_defaults(double)],
    user_msg="What is twice 21?",
    tool_required=True,
    allow_parallel_tool_calls=False,
)
(call,) = tools.get_tool_calls_from_response(called)
vectors = OpenAILikeEmbedding(model_name="base", api_base=URL, api_key="none")
print(
    json.dumps(
        {
            "whole": chat.chat(turns).message.content,
            "stream": "".join(part.delta for part in chat.stream_chat(turns)),
            "completion": raw.complete("The sky is").text,
            "streamed": "".join(part.delta for part in raw.stream_complete("The sky is")),
            "age": type(strict.as_structured_llm(Person).complete(QUESTION).raw.age).__name__,
            "tool": [call.tool_name, type(call.tool_kwargs["number"]).__name__],
            "vectors": len(vectors.get_text_embedding_batch(["one", "two"])),
        }
    )
)
