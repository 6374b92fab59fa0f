"""All sentences are in the catalogues, with their parameters, and no code reads them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from string import Formatter

from checkout import ROOT
from pages.sentences import PAGE, catalogues, rendered

from turret.server import errors
from turret.server.words import say
from turret.words import SUGGESTION

# Functions that take a reason and parameters, with the parameters that they add themselves.
SAYERS: dict[str, set[str]] = {
    **{"say": set(), "check": set(), "_check": set(), "refuse": {"path"}},
    "ask_one": {"problem"},
    "Limit": {"most", "max_requests_per_token", "max_requests_per_peer"},
}
PACKAGES = ("adapters", "api", "basics", "constraints", "engine", "http", "hub", "models", "rpc")
FOLDERS = ("src/turret", "server", "fleet", "training", "clients", "kernels")
CATALOGUES = tuple(catalogues().values())
TEXTS = {reason: template for each in CATALOGUES for reason, template in each.items()}


def said() -> Iterator[tuple[str, set[str], bool]]:
    """The reason and the parameter names of each used text, and whether the list is complete."""
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call):
                    continue
                called = getattr(node.func, "id", getattr(node.func, "attr", ""))
                parts = [
                    each
                    for arg in node.args
                    for each in ([arg.body, arg.orelse] if isinstance(arg, ast.IfExp) else [arg])
                ]
                found = [each.value for each in parts if isinstance(each, ast.Constant)]
                reasons = [each for each in found if each in TEXTS]
                is_passed_on = getattr(node.args[0], "id", "") == "reason" if node.args else False
                if called not in SAYERS or is_passed_on or not (reasons or called == "say"):
                    continue
                assert reasons, f"{path}:{node.lineno}"
                names = {keyword.arg for keyword in node.keywords if keyword.arg}
                names |= SAYERS[called]
                for reason in reasons:
                    yield reason, names, None not in {k.arg for k in node.keywords}


def in_tables() -> set[str]:
    """Reasons that are values of a dictionary."""
    return {
        value.value
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Dict)
        for value in node.values
        if isinstance(value, ast.Constant) and value.value in TEXTS
    }


def test_reasons_and_sentences_are_unique() -> None:
    assert len(TEXTS) == sum(map(len, CATALOGUES))
    assert [text for text, count in Counter(TEXTS.values()).items() if count > 1] == []


def test_the_golden_file_shows_every_sentence() -> None:
    assert PAGE.read_text() == rendered(), "run `make pages`, and read what changes"


def test_each_text_has_its_parameters() -> None:
    wanted = {
        reason: {name.partition(".")[0] for _, name, _, _ in Formatter().parse(text) if name}
        for reason, text in TEXTS.items()
    }
    asked = {SUGGESTION} | in_tables()
    for reason, names, is_all in said():
        asked.add(reason)
        # A text may omit parameters that are only for programs.
        assert wanted[reason] <= names or not is_all, reason
    assert asked == TEXTS.keys()


def test_every_error_text_comes_from_the_catalogue() -> None:
    """The test covers the packages whose errors all come from the catalogue."""
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type)}
    free = []
    server = ROOT / "server"
    for package in PACKAGES:
        for path in (*server.glob(f"{package}.py"), *(server / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                match node:
                    case ast.Call(func=ast.Name(id=name), args=[text, *_]) if name in kinds:
                        pass
                    case ast.Call(func=ast.Attribute(value=ast.Name(id=name)), args=[_, text]) if (
                        name in kinds
                    ):
                        pass
                    case ast.Call(func=ast.Attribute(attr="add"), args=[_, text]):
                        pass
                    case _:
                        continue
                if isinstance(text, ast.Constant | ast.JoinedStr | ast.BinOp):
                    free.append(f"{path}:{node.lineno}")
    assert free == []


def test_a_quoted_value_is_printable_whatever_it_holds() -> None:
    assert '"ü"' in say("DUPLICATE", value="ü")
    for code in range(0x11000):
        assert say("DUPLICATE", value=f"ü{chr(code)}").isprintable(), hex(code)


def test_a_scrambled_text_keeps_its_reason_and_parameters() -> None:
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
    sentence = "zhfg unir ng zbfg 3 ragevrf, abg 5 TOO_MANY_ENTRIES {'most': 3, 'found': 5}\n"
    assert shown.stdout == sentence


def test_names_cannot_control_a_terminal() -> None:
    name = "a\x1b[2J\r\u202e"
    text = say("FOLDER_MISSING", path=name)
    found = errors.InvalidRequestError.of_all([(name, text)])
    for each in (text, found.message, found.violations[0][0], found.violations[0][1]):
        assert each.isprintable(), each
    assert "\\x1b[2J\\r\\u202e" in found.message


CHECKED = ("server", "clients", "training", "fleet")
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
            for folder in CHECKED
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
