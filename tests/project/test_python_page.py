"""docs/python.md runs, and docs/python-api.md lists all public classes and attributes."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest
from checkout import ROOT
from servers.fake_turret import fake_turret

import turret
from turret.clients import errors

GUIDE = ROOT / "docs" / "python.md"
REFERENCE = ROOT / "docs" / "python-api.md"


def documented() -> set[type]:
    """The classes in the reference, listed by name or as public classes of a listed module."""
    found: set[type] = set()
    for path in re.findall(r"^::: ([\w.]+)$", REFERENCE.read_text(), re.MULTILINE):
        module, _, name = path.rpartition(".")
        if name[0].isupper():
            found.add(getattr(importlib.import_module(module), name))
            continue
        named = importlib.import_module(path)
        found |= {
            kind
            for key, kind in vars(named).items()
            if inspect.isclass(kind) and kind.__module__ == path and key[0] != "_"
        }
    return found


def test_every_public_name_is_listed() -> None:
    kinds = documented()
    public = {getattr(turret, name) for name in turret.__all__}
    raised = {kind for name, kind in vars(errors).items() if name.endswith("Error")}
    assert len(raised) > 10
    assert public | raised <= kinds


def test_the_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    blocks = [block for block in blocks if "127.0.0.1:50051" in block]
    assert len(blocks) == 3
    with fake_turret() as server:
        for block in blocks:
            code = block.replace("127.0.0.1:50051", server.address)
            exec(compile(code, "python.md", "exec"), {"__name__": "python.md"})
        assert len(server.inference.requests) == 8
    assert capsys.readouterr().out.count("Onceuponatime") == 2


def test_every_attribute_and_option_is_explained() -> None:
    missing = [
        f"{kind.__name__}.{name}"
        for kind in documented()
        for name in inspect.get_annotations(kind)
        if name[0] != "_" and not re.search(rf"^\s+{name}: ", kind.__doc__ or "", re.MULTILINE)
    ]
    assert not missing
