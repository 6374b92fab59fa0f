"""The tests in this directory compile kernels, so they need a process without Triton's interpreter.

``tests/kernels/compiled/test_emulated_sm_80.py`` and its sibling run them in such a process.
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "0" else ["test_*.py"]
