"""The compiled CPU kernels: plain C libraries, called through ctypes.

They are built with the package if there is a C compiler (``kernels/cpu/c``, OpenMP; no Python or
torch headers), once for each instruction set of ``ISAS`` that the compiler supports. The first set,
``baseline``, runs on any processor. The best library that this processor supports is used; the
environment variable ``TURRET_ISA`` sets an upper limit. Without a compiler, or with
``TURRET_NATIVE=0``, the torch formulations of ``kernels/*.py`` are used, which are slower and give
the same results within rounding.

The libraries use OpenMP's symbols of the process, so that they share torch's thread pool: with a
second pool, every parallel region would sleep at its barrier. In a thread where torch does not use
the pool, the library can use its own threads (``use_own_threads``).
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import threading
from pathlib import Path
from typing import Any

from turret.kernels.cpu.isas import ISAS, NATIVE, NO_NATIVE
from turret.lazy_torch import torch

_log = logging.getLogger(__name__)

_REBUILD = "if the source is newer than they are, install turret again (make setup in a checkout)"

_pointer, _int, _double = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
_SIGNATURES = {
    "turret_adapt": (_pointer, _pointer, _pointer, _int, _pointer, _int, _pointer),
    "turret_input_change": (
        *(_pointer, _int, _int, _pointer, _int),
        *(_pointer, _pointer, _int, _double, _pointer),
    ),
    **dict.fromkeys(
        ("turret_nf4_product", "turret_mxfp4_product"),
        (
            *(_pointer, _int, _int, _pointer, _pointer, _pointer),
            *(_int, _int, _int, _pointer, _int),
        ),
    ),
    **dict.fromkeys(
        ("turret_nf4_experts", "turret_mxfp4_experts"),
        (*(_pointer, _int, _pointer, _int, _pointer, _pointer), *(_int,) * 3),
    ),
    "turret_nf4_pack": (_pointer, _pointer, _int, _int, _int),
    "turret_nf4_quantize": (*(_pointer,) * 4, _int, _int),
    "turret_low_rank_gradients": (_pointer, _int, _int),
    "turret_nf4_transposed_product": (
        *(_pointer, _int, _int, *(_pointer,) * 3),
        *(*(_int,) * 3, _pointer),
    ),
    "turret_transposed_product": (
        *(_pointer, _int, _int, _pointer, _pointer),
        *(*(_int,) * 3, _pointer),
    ),
    "turret_log_softmax": (*(_pointer,) * 3, *(_int,) * 3),
    "turret_log_sums": (_pointer, _pointer, *(_int,) * 3),
    "turret_logit_gradients": (*(_pointer,) * 4, *(_int,) * 3),
    "turret_adapt_experts": (_pointer, _pointer),
    "turret_dense_product": (_pointer, _int, _int, _pointer, _pointer, *(_int,) * 4, _pointer),
    "turret_own_threads": (_int,),
    "turret_sparse_steps": (_pointer, _pointer, _int),
    "turret_sparse_fill": (*(_pointer,) * 3, _int, *(_pointer,) * 6),
    "turret_layers": (_pointer, _pointer),
    "turret_choose_experts": (_pointer, *(_int,) * 3, _pointer, _pointer),
    "turret_ahead": (_pointer, *(_int,) * 4, _pointer, _int),
    "turret_dots": (_pointer,),
    "turret_columns": (_pointer,),
    "turret_exp_f32": (_pointer, _int),
    "turret_screen": (
        *(_pointer, _pointer, _int, _int, _double),
        *(_pointer, _pointer, _int, _int),
    ),
    "turret_screen_bytes": (_int,) * 3,
    "turret_screen_codes": (*(_pointer, _int, _int), *(_pointer,) * 3, _int),
    "turret_token_mask": (_pointer, _int, _int, _pointer, _pointer, _int, _int),
    "turret_likeliest": (
        *(_pointer, _int, _int, _pointer, _int),
        *(_pointer, _int, _pointer),
    ),
}
# Functions with a variant for bf16 and one for fp32, which has a suffix in its name.
_BY_ELEMENT = {
    "turret_attend": (_pointer, _pointer),
    "turret_add_rms_norm": (
        *(_pointer, _pointer, _pointer, _double, _pointer),
        *(_int, _int, _int),
    ),
    "turret_silu_mul": (_pointer, _pointer, _int, _int, _int),
    "turret_gelu_mul": (_pointer, _pointer, _int, _int, _int),
    "turret_clamped_swiglu": (_pointer, _pointer, _int, _int, _double, _double, _int),
    "turret_rope_kv_write": (*(_pointer,) * 7, *(_int,) * 7),
    "turret_norm_gradient": (*(_pointer,) * 3, _double, _pointer, *(_int,) * 3),
    "turret_gate_gradient": (*(_pointer,) * 3, *(_int,) * 4),
    "turret_attention_gradient": (_pointer,),
}
# Floats per vector, as in vec.h; activations of an operator begin at multiples of this number.
LANES = 16
_BF16, _FP32 = "", "_f32"  # suffixes of function names
_COUNTS = (
    *("turret_ahead", "turret_sparse_steps", "turret_sparse_fill"),
    *("turret_screen", "turret_screen_bytes"),
)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None if they were not built or are disabled.

    Raises:
        ValueError: ``TURRET_ISA`` is not in ``ISAS``, or ``TURRET_NATIVE`` is not a boolean.
    """
    wanted = os.environ.get("TURRET_ISA") or ISAS[-1]
    if wanted not in ISAS:
        raise ValueError(f"TURRET_ISA is {wanted!r}, not one of {', '.join(ISAS)}")
    if not _is_wanted():
        return None
    for isa in reversed(usable_isas()):
        if ISAS.index(isa) <= ISAS.index(wanted):
            try:
                return load(isa)
            except (OSError, AttributeError) as error:
                _log.warning("compiled CPU kernels (%s) do not load: %s; %s", isa, error, _REBUILD)
    return None


def _is_wanted() -> bool:
    said = os.environ.get("TURRET_NATIVE") or NATIVE[0]
    if said.lower() not in (*NATIVE, *NO_NATIVE):
        known = ", ".join((*NO_NATIVE, *NATIVE))
        raise ValueError(f"TURRET_NATIVE is {said!r}, not one of {known}")
    return said.lower() in NATIVE


def usable_isas() -> tuple[str, ...]:
    """The instruction sets of this processor for which there is a library; the best one is last."""
    if path_of("baseline") is None:
        return ()
    try:
        probe = ctypes.CDLL(str(path_of("baseline"))).turret_isa
    except (OSError, AttributeError) as error:
        _log.warning(
            "the compiled CPU kernels do not load, torch serves instead: %s; %s", error, _REBUILD
        )
        return ()
    probe.restype = _int
    return tuple(isa for isa in ISAS[: probe() + 1] if path_of(isa) is not None)


def load(isa: str) -> ctypes.CDLL:
    """Load the library for one of ``usable_isas``. Code for any other set may crash the process."""
    library = ctypes.CDLL(str(path_of(isa)))
    by_element = {
        name + suffix: arguments
        for name, arguments in _BY_ELEMENT.items()
        for suffix in (_BF16, _FP32)
    }
    for name, arguments in {**_SIGNATURES, **by_element}.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = _int if name in _COUNTS else None
    library.isa = isa  # type: ignore[attr-defined]
    return library


def path_of(isa: str) -> Path | None:
    """The library for an instruction set, or None if it was not built."""
    name = "_native" if isa == "baseline" else f"_native_{isa}"
    found = sorted(Path(__file__).parent.glob(f"{name}.*so"))
    return found[0] if found else None


def isa() -> str | None:
    """The instruction set of the library in use, or None."""
    found = library()
    return None if found is None else str(found.isa)


def has_kernels(device: torch.device) -> bool:
    """Whether there are compiled kernels for tensors on a device."""
    return device.type == "cpu" and library() is not None


def has_native(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the compiled kernels compute with tensors of this kind, adapters included."""
    return dtype == torch.bfloat16 and has_kernels(device)


def has_layer_ops(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the compiled kernels compute the operations between a layer's products."""
    return dtype in (torch.bfloat16, torch.float32) and has_kernels(device)


def by_element(name: str, dtype: torch.dtype) -> Any:
    """The variant of a function for activations of this dtype."""
    return getattr(functions(), name + (_BF16 if dtype == torch.bfloat16 else _FP32))


def functions() -> ctypes.CDLL:
    """The compiled kernels; call this function only if ``library`` does not return None."""
    found = library()
    assert found is not None, "the compiled CPU kernels are not there"
    return found


# The threads that compute a kernel called from this thread: their number and their team.

_local = threading.local()


def use_own_threads() -> None:
    """Have this thread's kernels computed by the library's own threads from now on (team.c).

    The number is that of torch's threads on this thread. From then on, torch must compute on this
    thread only, because two teams would compete for the processors.
    """
    _local.count = torch.get_num_threads()
    functions().turret_own_threads(1)


def num_threads() -> int:
    """Number of threads for a kernel that this thread calls, including itself."""
    return getattr(_local, "count", 0) or torch.get_num_threads()
