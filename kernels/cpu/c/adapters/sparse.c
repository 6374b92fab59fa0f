/* Updates of a few entries of a weight, as compressed rows. */
#include "adapters.h"

/* A row's entries, summed by fours: products of bf16 are exact in fp32, so only this order counts. */
INLINE float sum_entries(const bf16 *x, const bf16 *values, const uint16_t *columns, int64_t count) {
    float sums[4] = {0};
    int64_t e = 0;
    for (; e + 4 <= count; e += 4)
        for (int q = 0; q < 4; q++) sums[q] += to_f32(x[columns[e + q]]) * to_f32(values[e + q]);
    for (int q = 0; e < count; e++, q++) sums[q] += to_f32(x[columns[e]]) * to_f32(values[e]);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

KERNEL void sparse_expand(const Sparse *s, const Rows *rows, float w, int64_t low, int64_t count) {
    for (int64_t o = 0; o < count; o++) {
        int64_t start = s->row_starts[low + o], size = s->row_starts[low + o + 1] - start;
        for (int64_t i = 0; i < rows->count; i++)
            rows->acc[i * COLUMNS + o] += w * sum_entries(rows->x + i * rows->x_stride,
                                                          s->values + start, s->columns + start, size);
    }
}
