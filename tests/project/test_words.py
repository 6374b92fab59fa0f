"""The catalogue of sentences: every text that code asks for is there, with the same parameters."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from string import Formatter

from turret.server.words import adapters, http, requests, serving, start
from turret.server.words.text import SUGGESTION

ROOT = Path(__file__).parents[2]
FOLDERS = ("server", "fleet", "training", "clients", "kernels")
CATALOGUES = (requests.TEXTS, adapters.TEXTS, serving.TEXTS, http.TEXTS, start.TEXTS)
TEXTS = {reason: template for each in CATALOGUES for reason, template in each.items()}


def said() -> Iterator[tuple[str, set[str], bool]]:
    """Reason and names of parameters of each text that is asked for, and whether they are all."""
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "say":
                    reason = node.args[0]
                    assert isinstance(reason, ast.Constant), f"{path}:{node.lineno}"
                    names = {keyword.arg for keyword in node.keywords if keyword.arg}
                    yield str(reason.value), names, None not in {k.arg for k in node.keywords}


def test_no_reason_stands_twice() -> None:
    assert len(TEXTS) == sum(map(len, CATALOGUES))


def test_each_text_has_its_parameters() -> None:
    wanted = {
        reason: {name.partition(".")[0] for _, name, _, _ in Formatter().parse(text) if name}
        for reason, text in TEXTS.items()
    }
    asked = {SUGGESTION}
    for reason, names, is_all in said():
        asked.add(reason)
        # A text may leave out what only programs look at.
        assert wanted[reason] <= names or not is_all, reason
    assert asked == TEXTS.keys()


def test_a_text_that_is_scrambled_keeps_its_reason_and_parameters() -> None:
    code = (
        "from turret.server.words import say;"
        " text = say('TOO_MANY_ENTRIES', most=3, found=5); print(text, text.reason, text.params)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code],
        env={"PSEUDOLOCALE": "rot13"},
        capture_output=True,
        text=True,
        check=True,
    )
    sentence = "ng zbfg 3 ragevrf, abg 5 TOO_MANY_ENTRIES {'most': 3, 'found': 5}\n"
    assert shown.stdout == sentence
