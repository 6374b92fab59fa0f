/* Updates of a few entries of a weight, as compressed rows. */
#include "adapters.h"

#define AHEAD 1024 /* entries: the memory's latency, at what a thread reads in it */

/* sums += x[columns[e]] * values[e], lane by lane, for at most LANES entries; the other lanes are left. */
INLINE f32x16 add_entries(f32x16 sums, const float *x, const bf16 *values, const uint16_t *columns,
                          int64_t count) {
#if HAS_AVX512_BF16
    __mmask16 some = (__mmask16)(0xffffu >> (LANES - count));
    __m512i places = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, columns));
    __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, values));
    __m512 found = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), some, places, x, sizeof *x);
    return sums + (f32x16)found * (f32x16)_mm512_slli_epi32(bits, 16);
#else
    f32x16 found = {0}, factors = {0};
    for (int64_t e = 0; e < count; e++) {
        found[e] = x[columns[e]];
        factors[e] = to_f32(values[e]);
    }
    return sums + found * factors;
#endif
}

INLINE float sum_entries(const float *x, const bf16 *values, const uint16_t *columns, int64_t count) {
    f32x16 sums = {0};
    int64_t e = 0;
    for (; e + LANES <= count; e += LANES) {
        __builtin_prefetch(values + e + AHEAD, 0, 2);
        __builtin_prefetch(columns + e + AHEAD, 0, 2);
        sums = add_entries(sums, x, values + e, columns + e, LANES);
    }
    if (e < count) sums = add_entries(sums, x, values + e, columns + e, count - e);
    return sum_lanes(sums);
}

KERNEL void sparse_expand(const Sparse *s, const Rows *rows, float w, int64_t in_features, int64_t low,
                          int64_t count) {
    float x[in_features];
    for (int64_t i = 0; i < rows->count; i++) {
        const bf16 *row = rows->x + i * rows->x_stride;
        for (int64_t c = 0; c < in_features; c++) x[c] = to_f32(row[c]);
        for (int64_t o = 0; o < count; o++) {
            int64_t start = s->row_starts[low + o], size = s->row_starts[low + o + 1] - start;
            rows->acc[i * COLUMNS + o] += w * sum_entries(x, s->values + start, s->columns + start, size);
        }
    }
}
