/* Low-rank updates: B (A x). */
#include "adapters.h"
#include "dots.h"

KERNEL void low_rank_shrink(const Module *m, const Rows *rows, int64_t in_features, int64_t r) {
    const bf16 *a = m->a + r * in_features, *x = rows->x;
    float *v = rows->v + r;
    int64_t i = 0;
    if (r + RANKS <= m->rank) {
        for (; i + TILE <= rows->count; i += TILE, x += TILE * rows->x_stride, v += TILE * rows->v_stride)
            dot_tile(x, rows->x_stride, a, in_features, v, rows->v_stride);
        for (; i < rows->count; i++, x += rows->x_stride, v += rows->v_stride)
            dot4(x, a, in_features, v);
        return;
    }
    for (; i < rows->count; i++, x += rows->x_stride, v += rows->v_stride)
        for (int64_t q = 0; r + q < m->rank; q++)
            dot1(x, a + q * in_features, in_features, v + q);
}

/* A constant number of rows and of vectors of columns, so that the sums stay in registers; brings as
 * many columns after them into the cache. */
INLINE void add_tile(const Rows *rows, const bf16 *b, float w, int64_t rank, int64_t stride,
                     int64_t low, const int count, const int vectors) {
    f32x16 s[count][vectors];
    float *acc = rows->acc + low;
    for (int i = 0; i < count; i++)
        for (int j = 0; j < vectors; j++) s[i][j] = load_f32(acc + i * COLUMNS + j * LANES);
    for (int64_t r = 0; r < rank; r++, b += stride) {
        for (int j = 0; j < vectors; j += 2) __builtin_prefetch(b + (vectors + j) * LANES);
        for (int j = 0; j < vectors; j++) {
            f32x16 column = load_bf16(b + j * LANES);
            for (int i = 0; i < count; i++) s[i][j] += w * rows->v[i * rows->v_stride + r] * column;
        }
    }
    for (int i = 0; i < count; i++)
        for (int j = 0; j < vectors; j++) store_f32(acc + i * COLUMNS + j * LANES, s[i][j]);
}

KERNEL void low_rank_expand(const Module *m, const Rows *rows, float w, int64_t width, int64_t low,
                            int64_t count) {
    const bf16 *b = m->b + low;
    int64_t rank = m->rank, o = 0;
    if (rows->count == TILE) {
        for (; o + 4 * LANES <= count; o += 4 * LANES)
            add_tile(rows, b + o, w, rank, width, o, TILE, 4);
        for (; o + LANES <= count; o += LANES) add_tile(rows, b + o, w, rank, width, o, TILE, 1);
    } else if (count == COLUMNS) {
        add_tile(rows, b, w, rank, width, 0, 1, COLUMN_VECTORS);
        return;
    } else {
        for (; o + 4 * LANES <= count; o += 4 * LANES)
            add_tile(rows, b + o, w, rank, width, o, 1, 4);
        for (; o + LANES <= count; o += LANES) add_tile(rows, b + o, w, rank, width, o, 1, 1);
    }
    for (int64_t i = 0; o < count && i < rows->count; i++)
        for (int64_t r = 0; r < rank; r++) {
            float c = w * rows->v[i * rows->v_stride + r];
            for (int64_t n = o; n < count; n++)
                rows->acc[i * COLUMNS + n] += c * to_f32(b[r * width + n]);
        }
}
