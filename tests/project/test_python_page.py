"""docs/python.md is made from the docstrings, and says all that is public."""

from __future__ import annotations

import ast
import inspect
import re

import pytest
from pages.python_page import PAGE, classes, rendered
from servers.fake_turret import fake_turret

import turret
from turret.clients import errors


def test_the_page_is_that_of_the_code() -> None:
    assert PAGE.read_text() == rendered(), "run `make pages`"


def test_every_public_name_is_there() -> None:
    page = PAGE.read_text()
    kinds = [name for name in vars(errors) if name.endswith("Error")]
    assert len(kinds) > 10
    for name in (*turret.__all__, *kinds):
        assert f"### `{name}`" in page


def test_the_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n((?!async def|def ).*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 3
    with fake_turret() as server:
        for block in blocks:
            assert block.count("127.0.0.1:50051") == 1
            code = block.replace("127.0.0.1:50051", server.address)
            exec(compile(code, "python.md", "exec"), {"__name__": "python.md"})
        assert len(server.inference.requests) == 8
    assert capsys.readouterr().out.count("Onceuponatime") == 2


def test_what_a_client_gives_out_is_said_to_be_its() -> None:
    page = PAGE.read_text()
    assert "`client.adapters` of a `TurretClient`" in page
    for name in ("GenerationStream", "AsyncGenerationStream", "AsyncAdaptersClient"):
        assert f"### `{name}`" in page


def test_signatures_are_python() -> None:
    signatures = re.findall(r"```python\n((?:async )?def .*)\n```", PAGE.read_text())
    assert len(signatures) > 60
    for signature in signatures:
        # Objects that are defaults are left out of the page.
        ast.parse(signature.replace("…", "...") + ": ...")
    assert any("request_id: str = ''" in signature for signature in signatures)
    assert any("mode: str = 'drain'" in signature for signature in signatures)
    made = [
        each for each in signatures if each.startswith("def __init__(self, address: str = '127")
    ]
    assert len(made) == 2
    assert all("timeout: float | None = 600.0, max_retries: int" in each for each in made)


def test_every_attribute_and_option_is_explained() -> None:
    sections = dict(re.findall(r"### `(\w+)`\n(.*?)(?=\n###? |\Z)", PAGE.read_text(), re.DOTALL))
    kinds = [kind for _, kinds in classes() for kind in kinds]
    missing = [
        f"{kind.__name__}.{name}"
        for kind in kinds
        for name in (*inspect.get_annotations(kind), *vars(kind))
        if name[0] != "_"
        and (name in inspect.get_annotations(kind) or isinstance(vars(kind)[name], property))
        and f"\n- `{name}: " not in sections[kind.__name__]
    ]
    assert not missing
    assert "\n- `temperature: float | None`: " in sections["GenerateOptions"]
