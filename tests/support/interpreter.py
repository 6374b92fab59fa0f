"""Triton's interpreter, with products that are summed in fp64 and rounded once.

NumPy's BLAS promises no order of its sums: on some processors an element's bits depend on the
column that it stands in, so that two kernels with other tiles differ where tensor cores would not.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np


def sum_products_in_fp64() -> None:
    """Replace the interpreter's ``tl.dot``, if it is loaded; ``ptx`` rounds its products so too."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None:
        return
    builder: Any = interpreter.InterpreterBuilder
    original, handle = builder.create_dot, interpreter.TensorHandle

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if not all(np.issubdtype(operand.data.dtype, np.floating) for operand in (a, b)):
            return original(self, a, b, d, *options)
        product = np.matmul(a.data, b.data, dtype=np.float64) + d.data
        return handle(product.astype(d.data.dtype), d.dtype.scalar)

    builder.create_dot = create_dot
