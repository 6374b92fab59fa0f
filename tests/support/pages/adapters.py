"""The generated parts of docs/adapters.md."""

from __future__ import annotations

import ast
from collections.abc import Mapping

from checkout import ROOT

from turret.server.adapters.methods import METHODS, UNSERVED, AnyMethod
from turret.server.adapters.peft_format.config_rules import Irrelevant, Rejected


def render_keys() -> str:
    """The keys that methods ignore, and those that they reject, one line per reason."""
    having: dict[str, set[str]] = {}
    for name, method in METHODS.items():
        for key in method.rules:
            having.setdefault(key, set()).add(name)
    ignored: dict[str, dict[str, set[str]]] = {}
    rejected: dict[str, dict[str, set[str]]] = {}
    for key in sorted(having, key=lambda key: (-len(having[key]), key)):
        for name in sorted(having[key]):
            rule = METHODS[name].rules[key]
            if isinstance(rule, Irrelevant):
                ignored.setdefault(rule.why, {}).setdefault(key, set()).add(name)
            elif isinstance(rule, Rejected):
                rejected.setdefault(rule.advice, {}).setdefault(key, set()).add(name)
    lines: list[str] = []
    for title, keys_of in (("Ignored keys", ignored), ("Rejected keys", rejected)):
        lines += [f"| {title} | why |", "|---|---|"]
        for why, keys in keys_of.items():
            lines.append(f"| {_listed(keys, having)} | {why} |")
        lines.append("")
    return "\n".join(lines[:-1])


def _listed(keys: Mapping[str, set[str]], having: Mapping[str, set[str]]) -> str:
    """The keys, with their methods if other methods treat a key in another way."""
    groups: dict[str, list[str]] = {}
    for key, names in keys.items():
        groups.setdefault(_of(names, having[key]), []).append(f"`{key}`")
    return "; ".join(", ".join(group) + of for of, group in sorted(groups.items()))


def _of(names: set[str], having: set[str]) -> str:
    """The methods among those that have a key, in the shorter of two forms."""
    others = having - names
    if not others:
        return ""
    if len(others) < len(names):
        return f" (not {', '.join(sorted(others))})"
    return f" ({', '.join(sorted(names))})"


def render_types() -> str:
    """Every ``peft_type``: its methods with their function, or advice if it is not supported."""
    served: dict[str, list[str]] = {}
    for name, method in METHODS.items():
        for kind in method.peft_types:
            served.setdefault(kind, []).append(name)
    lines = ["| `peft_type` | method | |", "|---|---|---|"]
    for kind in sorted({*served, *UNSERVED}):
        if kind in UNSERVED:
            lines.append(f"| `{kind}` | **no** | {UNSERVED[kind]} |")
        for name in served.get(kind, ()):
            lines.append(f"| `{kind}` | {name} | {_summary(METHODS[name])} |")
    return "\n".join(lines)


def _summary(method: AnyMethod) -> str:
    """The first line of a method's file, with formulas as code."""
    path = method.name
    (file,) = (ROOT / "server" / "adapters" / "methods").rglob(f"{path}.py")
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    return text.partition("\n")[0].replace("``", "`").rstrip(".")
