"""The generated parts of the documentation, each between two marks: ``make pages`` writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from checkout import ROOT
from pages import adapters, operations, rates, security, sentences, training
from pages.adapter_costs import render_costs
from pages.memory import render_memory

# Path → its parts by name.
PAGES: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "README.md": {"rates": rates.render_rates},
    "docs/adapters.md": {
        "keys": adapters.render_keys,
        "types": adapters.render_types,
        "costs": render_costs,
    },
    "docs/choosing.md": {"costs": rates.render_costs},
    "docs/models.md": {"memory": render_memory},
    "docs/operations.md": {
        "flags": operations.render_flags,
        "errors": operations.render_errors,
        "metrics": operations.render_metrics,
    },
    "docs/security.md": {"limits": security.render_limits},
    "docs/training.md": {
        "config": training.render_config_reference,
        "methods": training.render_methods,
    },
}


def with_part(page: str, name: str, text: str) -> str:
    """A page with a new generated part."""
    begin, end = f"<!-- generated: {name} -->", f"<!-- end: {name} -->"
    assert page.count(begin) == page.count(end) == 1, name
    head, _, rest = page.partition(begin)
    return f"{head}{begin}\n{text}\n{end}{rest.partition(end)[2]}"


def main() -> None:
    for path, parts in PAGES.items():
        page = (ROOT / path).read_text(encoding="utf-8")
        for name, render in parts.items():
            page = with_part(page, name, render())
        (ROOT / path).write_text(page, encoding="utf-8")
    sentences.PAGE.write_text(sentences.rendered())


if __name__ == "__main__":
    main()
