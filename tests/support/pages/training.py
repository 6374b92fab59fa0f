"""The generated parts of docs/training.md."""

from __future__ import annotations

from typing import Any

from turret.server.basics.settings import fields_of, tables_of, toml_value
from turret.training.methods import METHODS, PeftMethod
from turret.training.settings import DECLARED, TrainConfig


def render_config_reference() -> str:
    """One row per key, with its default or the origin of its value."""
    lines = ["| key | default | |", "|---|---|---|"]
    for table, kind in tables_of(TrainConfig).items():
        for name, info in fields_of(kind).items():
            extra: Any = info.json_schema_extra
            default = f"*{extra['chosen']}*" if info.default is None else "**required**"
            if not info.is_required() and info.default is not None:
                default = f"`{toml_value(info.default)}`"
            lines.append(f"| `{table}.{name}` | {default} | {info.description} |")
    return "\n".join(lines)


def render_methods() -> str:
    """One row per method, with its defaults."""
    lines = [
        "| method | learning rate | targets | rank or length | other keys |",
        "|---|---|---|---|---|",
    ]
    for name, method in METHODS.items():
        if not isinstance(method, PeftMethod):
            continue
        keys = dict(DECLARED[name].defaults)
        targets = keys.pop("targets", None)
        size = next((keys.pop(k) for k in ("rank", "num_virtual_tokens") if k in keys), None)
        shown = "up to 8" if name == "loha" else "" if size is None else str(size)
        lines.append(
            f"| `{name}` | {method.learning_rate:g} | {', '.join(targets or ())} | {shown} "
            f"| {', '.join(f'`{key}`' for key in keys)} |"
        )
    return "\n".join(lines)
