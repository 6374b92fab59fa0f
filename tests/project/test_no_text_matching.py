"""No code reads text for people: errors have reasons, metadata and fields."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from checkout import ROOT

FOLDERS = ("server", "clients", "training", "fleet")
# Names of variables and attributes that contain a sentence.
SENTENCES = ("message", "msg", "details", "description", "problem", "said", "hint")
MATCHING = {
    *("startswith", "endswith", "removeprefix", "removesuffix", "replace"),
    *("find", "index", "count", "partition", "rpartition", "split", "rsplit"),
}
PATTERNS = {"match", "search", "fullmatch", "sub", "subn", "findall", "finditer", "split"}
# File → number of remaining places. Lower the numbers when places are removed; add none.
ALLOWED = {
    # gRPC reports its own failures only as text.
    "clients/errors.py": 5,
    # Libraries name a temporary folder in their messages, which is replaced.
    "server/models/own_tokenizers.py": 1,
}


def is_sentence(node: ast.expr | None, caught: set[str]) -> bool:
    """Whether an expression is a sentence: a variable for one, or the text of an error."""
    match node:
        case ast.Name(id=name):
            return name in SENTENCES
        case ast.Attribute(attr=name, value=ast.Name(id=owner)):
            return name in SENTENCES and (name != "message" or owner in caught or "fault" in owner)
        case ast.Call(func=ast.Name(id="str"), args=[ast.Name(id=name)]):
            return name in caught
    return False


def places(path: Path) -> Iterator[int]:
    """The lines of a file on which code searches for text in a sentence."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    caught = {"error", "exc", "failure", "fault"}
    caught |= {n.name for n in ast.walk(tree) if isinstance(n, ast.ExceptHandler) and n.name}
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(attr=name, value=value), args=args):
                # split() without a separator does not search for text.
                if (name in MATCHING and args and is_sentence(value, caught)) or (
                    name in PATTERNS and any(is_sentence(each, caught) for each in args)
                ):
                    yield node.lineno
            case ast.Compare(ops=[ast.In() | ast.NotIn()], comparators=[right]):
                if is_sentence(right, caught) and not isinstance(right, ast.Name):
                    yield node.lineno


def test_code_matches_no_text_of_messages() -> None:
    found = Counter(
        {
            str(path.relative_to(ROOT)): len(lines)
            for folder in FOLDERS
            for path in (ROOT / folder).rglob("*.py")
            if (lines := list(places(path)))
        }
    )
    assert found == ALLOWED


def test_the_check_finds_planted_violations(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text(
        "import re\n"
        "try:\n    pass\n"
        "except ValueError as e:\n"
        "    'a' in str(e)\n"
        "    str(e).startswith('--')\n"
        "    re.match('a', str(e))\n"
        "    e.message.removesuffix('; x')\n"
        "    f'{e}'.strip(), request.message.replace('a', 'b'), 'a' in names\n"
    )
    assert sorted(places(file)) == [5, 6, 7, 8]
