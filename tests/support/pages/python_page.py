"""docs/python.md: the Python client, from its docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from checkout import ROOT

from turret.clients import adapters, aio, aio_adapters, channel, client, errors
from turret.clients.calls import aio_streams, streams
from turret.clients.messages import adapter_results, head_results, mix, requests, results

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
        for chunk in client.generate_stream("Once upon a time", max_tokens=64):
            print(chunk.text, end="", flush=True)
    except NotFoundError as error:
        print(error.message)
```

`AsyncTurretClient` has the same methods to be awaited; streams are iterated as they are:

```python
import asyncio

from turret import AsyncTurretClient


async def main() -> None:
    async with AsyncTurretClient("127.0.0.1:50051") as client:
        answer = await client.chat("How many users?", adapters=["sql"], temperature=0)
        print(answer.text)
        async with client.generate_stream("Once upon a time", max_tokens=64) as stream:
            async for chunk in stream:
                print(chunk.text, end="", flush=True)


asyncio.run(main())
```

To a server with tokens and TLS it is
`TurretClient("gpu1:50051", token=..., tls=Tls.from_files(ca="ca.pem"))`, with
`from turret import Tls`; `admin_address=` is where the server has its administration, if that is
elsewhere.

Calls that the server refused for lack of room are tried again, up to `max_retries` times, after
the delay that it asks for. A stream that breaks off waits a minute for a server that starts again,
and goes on where it was: `resume`.

Errors name arguments, `temperature: must be in [0, 100]`, and so do their `violations`. Imported
from `turret`, the clients have gRPC write no lines of its own, unless `GRPC_VERBOSITY` is set.
"""


_FORMS = """\
A `Prompt` is a text, token ids (an array of numpy's or a tensor, too) or the turns of a
conversation. A `MessageLike` is one turn: a mapping in OpenAI's form (`role`, `content`, which is a
text or parts of type `text`, `tool_calls` and `tool_call_id`; keys whose value is None, `name` and
`reasoning_content` are passed over, others refused), a pair of role and text, or the message
`ChatMessage` of `turret.v1`.

```python
from turret import TurretClient

with TurretClient("127.0.0.1:50051") as client:
    # A text, used as it is.
    client.generate("Once upon a time", max_tokens=8)
    # Token ids.
    client.generate([504, 3575, 282], max_tokens=8)
    # The turns of a conversation, in either form, written by the model's chat template.
    client.generate([("system", "Be brief."), {"role": "user", "content": "Hi!"}], max_tokens=8)
    # A conversation too: a text is a user's single message here.
    client.chat("Hi!", max_tokens=8)
```
"""


def classes() -> list[tuple[str, list[type]]]:
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
        ("Streams", [*public(streams), *public(aio_streams)]),
        ("Adapters of a server", [*public(adapters), *public(aio_adapters)]),
        ("Connection and mixes", [channel.Tls, *public(mix)]),
        ("Prompts and options", public(requests)),
        ("Results", [*public(results), *public(head_results), *public(adapter_results)]),
        ("Errors", public(errors)),
    ]


class _Bare(str):
    """What a signature shows without quotes: an annotation that is a string, as all here are."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _text(docstring: str | None, types: Mapping[str, str] = MappingProxyType({})) -> list[str]:
    """A docstring as Markdown: its sections become lists, in which ``types`` are named."""
    lines: list[str] = []
    for line in inspect.cleandoc(docstring or "").replace("``", "`").splitlines():
        line = re.sub(r":\w+:`~?(?:[\w.]+\.)?([^`]+)`", r"`\1`", line)
        if section := _SECTION.match(line):
            lines += [f"*{section[1]}*", ""]
        elif entry := _ENTRY.match(line):
            kind = f": {types[entry[1]]}" if entry[1] in types else ""
            lines.append(f"- `{entry[1]}{kind}`: {entry[2]}")
        elif line.startswith("        ") and lines and lines[-1].startswith(("- ", "  ")):
            lines.append(f"  {line.strip()}")
        else:
            lines.append(line.strip() if line.startswith("    ") else line)
    return [*lines, ""]


def _signature(name: str, function: Any) -> str:
    signature = inspect.signature(function)
    parameters = signature.parameters.values()
    shown = signature.replace(
        parameters=[each.replace(annotation=_bare(each.annotation)) for each in parameters],
        return_annotation=_bare(signature.return_annotation),
    )
    # Without what differs from one Python to the next: defaults that are objects.
    text = re.sub(r"<[^<>]*>", "…", str(shown))
    prefix = "async def" if inspect.iscoroutinefunction(function) else "def"
    return f"{prefix} {name}{text}"


def _bare(annotation: Any) -> Any:
    return _Bare(annotation) if isinstance(annotation, str) else annotation


def _named(annotation: Any) -> str:
    """An annotation as it is written; a TypedDict wraps those that are strings."""
    return getattr(annotation, "__forward_arg__", str(annotation))


def _properties(kind: type) -> list[str]:
    found = {name: member for name, member in vars(kind).items() if isinstance(member, property)}
    lines = [
        f"- `{name}: {inspect.signature(member.fget).return_annotation}`: {member.__doc__}"
        for name, member in found.items()
        if name[0] != "_" and member.fget is not None
    ]
    return ["*Properties*", "", *lines, ""] if lines else []


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
    lines = []
    for heading, kinds in classes():
        lines += [f"## {heading}", ""]
        if heading == "Errors":
            tree = inspect.cleandoc(errors.__doc__ or "").partition("\n\n")[2]
            lines += ["```", tree, "```", ""]
        if heading == "Prompts and options":
            lines += [_FORMS, ""]
        for kind in kinds:
            types = {name: _named(each) for name, each in inspect.get_annotations(kind).items()}
            lines += [f"### `{kind.__name__}`", ""]
            if heading == "Clients":
                # Others are made by these, or have their defaults among their attributes.
                lines += ["```python", _signature("__init__", kind.__init__), "```", ""]
            lines += _text(kind.__doc__, types)
            lines += [*_properties(kind), *_methods(kind)]
    # The introduction's code keeps its two blank lines.
    return _INTRO + "\n" + re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(rendered())
