"""Qwen3: every head of queries and keys is normalised; windows in some layers."""

from __future__ import annotations

import functools

from turret.server.models.family import Family, read_windowed

_READ = functools.partial(read_windowed, qk_norm="head")
FAMILY = Family({"qwen3": _READ}, head_dims={"qwen3": 128})
