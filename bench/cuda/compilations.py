"""Kernels in the forms that their wrappers launch, compiled for GPUs that this machine lacks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

# Use the compiler instead of the interpreter, regardless of the caller's environment.
os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
# Options that wrappers choose on AMD devices, where ``Tuning`` differs.
_ON_HIP = {
    "paged_attention_kernel": {"num_stages": 3},
    "nf4_matmul_kernel": {"num_stages": 3},
    "nf4_rotate_kernel": {"num_stages": 3},
    "nf4_shrink_kernel": {"num_stages": 3},
    "nf4_experts_kernel": {"num_stages": 3},
}
_POINTER = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.uint16: "*u16",
}


@dataclass(frozen=True)
class Compilation:
    """One kernel, with all properties on which the compiler specialises."""

    function: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: frozenset[str]
    options: tuple[tuple[str, Any], ...]

    def name(self) -> str:
        """A readable name of the kernel and this form of it."""
        shown = [f"{k}={v}" for k, v in self.constants if v is not None]
        absent = [k.removesuffix("_ptr") for k, v in self.constants if v is None]
        shown += [f"no {','.join(absent)}"] if absent else []
        divisible = [k for k, kind in self.signature if kind[0] == "i" and k in self.aligned]
        shown += [f"16 | {','.join(divisible)}"] if divisible else []
        odd = [k for k, kind in self.signature if kind[0] == "*" and k not in self.aligned]
        shown += [f"odd {','.join(odd)}"] if odd else []
        return f"{self.function.__name__.removesuffix('_kernel')}[{'; '.join(shown)}]"

    def compile(self, target: GPUTarget) -> Any:
        """Compile for a target."""
        names = self.function.arg_names
        constants, signature = dict(self.constants), dict(self.signature)
        options = dict(self.options)
        if target.backend == "hip":
            options.update(_ON_HIP.get(self.function.__name__, {}))
            if "codes_ptr" in signature:
                signature["codes_ptr"] = "*fp32"  # the values themselves (``codes_on``)
        source = ASTSource(
            fn=self.function,
            signature={**signature, **dict.fromkeys(constants, "constexpr")},
            constexprs={(names.index(k),): v for k, v in constants.items()},
            # Sort, because the compiler's cache identifies a form by this text.
            attrs={(names.index(k),): [["tt.divisibility", 16]] for k in sorted(self.aligned)},
        )
        return triton.compile(source, target=target, options=options)


def bound(function: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
    """Values of a kernel's parameters by name."""
    values = dict(zip(function.arg_names, args, strict=False))
    values.update({k: v for k, v in keywords.items() if k in function.arg_names})
    return values


def record(function: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> Compilation:
    """Record the arguments as Triton's launcher would specialise them."""
    values = bound(function, args, keywords)
    signature, constants, aligned = [], [], set()
    for parameter in function.params:
        name, value = parameter.name, values[parameter.name]
        special = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and value == 1):
            constants.append((name, value))
        elif isinstance(value, torch.Tensor):
            signature.append((name, _POINTER[value.dtype]))
            if value.storage_offset() * value.itemsize % 16 == 0:
                aligned.add(name)
        elif isinstance(value, int):
            signature.append((name, "i32" if abs(value) < 1 << 31 else "i64"))
            if special and value % 16 == 0:
                aligned.add(name)
        else:
            signature.append((name, "fp32"))
    options = tuple((k, keywords[k]) for k in _OPTIONS if k in keywords)
    return Compilation(function, tuple(signature), tuple(constants), frozenset(aligned), options)


def recorded(launches: Iterable[Callable[[], object]]) -> list[Compilation]:
    """Every distinct compilation for the launches, sorted by name."""
    found: dict[Compilation, None] = {}

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        found[record(self, args, keywords)] = None

    original = JITFunction.run
    JITFunction.run = run
    try:
        for launch in launches:
            launch()
    finally:
        JITFunction.run = original
    return sorted(found, key=Compilation.name)
