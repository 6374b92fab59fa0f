/* Updates by a whole matrix D. The dot products are computed as those of the A of a low-rank
 * update, then weighted and added. */
#include "adapters.h"
#include "dots.h"

/* Handles at most TILE rows. */
INLINE void expand_rows(const Dense *d, const Rows *rows, float w, int64_t low, int64_t count) {
    int64_t n = d->in_features, o = 0;
    float found[TILE * RANKS];
    for (; o < count; o += RANKS) {
        const bf16 *weight = d->weight + (low + o) * n;
        int64_t columns = count - o < RANKS ? count - o : RANKS;
        if (columns == RANKS && rows->count == TILE)
            dot_tile(rows->x, rows->x_stride, weight, n, found, RANKS);
        else
            for (int64_t i = 0; i < rows->count; i++) {
                const bf16 *x = rows->x + i * rows->x_stride;
                if (columns == RANKS)
                    dot4(x, weight, n, found + i * RANKS);
                else
                    for (int64_t c = 0; c < columns; c++)
                        dot1(x, weight + c * n, n, found + i * RANKS + c);
            }
        for (int64_t i = 0; i < rows->count; i++)
            for (int64_t c = 0; c < columns; c++)
                rows->acc[i * COLUMNS + o + c] += w * found[i * RANKS + c];
    }
}

KERNEL void dense_expand(const Dense *d, const Rows *rows, float w, int64_t low, int64_t count) {
    for (int64_t i = 0; i < rows->count; i += TILE) {
        Rows part = *rows;
        part.x += i * rows->x_stride;
        part.acc += i * COLUMNS;
        part.count = least(rows->count - i, TILE);
        expand_rows(d, &part, w, low, count);
    }
}
