"""The location of the checkout, and a way to hide installed extras."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def line_that_hides_extras() -> str:
    """A line of Python that hides the packages of the extras for users.

    The tests' environment has all extras, so a hidden dependency on one shows only with this line.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names = [re.split(r"[\[<>=;]", each)[0] for each in extras["train"] + extras["cluster"]]
    # The packages of the extra otel share one module.
    names.append("opentelemetry")
    return f"import sys; sys.modules.update(dict.fromkeys({names}))"
