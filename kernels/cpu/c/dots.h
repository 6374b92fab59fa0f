/* Dot products of one or four vectors with one or four rows; fp32 sums in a fixed order. */
#ifndef TURRET_DOTS_H
#define TURRET_DOTS_H

#include "vec.h"

/* Multiplies x by four rows of `a`, which are `n` apart, and prefetches the next four. */
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

#define DOT_SIDE (WIDTH == 16 ? 4 : 2) /* rows of `a` whose sums with four vectors are in registers at once */

/* dot4 for four vectors x, with the same bits. Goes through `a` once for all of them or, if sixteen lanes need
 * several registers, once per register. */
INLINE void dot_tile(const bf16 *x, int64_t x_stride, const bf16 *a, int64_t n, float *out,
                     int64_t out_stride) {
    f32x16 sums[4][4];
    float t[4][4] = {{0}};
    int64_t whole = n / LANES * LANES;
    for (int part = 0; part < PARTS; part++)
        for (int first = 0; first < 4; first += DOT_SIDE) {
            fvec s[4][DOT_SIDE];
            for (int p = 0; p < 4; p++)
                for (int q = 0; q < DOT_SIDE; q++) s[p][q] = (fvec){0};
            for (int64_t i = part * WIDTH; i < whole; i += LANES) {
                fvec row[DOT_SIDE];
                for (int q = 0; q < DOT_SIDE; q++) row[q] = fvec_bf16(a + (first + q) * n + i);
                for (int p = 0; p < 4; p++) {
                    fvec v = fvec_bf16(x + p * x_stride + i);
                    for (int q = 0; q < DOT_SIDE; q++) s[p][q] = add_product(s[p][q], v, row[q]);
                }
            }
            for (int p = 0; p < 4; p++)
                for (int q = 0; q < DOT_SIDE; q++) ((fvec_at *)&sums[p][first + q])[part] = s[p][q];
        }
    for (int64_t i = whole; i < n; i++)
        for (int p = 0; p < 4; p++) {
            float v = to_f32(x[p * x_stride + i]);
            for (int q = 0; q < 4; q++) t[p][q] += v * to_f32(a[q * n + i]);
        }
    for (int p = 0; p < 4; p++)
        for (int q = 0; q < 4; q++) out[p * out_stride + q] = sum_lanes(sums[p][q]) + t[p][q];
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
