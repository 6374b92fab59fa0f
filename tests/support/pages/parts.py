"""The generated parts of documentation pages, each between two marks."""

from __future__ import annotations

from collections.abc import Callable, Mapping


def with_parts(page: str, parts: Mapping[str, Callable[[], str]]) -> str:
    """A page with new generated parts, by their names."""
    for name, render in parts.items():
        begin, end = f"<!-- generated: {name} -->", f"<!-- end: {name} -->"
        assert page.count(begin) == page.count(end) == 1, name
        head, _, rest = page.partition(begin)
        page = f"{head}{begin}\n{render()}\n{end}{rest.partition(end)[2]}"
    return page
