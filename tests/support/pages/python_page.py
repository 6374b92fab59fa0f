"""docs/python.md: the Python client, from its docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from checkout import ROOT

from turret.clients import adapters, aio, aio_adapters, channel, client, errors
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
    except NotFoundError as error:
        print(error.message)
```

Calls that the server refused for lack of room are tried again, up to `max_retries` times, after
the delay that it asks for. A stream that breaks off waits a minute for a server that starts again,
and goes on where it was: `resume`.

Errors name arguments, `temperature: must be in [0, 100]`, and so do their `violations`. Imported
from `turret`, the clients have gRPC write no lines of its own, unless `GRPC_VERBOSITY` is set.
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
        ("Adapters of a server", [*public(adapters), *public(aio_adapters)]),
        ("Connection and mixes", [channel.Tls, *public(mix)]),
        ("Options", public(requests)),
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
    lines = [_INTRO]
    for heading, kinds in classes():
        lines += [f"## {heading}", ""]
        if heading == "Errors":
            tree = inspect.cleandoc(errors.__doc__ or "").partition("\n\n")[2]
            lines += ["```", tree, "```", ""]
        for kind in kinds:
            types = {name: _named(each) for name, each in inspect.get_annotations(kind).items()}
            lines += [f"### `{kind.__name__}`", "", *_text(kind.__doc__, types)]
            lines += [*_properties(kind), *_methods(kind)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(rendered())
