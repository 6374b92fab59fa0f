"""The generated parts of docs/adapters.md; run this file to write them."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping

from checkout import ROOT
from pages.adapter_costs import render_costs

from turret.server.adapters.methods import METHODS, AnyMethod
from turret.server.adapters.methods.unserved import UNSERVED
from turret.server.adapters.peft_format.config.rules import Irrelevant, Rejected, Rule, Used

PAGE = ROOT / "docs" / "adapters.md"


def _keys() -> list[str]:
    """Every key that some method has a rule for, those that most methods share first."""
    keys = {key for method in METHODS.values() for key in method.rules}
    return sorted(keys, key=lambda key: (-sum(key in m.rules for m in METHODS.values()), key))


def _names(methods: list[str]) -> str:
    return "all" if len(methods) == len(METHODS) else ", ".join(methods)


def render_keys() -> str:
    """Which methods read a key, which do without it, which refuse it."""
    kinds: tuple[type[Rule], ...] = (Used, Irrelevant, Rejected)
    lines = [
        "| key | used | no part in the forward pass | refused unless off |",
        "|---|---|---|---|",
    ]
    for key in _keys():
        rules = {name: method.rules.get(key) for name, method in METHODS.items()}
        cells = [_names([n for n, rule in rules.items() if isinstance(rule, k)]) for k in kinds]
        lines.append(f"| `{key}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def render_reasons() -> str:
    """Why a key is irrelevant or refused; one line per key and reason."""
    methods_of: dict[tuple[str, str, str], list[str]] = {}
    for key in _keys():
        for name, method in METHODS.items():
            rule = method.rules.get(key)
            if isinstance(rule, Irrelevant):
                methods_of.setdefault((key, "irrelevant", rule.why), []).append(name)
            elif isinstance(rule, Rejected):
                off = " or ".join(f"`{value}`" for value in rule.off)
                why = f"{rule.advice} (accepted: {off})"
                methods_of.setdefault((key, "rejected", why), []).append(name)
    lines = ["| key | methods | | why |", "|---|---|---|---|"]
    for (key, kind, why), names in methods_of.items():
        lines.append(f"| `{key}` | {_names(names)} | {kind} | {why} |")
    return "\n".join(lines)


def render_types() -> str:
    """Every ``peft_type``: the methods it is served as and what they compute, or what to do."""
    served: dict[str, list[str]] = {}
    for name, method in METHODS.items():
        for kind in method.peft_types:
            served.setdefault(kind, []).append(name)
    lines = ["| `peft_type` | served as | |", "|---|---|---|"]
    for kind in sorted({*served, *UNSERVED}):
        if kind in UNSERVED:
            lines.append(f"| `{kind}` | **no** | {UNSERVED[kind]} |")
        for name in served.get(kind, ()):
            lines.append(f"| `{kind}` | {name} | {_summary(METHODS[name])} |")
    return "\n".join(lines)


def _summary(method: AnyMethod) -> str:
    """The first line of a method's file; formulas in code."""
    path = method.name
    (file,) = (ROOT / "server" / "adapters" / "methods").rglob(f"{path}.py")
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    return text.partition("\n")[0].replace("``", "`").rstrip(".")


# Made in a second; that of costs writes an adapter of every method, which takes many.
PARTS = {"keys": render_keys, "reasons": render_reasons, "types": render_types}
COSTS = {"costs": render_costs}


def rendered(page: str, parts: Mapping[str, Callable[[], str]] = PARTS) -> str:
    """The page with generated parts made anew."""
    for name, render in parts.items():
        text = render()
        begin, end = f"<!-- generated: {name} -->", f"<!-- end: {name} -->"
        assert page.count(begin) == page.count(end) == 1, name
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        page = re.sub(pattern, lambda _, t=text: f"{begin}\n{t}\n{end}", page, flags=re.DOTALL)  # noqa: B023
    return page


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text(), PARTS | COSTS))
