"""The generated parts of docs/adapters.md."""

from __future__ import annotations

import ast

from checkout import ROOT

from turret.server.adapters.methods import METHODS, UNSERVED, AnyMethod
from turret.server.adapters.peft_format.config_rules import Irrelevant, Rejected, Rule, Used


def _keys() -> list[str]:
    """Every key for which a method has a rule; keys that most methods share come first."""
    keys = {key for method in METHODS.values() for key in method.rules}
    return sorted(keys, key=lambda key: (-sum(key in m.rules for m in METHODS.values()), key))


def _names(methods: list[str]) -> str:
    """The methods, in the shortest of three forms."""
    chosen = set(methods)
    lora = {name for name, method in METHODS.items() if "LORA" in method.peft_types}
    forms = [_listed(methods)]
    forms.append("all" + _but(sorted(METHODS.keys() - chosen)))
    if lora & chosen:
        but_lora = _but(sorted(lora - chosen))
        rest = _listed([name for name in methods if name not in lora])
        forms.append(", ".join(filter(None, [f"LoRA types{but_lora}", rest])))
    return min(forms, key=len) if methods else ""


def _listed(names: list[str]) -> str:
    """The names, with one name for all methods with virtual tokens."""
    prompts = {name for name, method in METHODS.items() if "num_virtual_tokens" in method.rules}
    if not prompts <= set(names):
        return ", ".join(names)
    return ", ".join([*(name for name in names if name not in prompts), "prompt types"])


def _but(names: list[str]) -> str:
    return f" (not {_listed(names)})" if names else ""


def render_keys() -> str:
    """The methods that read, ignore and reject each key, and then each method's own keys."""
    kinds: tuple[type[Rule], ...] = (Used, Irrelevant, Rejected)
    head = "used | ignored | rejected unless off |"
    shared = [f"| key | {head}", "|---|---|---|---|"]
    own: dict[str, dict[type[Rule], list[str]]] = {}
    for key in _keys():
        rules = {name: m.rules[key] for name, m in METHODS.items() if key in m.rules}
        if len(rules) == 1:
            ((name, rule),) = rules.items()
            own.setdefault(name, {kind: [] for kind in kinds})[type(rule)].append(f"`{key}`")
            continue
        cells = [_names([n for n, rule in rules.items() if isinstance(rule, k)]) for k in kinds]
        shared.append(f"| `{key}` | " + " | ".join(cells) + " |")
    lines = [*shared, "", "Keys of a single method:", "", f"| method | {head}", "|---|---|---|---|"]
    for name, keys in sorted(own.items()):
        lines.append(f"| {name} | " + " | ".join(", ".join(keys[kind]) for kind in kinds) + " |")
    return "\n".join(lines)


def render_reasons() -> str:
    """The reasons why keys are ignored or rejected, one line per reason."""
    keys_of: dict[tuple[str, str], list[str]] = {}
    for key in _keys():
        methods_of: dict[tuple[str, str], list[str]] = {}
        for name, method in METHODS.items():
            rule = method.rules.get(key)
            if isinstance(rule, Irrelevant):
                methods_of.setdefault(("ignored", rule.why), []).append(name)
            elif isinstance(rule, Rejected):
                off = " or ".join(f"`{value}`" for value in rule.off)
                methods_of.setdefault(("rejected", f"{rule.advice} (accepted: {off})"), []).append(
                    name
                )
        kinds = [kind for kind, _ in methods_of]
        for (kind, why), names in methods_of.items():
            # The table of keys names the methods, unless their reasons differ.
            of = f" ({_names(names)})" if kinds.count(kind) > 1 else ""
            keys_of.setdefault((kind, why), []).append(f"`{key}`{of}")
    lines = ["| why | | keys |", "|---|---|---|"]
    for (kind, why), keys in keys_of.items():
        lines.append(f"| {why} | {kind} | {', '.join(keys)} |")
    return "\n".join(lines)


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
