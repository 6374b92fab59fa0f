"""The instruction sets of x86-64 that kernels are compiled for; known before torch is loaded."""

# Each has all that those before it have. For those without a library of their own, the one before
# serves. x86-64-v1 or the like, -v3, -v4, -v4 with AVX512-BF16, VBMI2, VNNI, that with AMX.
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
