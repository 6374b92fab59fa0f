"""A chat answer in pieces: cut as in a stream, and joined as in a client."""

from __future__ import annotations

import random

from turret.server.http.tool_calls import AnswerReader, delta_of


def put_together(reader: AnswerReader, parts: list[str]) -> tuple[str, str, list[tuple[str, str]]]:
    """The reasoning, text and calls, joined from deltas as in a client."""
    thought, said, calls = "", "", []
    for piece in [*(p for part in parts for p in reader.feed(part)), *reader.finish()]:
        delta = delta_of(piece)
        thought += delta.get("reasoning_content", "")
        said += delta.get("content", "")
        for part in delta.get("tool_calls", ()):
            if "id" in part:
                assert part["index"] == len(calls)
                calls.append((part["function"]["name"], ""))
            name, arguments = calls[part["index"]]
            calls[part["index"]] = name, arguments + part["function"]["arguments"]
    return thought, said, calls


def cut(text: str, rng: random.Random) -> list[str]:
    places = sorted(rng.choices(range(len(text) + 1), k=6))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
