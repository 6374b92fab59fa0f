"""What may be said of the compiled kernels; known before torch is loaded.

``ISAS`` are the instruction sets of x86-64 that they are compiled for.
"""

# Each has all that those before it have. For those without a library of their own, the one before
# serves. x86-64-v1 or the like, -v3, -v4, -v4 with AVX512-BF16, VBMI2, VNNI, that with AMX.
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
# What TURRET_NATIVE may be, as the server's own variables have it: whether they serve at all.
NATIVE, NO_NATIVE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
