"""The compiler flags of the C kernels, and the values of ``TURRET_NATIVE``.

``setup.py`` builds one library per instruction set with these flags, all from the same sources.
This module does not import torch.
"""

# Flags for every library.
FLAGS = (
    "-O3", "-std=gnu11", "-fopenmp", "-fvisibility=hidden", "-Wno-psabi", "-ffp-contract=fast",
    # Without this flag, GCC fuses the same `s += v * w` in one loop and not in another, and rows
    # that go through different loops would differ in their last bits.
    "--param=avoid-fma-max-bits=0",
)  # fmt: skip
_AVX512_BF16 = ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vbmi2", "-mavx512vnni")
# Flags that each instruction set adds. Each set includes the sets before it, so a processor without
# a library for its best set uses the library for an earlier one.
ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "baseline": (),
    "avx2": ("-march=x86-64-v3",),
    "avx512": ("-march=x86-64-v4",),
    "avx512_bf16": _AVX512_BF16,
    "amx": (*_AVX512_BF16, "-mamx-tile", "-mamx-bf16"),
}
ISAS = tuple(ISA_FLAGS)
# Values of TURRET_NATIVE that enable or disable the kernels, as for the server's other variables.
NATIVE, NO_NATIVE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
