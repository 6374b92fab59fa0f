"""The installed versions of the client ``tinker``.

These are the versions below ``TINKER_CLIENTS``, each installed as with
``pip install --target TINKER_CLIENTS/0.38.0 tinker==0.38.0``. Without that variable, there is
only the version of this Python.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest


def _installed() -> list[str]:
    """The folders with clients; ``""`` for the client of this Python."""
    if folder := os.environ.get("TINKER_CLIENTS"):
        return sorted(str(path) for path in Path(folder).iterdir())
    return [""] if importlib.util.find_spec("tinker") else []


_NONE = [pytest.param("", marks=pytest.mark.skip("the client tinker is not installed"))]
# The values of a parameter for tests.
CLIENTS = _installed() or _NONE
