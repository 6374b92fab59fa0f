"""The generated part of docs/architecture.md: every room, and what its ``__init__.py`` says."""

from __future__ import annotations

import ast

from checkout import ROOT

PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- generated: rooms -->", "<!-- end: rooms -->"
# In the order in which one reads them; what is in none of them is a mistake.
ROOMS = (
    "server/command",
    *("server/rpc", "server/http", "server/http/console", "server/http/exchange"),
    *("server/http/bodies", "server/http/bodies/responses", "server/http/tools"),
    *("server/api", "server/api/access", "server/api/admin", "server/api/inference"),
    *("server/cluster", "server/cluster/machine", "server/cluster/replica"),
    "server/cluster/serving",
    *("server/engine", "server/engine/scheduling", "server/engine/speculation"),
    *("server/engine/step", "server/engine/step/gpu"),
    *("server/basics", "server/basics/files", "server/basics/work", "server/constraints"),
    *("server/hub", "server/models", "server/models/sources", "server/models/families"),
    *("server/models/decoding", "server/models/weights", "server/adapters"),
    *(
        f"server/adapters/{name}"
        for name in (
            "operators",
            *("checkpoint", "peft_format/config", "peft_format/refusals", "peft_format"),
            *("peft_format/vocabulary", "lowering", "methods"),
            *("methods/lora", "methods/low_rank", "methods/transforms", "methods/structured"),
            *("methods/vectors", "methods/prompts"),
            *("state", "residency", "fuse", "registry", "merge"),
            *("device", "device/cpu", "device/gpu", "device/gpu/gated"),
        )
    ),
    *("kernels/adapters", "kernels/rows", "kernels/cpu", "kernels/gpu", "kernels/gpu/adapters"),
    *("kernels/gpu/gates", "kernels/gpu/experts", "kernels/gpu/tables", "kernels/gpu/shared"),
    *("clients/calls", "clients/messages", "clients/verbs", "clients/evaluation"),
    *(
        f"training/{name}"
        for name in (
            *("settings", "data", "methods", "lycoris", "fusion", "memory", "run", "report"),
            *("conversion", "models"),
        )
    ),
)


def existing() -> set[str]:
    """Every folder of code that has an ``__init__.py``, as a path from the checkout."""
    return {
        str(path.parent.relative_to(ROOT))
        for top in ("server", "kernels", "clients", "training")
        for path in (ROOT / top).rglob("__init__.py")
    }


def caption(room: str) -> str:
    """The first paragraph of a room's docstring, on one line."""
    tree = ast.parse((ROOT / room / "__init__.py").read_text())
    text = (ast.get_docstring(tree) or "").partition("\n\n")[0]
    return " ".join(text.split()).replace("``", "`")


def rendered(page: str) -> str:
    """The page with its generated part made anew."""
    lines = ["| room | what is in it |", "|---|---|"]
    lines += [f"| `{room}` | {caption(room)} |" for room in ROOMS]
    assert page.count(BEGIN) == page.count(END) == 1
    head, _, rest = page.partition(BEGIN)
    return "\n".join([head + BEGIN, *lines, END]) + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text()))
