"""Where the checkout is that the tests run in, and how to run it with less than is installed."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def line_that_hides_extras() -> str:
    """A line of Python; where it has run, what the extras for users bring passes for absent.

    The tests' environment has all extras, and what needs one unsaid is found nowhere else.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names = [re.split(r"[\[<>=;]", each)[0] for each in extras["train"] + extras["cluster"]]
    # The packages of the extra otel share one module.
    names.append("opentelemetry")
    return f"import sys; sys.modules.update(dict.fromkeys({names}))"
