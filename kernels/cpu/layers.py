"""All layers of a step in one call, as ``layers.c`` reads them."""

from __future__ import annotations

import ctypes

from turret.kernels.cpu.native import functions

_address, _int, _double = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double

PROJECTIONS = ("qkv", "o", "gate_up", "down")


class NativeLinear(ctypes.Structure):
    """An NF4 weight in bitsandbytes' packed CPU layout; ``bias`` may be None."""

    _fields_ = (
        *((name, _address) for name in ("packed", "absmax", "bias")),
        ("out_features", _int),
        ("in_features", _int),
    )


class NativeLayer(ctypes.Structure):
    """A layer. Norms are fp32 or None; keys and values are its part of the cache."""

    _fields_ = (
        *(
            (name, _address)
            for name in (
                *("before_attention", "after_attention", "before_mlp", "after_mlp"),
                *("q_norm", "k_norm", "keys", "values"),
            )
        ),
        ("rope", _int),
        ("window", _int),
        ("linears", NativeLinear * len(PROJECTIONS)),
    )


class NativeModel(ctypes.Structure):
    """The layers, the last norm, and what all layers have in common."""

    _fields_ = (
        ("layers", _address),
        ("norm", _address),
        *(
            (name, _int)
            for name in (
                *("num_layers", "hidden", "heads", "kv_heads", "head_dim", "block_size"),
                *("q_norm_width", "k_norm_width", "is_interleaved", "is_gelu"),
            )
        ),
        *(
            (name, _double)
            for name in ("eps", "residual_scale", "attention_scale", "attention_softcap")
        ),
    )


class NativeRope(ctypes.Structure):
    """Cosines and sines of a step's rows, ``[rows, pairs]`` fp32."""

    _fields_ = (("cos", _address), ("sin", _address), ("pairs", _int))


class NativePlace(ctypes.Structure):
    """A projection's ``ProjectionShape`` and its first module's number, to find its adapters."""

    _fields_ = (("shape", _address), ("module", _int))


class NativeInputs(ctypes.Structure):
    """The inputs of a projection that adapters change, for the rows of a step.

    ``changes`` are ``[rows, 3]`` int64: first and last number of the members that change a row's
    input, the same where none does, and 1 where each slice has its own change. ``count`` is how
    many inputs the projection has then: one for all its slices, one for each, or 0 for none.
    """

    _fields_ = (("changes", _address), ("count", _int))


class NativePass(ctypes.Structure):
    """A step: its rows, memory for intermediate results, its adapters."""

    _fields_ = (
        *(
            (name, _address)
            for name in (
                *("hidden", "out", "normed", "wide", "narrow", "delta", "q", "slots"),
                *("ropes", "plans", "adapters", "places", "inputs", "changed"),
            )
        ),
        *((name, _int) for name in ("updates", "base_low", "base_high", "rows", "threads")),
    )


def run_layers(model: NativeModel, step: NativePass) -> None:
    """Compute ``step.out`` from ``step.hidden``, and the step's keys and values."""
    functions().turret_layers(ctypes.addressof(model), ctypes.addressof(step))
