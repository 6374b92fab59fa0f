"""The compiled CPU kernels: a plain C library, called through ctypes.

Built with the package where there is a C compiler (``kernels/cpu/*.c``, OpenMP; no Python or torch
headers). Without it, or with ``TURRET_NATIVE=0`` in the environment, the torch formulations of
``kernels/*.py`` serve: the same results within rounding, slower.

The library leaves OpenMP's symbols to the process, so it shares torch's thread pool: a second pool
would make every parallel region sleep at its barrier.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from pathlib import Path

import torch

_log = logging.getLogger(__name__)

_pointer, _int, _double = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
_SIGNATURES = {
    "turret_adapt": (_pointer, _pointer, _pointer, _int, _pointer, _int, _pointer),
    "turret_input_gain": (
        *(_pointer, _int, _int, _pointer, _int),
        *(_pointer, _pointer, _int, _double, _pointer),
    ),
    "turret_nf4_product": (
        *(_pointer, _int, _int, _pointer, _pointer, _pointer),
        *(_int, _int, _int, _pointer, _int),
    ),
    "turret_dense_product": (_pointer, _int, _int, _pointer, _pointer, _int, _int, _int),
    "turret_has_products": (),
    "turret_ahead": (_pointer, *(_int,) * 4, _pointer, _int),
    "turret_attend": (_pointer, _pointer),
    "turret_add_rms_norm": (
        *(_pointer, _pointer, _pointer, _double, _pointer),
        *(_int, _int, _int),
    ),
    "turret_silu_mul": (_pointer, _pointer, _int, _int, _int),
    "turret_rope_kv_write": (*(_pointer,) * 7, *(_int,) * 5),
}
_COUNTS = ("turret_has_products", "turret_ahead")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they were not built or are switched off."""
    if os.environ.get("TURRET_NATIVE", "1") == "0":
        return None
    found = sorted(Path(__file__).parent.glob("_native*.so"))
    if not found:
        return None
    try:
        library = ctypes.CDLL(str(found[0]))
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes = arguments
            function.restype = _int if name in _COUNTS else None
    except (OSError, AttributeError) as error:
        _log.warning("the compiled CPU kernels do not load, torch serves instead: %s", error)
        return None
    return library


def has_native(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the compiled kernels serve tensors of this kind."""
    return device.type == "cpu" and dtype == torch.bfloat16 and library() is not None


def has_native_products() -> bool:
    """Whether the compiled products of bf16 rows serve, which need AVX512-BF16."""
    found = library()
    return found is not None and bool(found.turret_has_products())


def functions() -> ctypes.CDLL:
    """The compiled kernels; call it only where ``has_native``."""
    found = library()
    assert found is not None, "the compiled CPU kernels are not there"
    return found
