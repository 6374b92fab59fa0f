"""docs/python.md: the Python client, from its docstrings."""

from __future__ import annotations

import inspect
import re
from typing import Any

from checkout import ROOT

from turret.clients import adapters, aio, aio_adapters, channel, client, errors
from turret.clients.messages import adapter_results, mix, requests, results

PAGE = ROOT / "docs" / "python.md"
_SECTION = re.compile(r"^(Args|Returns|Yields|Raises|Attributes):$")
_ENTRY = re.compile(r"^    (\S[^:]*): (.*)$")
_INTRO = """\
# The Python client

`from turret import TurretClient` loads no torch. This page is made from the docstrings by `make
pages`.

```python
from turret import TurretClient
from turret.clients.errors import NotFoundError, RateLimitedError

with TurretClient("127.0.0.1:50051", max_retries=2) as client:
    try:
        print(client.generate("The capital of France is", adapters=["sql"], max_tokens=16).text)
    except NotFoundError as error:
        print(error.message)
```

Calls that the server refused for lack of room are tried again, up to `max_retries` times, after
the delay that it asks for. What streams do when they break off: `resume`.
"""


def _classes() -> list[tuple[str, list[type]]]:
    """Headings, and the public classes below each."""

    def public(module: Any) -> list[type]:
        found = [
            kind
            for name, kind in vars(module).items()
            if inspect.isclass(kind) and kind.__module__ == module.__name__ and name[0] != "_"
        ]
        return sorted(found, key=lambda kind: inspect.getsourcelines(kind)[1])

    return [
        ("Clients", [*public(client), *public(aio)]),
        ("Adapters of a server", [*public(adapters), *public(aio_adapters)]),
        ("Connection and mixes", [channel.Tls, *public(mix)]),
        ("Options", public(requests)),
        ("Results", [*public(results), *public(adapter_results)]),
        ("Errors", public(errors)),
    ]


def _text(docstring: str | None) -> list[str]:
    """A docstring as Markdown: its sections become lists."""
    lines: list[str] = []
    for line in inspect.cleandoc(docstring or "").replace("``", "`").splitlines():
        line = re.sub(r":\w+:`~?(?:[\w.]+\.)?([^`]+)`", r"`\1`", line)
        if section := _SECTION.match(line):
            lines += [f"*{section[1]}*", ""]
        elif entry := _ENTRY.match(line):
            lines.append(f"- `{entry[1]}`: {entry[2]}")
        elif line.startswith("        ") and lines and lines[-1].startswith(("- ", "  ")):
            lines.append(f"  {line.strip()}")
        else:
            lines.append(line.strip() if line.startswith("    ") else line)
    return [*lines, ""]


def _signature(name: str, function: Any) -> str:
    # Without what differs from one Python to the next: defaults that are objects.
    signature = re.sub(r"<[^<>]*>", "…", str(inspect.signature(function)))
    prefix = "async def" if inspect.iscoroutinefunction(function) else "def"
    return f"{prefix} {name}{signature}".replace("'", "").replace("typing.", "")


def _methods(kind: type) -> list[str]:
    lines = []
    for name, member in vars(kind).items():
        function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if name.startswith("_") or not inspect.isfunction(function):
            continue
        lines += [f"#### `{kind.__name__}.{name}`", "", "```python"]
        lines += [_signature(name, function), "```", "", *_text(function.__doc__)]
    return lines


def rendered() -> str:
    """The page."""
    lines = [_INTRO]
    for heading, kinds in _classes():
        lines += [f"## {heading}", ""]
        if heading == "Errors":
            tree = inspect.cleandoc(errors.__doc__ or "").partition("\n\n")[2]
            lines += ["```", tree, "```", ""]
        for kind in kinds:
            lines += [f"### `{kind.__name__}`", "", *_text(kind.__doc__), *_methods(kind)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(rendered())
