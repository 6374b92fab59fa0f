"""The generated parts of docs/adapters.md; run this file to write them."""

from __future__ import annotations

import re

from checkout import ROOT

from turret.server.adapters.methods import METHODS
from turret.server.adapters.peft_format.rules import Irrelevant, Rejected, Rule, Used
from turret.server.adapters.peft_format.unserved import UNSERVED

PAGE = ROOT / "docs" / "adapters.md"


def _mark(rule: Rule | None) -> str:
    match rule:
        case Used():
            return "used"
        case Irrelevant():
            return "–"
        case Rejected():
            return "**no**"
        case None:
            return ""


def _keys() -> list[str]:
    """Every key that some method has a rule for, those that most methods share first."""
    keys = {key for method in METHODS.values() for key in method.rules}
    return sorted(keys, key=lambda key: (-sum(key in m.rules for m in METHODS.values()), key))


def render_keys() -> str:
    names = list(METHODS)
    lines = ["| key | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for key in _keys():
        marks = " | ".join(_mark(METHODS[name].rules.get(key)) for name in names)
        lines.append(f"| `{key}` | {marks} |")
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
        shown = "all" if len(names) == len(METHODS) else ", ".join(names)
        lines.append(f"| `{key}` | {shown} | {kind} | {why} |")
    return "\n".join(lines)


def render_unserved() -> str:
    lines = ["| `peft_type` | what to do |", "|---|---|"]
    lines += [f"| `{kind}` | {advice} |" for kind, advice in sorted(UNSERVED.items())]
    return "\n".join(lines)


def rendered(page: str) -> str:
    """The page with its generated parts made anew."""
    for name, text in (
        ("keys", render_keys()),
        ("reasons", render_reasons()),
        ("unserved", render_unserved()),
    ):
        begin, end = f"<!-- generated: {name} -->", f"<!-- end: {name} -->"
        assert page.count(begin) == page.count(end) == 1, name
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        page = re.sub(pattern, lambda _, t=text: f"{begin}\n{t}\n{end}", page, flags=re.DOTALL)  # noqa: B023
    return page


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text()))
