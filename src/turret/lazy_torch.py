"""``torch``, imported at its first use: ``from turret.lazy_torch import torch``.

This is for modules whose declarations are read before torch is loaded, which takes seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
else:

    class _Torch:
        def __getattr__(self, name: str) -> Any:
            value = getattr(importlib.import_module("torch"), name)
            setattr(self, name, value)  # Later uses find it as an ordinary attribute.
            return value

    torch = _Torch()
