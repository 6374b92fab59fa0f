"""All sentences of turret's errors in one file, for proofreading: ``make pages``."""

from __future__ import annotations

import importlib

from checkout import ROOT

PAGE = ROOT / "tests" / "project" / "golden" / "sentences.txt"


def catalogues() -> dict[str, dict[str, str]]:
    """The catalogues of the source tree, by the path of their file."""
    found: dict[str, dict[str, str]] = {}
    source = ROOT / "src" / "turret"
    for path in sorted((source / "words.py", *source.glob("*/words.py"))):
        name = ".".join(path.relative_to(source.parent).with_suffix("").parts)
        found[str(path.relative_to(ROOT))] = importlib.import_module(name).TEXTS
    return found


def rendered() -> str:
    """One line per sentence, with its reason and its template."""
    lines = [f"{reason}: {text}" for each in catalogues().values() for reason, text in each.items()]
    return "\n".join(sorted(lines)) + "\n"
