"""Every sentence of turret's errors in one file, to be read as prose: ``make pages``."""

from __future__ import annotations

import importlib

from checkout import ROOT

PAGE = ROOT / "tests" / "project" / "golden" / "sentences.txt"


def catalogues() -> dict[str, dict[str, str]]:
    """The catalogues of the source tree, by the path of their file."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted((*ROOT.glob("*/words/*.py"), *ROOT.glob("*/words.py"))):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        texts = getattr(importlib.import_module(f"turret.{name}"), "TEXTS", None)
        if texts is not None:
            found[str(path.relative_to(ROOT))] = texts
    return found


def rendered() -> str:
    """A line for each sentence: its reason and its template."""
    lines = [f"{reason}: {text}" for each in catalogues().values() for reason, text in each.items()]
    return "\n".join(sorted(lines)) + "\n"


if __name__ == "__main__":
    PAGE.write_text(rendered())
