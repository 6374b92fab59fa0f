/* Dot products of one vector with four rows, or one; fp32 sums in a fixed order. */
#ifndef TURRET_DOTS_H
#define TURRET_DOTS_H

#include "vec.h"

/* Four rows of `a`, `n` apart; brings the four after them into the cache meanwhile. */
INLINE void dot4(const bf16 *x, const bf16 *a, int64_t n, float *out) {
    f32x16 s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
    const bf16 *a1 = a + n, *a2 = a + 2 * n, *a3 = a + 3 * n;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        f32x16 v = load_bf16(x + i);
        if (i % (2 * LANES) == 0)
            for (int q = 4; q < 8; q++) __builtin_prefetch(a + q * n + i);
        s0 += v * load_bf16(a + i);
        s1 += v * load_bf16(a1 + i);
        s2 += v * load_bf16(a2 + i);
        s3 += v * load_bf16(a3 + i);
    }
    float t0 = 0, t1 = 0, t2 = 0, t3 = 0;
    for (; i < n; i++) {
        float v = to_f32(x[i]);
        t0 += v * to_f32(a[i]);
        t1 += v * to_f32(a1[i]);
        t2 += v * to_f32(a2[i]);
        t3 += v * to_f32(a3[i]);
    }
    out[0] = sum_lanes(s0) + t0;
    out[1] = sum_lanes(s1) + t1;
    out[2] = sum_lanes(s2) + t2;
    out[3] = sum_lanes(s3) + t3;
}

INLINE void dot1(const bf16 *x, const bf16 *a, int64_t n, float *out) {
    f32x16 s = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) s += load_bf16(x + i) * load_bf16(a + i);
    float t = 0;
    for (; i < n; i++) t += to_f32(x[i]) * to_f32(a[i]);
    out[0] = sum_lanes(s) + t;
}

#endif
