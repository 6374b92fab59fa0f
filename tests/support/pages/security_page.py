"""The generated part of docs/security.md; run this file to write it."""

from __future__ import annotations

from checkout import ROOT

from turret.server.api.limits import LIMITS

PAGE = ROOT / "docs" / "security.md"


def render_limits() -> str:
    lines = ["| field | at most | checked in |", "|---|---|---|"]
    lines += [f"| `{limit.field}` | {limit.most} | `{limit.checked_in}` |" for limit in LIMITS]
    return "\n".join(lines)


def rendered(page: str) -> str:
    """The page with a new generated part."""
    begin, end = "<!-- generated: limits -->", "<!-- end: limits -->"
    assert page.count(begin) == page.count(end) == 1
    head, _, rest = page.partition(begin)
    return f"{head}{begin}\n{render_limits()}\n{end}{rest.partition(end)[2]}"


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text()))
