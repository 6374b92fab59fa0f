"""The generated part of docs/architecture.md: every package with its docstring."""

from __future__ import annotations

import ast

from checkout import ROOT

PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- generated: rooms -->", "<!-- end: rooms -->"


def rooms() -> list[str]:
    """Every code folder with an ``__init__.py``, as a path in the checkout, in order."""
    return sorted(
        str(path.parent.relative_to(ROOT))
        for folder in (ROOT / "src" / "turret").iterdir()
        if folder.is_symlink() and folder.name != "v1"
        for path in folder.resolve().rglob("__init__.py")
    )


def caption(room: str) -> str:
    """The first paragraph of a package's docstring, on one line."""
    tree = ast.parse((ROOT / room / "__init__.py").read_text())
    text = (ast.get_docstring(tree) or "").partition("\n\n")[0]
    return " ".join(text.split()).replace("``", "`")


def rendered(page: str) -> str:
    """The page with a new generated part."""
    lines = ["| room | what is in it |", "|---|---|"]
    lines += [f"| `{room}` | {caption(room)} |" for room in rooms()]
    assert page.count(BEGIN) == page.count(END) == 1
    head, _, rest = page.partition(BEGIN)
    return "\n".join([head + BEGIN, *lines, END]) + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text()))
