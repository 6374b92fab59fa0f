"""Queries a turret server through LangChain; prints JSON. Runs in the clients' venv.

python ask_langchain.py BASE_URL PROMPT
"""

from __future__ import annotations

import json
import sys
from typing import Any

from langchain_openai import ChatOpenAI, OpenAI  # type: ignore[import-not-found]

url, prompt = sys.argv[1:]
options: Any = {"base_url": url, "api_key": "none", "temperature": 0, "max_retries": 0}
chat = ChatOpenAI(model="json", max_tokens=6, **options)
whole = chat.invoke(prompt)
mixed = ChatOpenAI(
    model="base",
    max_tokens=6,
    extra_body={"adapters": [{"name": "json"}, {"name": "sql", "weight": -0.5}]},
    **options,
)
print(
    json.dumps(
        {
            "whole": whole.content,
            "usage": whole.usage_metadata["output_tokens"],
            "stream": "".join(part.content for part in chat.stream(prompt)),
            "batch": [one.content for one in chat.batch([prompt, prompt])],
            "mixed": mixed.invoke(prompt).content,
            "completion": OpenAI(model="base", max_tokens=6, **options).invoke("Two and two is"),
        }
    )
)
