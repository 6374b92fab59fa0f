"""Tests here compile kernels: they need a process where triton is no interpreter.

``tests/kernels/compiled/test_emulated_sm_80.py`` and its sibling start one and run them.
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "0" else ["test_*.py"]
