/* Low-rank updates: B (A x). */
#include "adapters.h"
#include "dots.h"

KERNEL void low_rank_shrink(const Module *m, const bf16 *x, int64_t in_features, int64_t r,
                            float *v) {
    const bf16 *a = m->a + r * in_features;
    if (r + RANKS <= m->rank) {
        dot4(x, a, in_features, v + r);
        return;
    }
    for (; r < m->rank; r++, a += in_features) dot1(x, a, in_features, v + r);
}

/* Whole vectors; brings the next COLUMNS of B into the cache. */
INLINE void add_block(float *acc, const float *v, float w, const bf16 *b, int64_t rank,
                      int64_t stride) {
    f32x16 s[COLUMN_VECTORS];
    for (int j = 0; j < COLUMN_VECTORS; j++) s[j] = load_f32(acc + j * LANES);
    for (int64_t r = 0; r < rank; r++, b += stride) {
        float c = w * v[r];
        for (int j = 0; j < COLUMN_VECTORS; j += 2) __builtin_prefetch(b + COLUMNS + j * LANES);
        for (int j = 0; j < COLUMN_VECTORS; j++) s[j] += c * load_bf16(b + j * LANES);
    }
    for (int j = 0; j < COLUMN_VECTORS; j++) store_f32(acc + j * LANES, s[j]);
}

/* The same for the columns at a slice's end that do not fill a block. */
INLINE void add_rest(float *acc, const float *v, float w, const bf16 *b, int64_t rank,
                     int64_t stride, int64_t columns) {
    for (int64_t r = 0; r < rank; r++, b += stride) {
        float c = w * v[r];
        for (int64_t o = 0; o < columns; o++) acc[o] += c * to_f32(b[o]);
    }
}

KERNEL void low_rank_expand(const Module *m, const float *v, float w, int64_t width, int64_t low,
                            int64_t count, float *acc) {
    if (count == COLUMNS)
        add_block(acc, v, w, m->b + low, m->rank, width);
    else
        add_rest(acc, v, w, m->b + low, m->rank, width, count);
}
