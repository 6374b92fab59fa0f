# /// script
# dependencies = ["guidellm>=0.8"]
# [tool.uv]
# override-dependencies = ["torch; python_version < '0'"]
# ///
"""Runs the ``guidellm`` command with the torch of another environment.

TORCH_AT=.../site-packages uv run ask_guidellm.py run ...

GuideLLM needs torch only to load its prompts, and ``uv`` would install gigabytes for CUDA.
"""

from __future__ import annotations

import os
import sys

sys.path.append(os.environ["TORCH_AT"])

from guidellm.__main__ import cli  # type: ignore[import-not-found]

# The command's worker processes import this file.
if __name__ == "__main__":
    cli()
