/* Which instruction sets the processor has, by the numbers of native.py. This file is compiled for the
 * least of them: it is asked before any other code may run. */
#include "vec.h"

#if defined(__x86_64__)
#include <cpuid.h>

/* Tiles and their bf16 products, and an operating system that keeps both tile states. */
static int has_amx(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    if (!(d >> 22 & 1) || !(d >> 24 & 1)) return 0;
    __asm__("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return (a >> 17 & 3) == 3;
}

EXPORT int64_t turret_isa(void) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
        !__builtin_cpu_supports("bmi2"))
        return 0;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512cd") || !__builtin_cpu_supports("avx512dq") ||
        !__builtin_cpu_supports("avx512vl"))
        return 1;
    if (!__builtin_cpu_supports("avx512bf16")) return 2;
    return has_amx() ? 4 : 3;
}
#else
EXPORT int64_t turret_isa(void) { return 0; }
#endif
