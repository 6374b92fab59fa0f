"""The synchronous client, made from the asyncio one; run this file to write it."""

from __future__ import annotations

import re
import subprocess
import sys

from checkout import ROOT

CLIENTS = ROOT / "clients"
# Source → what is made of it.
FILES = {
    "aio.py": "client.py",
    "aio_adapters.py": "adapters.py",
    "calls/aio_unary.py": "calls/unary.py",
    "calls/aio_streams.py": "calls/streams.py",
}
# In this order, in code and docstrings alike.
WORDS = (
    (r"# `timeout` is the call's deadline.*\n# ruff: noqa: ASYNC109\n", ""),
    (r"turret\.clients\.calls\.aio\b", "turret.clients.calls.blocking"),
    (r"turret\.clients\.calls\.aio_", "turret.clients.calls."),
    (r"turret\.clients\.aio_adapters\b", "turret.clients.adapters"),
    (r"\b(await|async) ", ""),
    (r"\ban ``Async", "a ``"),
    (r"\bAsync(?=[A-Z])", ""),
    (r"\bStopAsyncIteration\b", "StopIteration"),
    (r"\bAwaitable\[Any\]", "Any"),
    (r"\bAwaitable, ", ""),
    (r"\b__a(enter|exit|iter|next)__", r"__\1__"),
    (r"\ba(iter|next)\(", r"\1("),
    (r"\bcall_async\b", "call"),
    (r"\baclose\b", "close"),
)


def rendered(source: str) -> str:
    """The text of the file that is made of ``source``."""
    text = (CLIENTS / source).read_text(encoding="utf-8")
    for pattern, word in WORDS:
        text = re.sub(pattern, word, text)
    head = f"# Made from clients/{source} by `make client`; edit that file instead.\n"
    for command in (
        ["check", "--quiet", "--select", "I,RUF022", "--fix", "-"],
        ["format", "--quiet", "-"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--stdin-filename", CLIENTS / FILES[source]],
            input=head + text if head else text,
            capture_output=True,
            check=True,
            text=True,
            cwd=ROOT,
        )
        head, text = "", done.stdout
    return text


if __name__ == "__main__":
    for source, made in FILES.items():
        (CLIENTS / made).write_text(rendered(source), encoding="utf-8")
