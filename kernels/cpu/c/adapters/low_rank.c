/* Low-rank updates: B (A x). */
#include "adapters.h"
#include "dots.h"

#if HAS_TILES
#include "low_rank_tiles.h"
#else
void low_rank_begin(void) {}
void low_rank_end(void) {}
#endif

KERNEL void low_rank_shrink(const Module *m, const Rows *rows, const ModuleSize *size, float w, int64_t r) {
    int64_t n = size->in_features, i = 0;
    const bf16 *a = m->a + r * n, *x = rows->x;
    float *v = rows->v + r;
#if HAS_TILES
    if (low_rank_takes_tiles(size)) {
        shrink_by_tiles(m, rows, n, w, r);
        return;
    }
#endif
    if (r + RANKS <= m->rank) {
        for (; i + TILE <= rows->count; i += TILE)
            dot_tile(x + i * rows->x_stride, rows->x_stride, a, n, v + i * rows->v_stride, rows->v_stride);
        for (; i < rows->count; i++) dot4(x + i * rows->x_stride, a, n, v + i * rows->v_stride);
    } else {
        for (; i < rows->count; i++)
            for (int64_t q = 0; r + q < m->rank; q++)
                dot1(x + i * rows->x_stride, a + q * n, n, v + i * rows->v_stride + q);
    }
    for (i = 0; i < rows->count; i++)
        for (int64_t q = 0; q < least(m->rank - r, RANKS); q++) v[i * rows->v_stride + q] *= w;
}

/* The numbers of rows and of vectors of columns are constants, so that the sums stay in registers. If there are too few
 * registers, only some of the vectors are computed at a time. Also prefetches the same number of the next columns. */
INLINE void add_tile(const Rows *rows, const bf16 *b, int64_t rank, int64_t stride, int64_t low,
                     const int count, const int vectors) {
    const int every = vectors * PARTS, most = WIDTH == 16 ? every : count == 1 ? 8 : 2;
    const int some = every < most ? every : most;
    for (int first = 0; first < every; first += some) {
        fvec s[count][some];
        float *acc = rows->acc + low + first * WIDTH;
        const bf16 *row = b + first * WIDTH;
        for (int i = 0; i < count; i++)
            for (int j = 0; j < some; j++) s[i][j] = fvec_f32(acc + i * COLUMNS + j * WIDTH);
        for (int64_t r = 0; r < rank; r++, row += stride) {
            for (int j = 0; j < some * WIDTH; j += 2 * LANES) __builtin_prefetch(row + vectors * LANES + j);
            for (int j = 0; j < some; j++) {
                fvec column = fvec_bf16(row + j * WIDTH);
                for (int i = 0; i < count; i++)
                    s[i][j] = add_product(s[i][j], rows->v[i * rows->v_stride + r] - (fvec){0}, column);
            }
        }
        for (int i = 0; i < count; i++)
            for (int j = 0; j < some; j++) *(fvec_at *)(acc + i * COLUMNS + j * WIDTH) = s[i][j];
    }
}

/* Expands rows->count rows, which is 1 or TILE. */
INLINE void expand_rows(const Module *m, const Rows *rows, int64_t width, int64_t low, int64_t count) {
    const bf16 *b = m->b + low;
    int64_t rank = m->rank, o = 0;
    if (rows->count == TILE) {
        for (; o + 4 * LANES <= count; o += 4 * LANES) add_tile(rows, b + o, rank, width, o, TILE, 4);
        for (; o + LANES <= count; o += LANES) add_tile(rows, b + o, rank, width, o, TILE, 1);
    } else if (count == COLUMNS) {
        add_tile(rows, b, rank, width, 0, 1, COLUMN_VECTORS);
        return;
    } else {
        for (; o + 4 * LANES <= count; o += 4 * LANES) add_tile(rows, b + o, rank, width, o, 1, 4);
        for (; o + LANES <= count; o += LANES) add_tile(rows, b + o, rank, width, o, 1, 1);
    }
    for (int64_t i = 0; o < count && i < rows->count; i++)
        for (int64_t r = 0; r < rank; r++) {
            float c = rows->v[i * rows->v_stride + r];
            for (int64_t n = o; n < count; n++) rows->acc[i * COLUMNS + n] += c * to_f32(b[r * width + n]);
        }
}

KERNEL void low_rank_expand(const Module *m, const Rows *rows, const ModuleSize *size, int64_t low,
                            int64_t count) {
#if HAS_TILES
    if (low_rank_takes_tiles(size)) {
        expand_by_tiles(m, rows, size->out_features, low, count);
        return;
    }
#endif
    for (int64_t i = 0, step; i < rows->count; i += step) {
        step = i + TILE <= rows->count ? TILE : 1;
        Rows part = *rows;
        part.v += i * rows->v_stride;
        part.acc += i * COLUMNS;
        part.count = step;
        expand_rows(m, &part, size->out_features, low, count);
    }
}

/* A[r, i] is 1 if i mod rank = r, so v_r = w (x_r + x_(rank + r) + ..), added in this order. */
KERNEL void pieces_shrink(const bf16 *x, const ModuleSize *size, int64_t rank, float w, float *v) {
    int64_t n = size->in_features;
    for (int64_t r = 0; r < rank; r += LANES) {
        f32x16 sums = {0};
        int64_t i = r;
        if (r + LANES <= rank)
            for (; i + LANES <= n; i += rank) sums += load_bf16(x + i);
        /* The rest of the last piece, or everything if the rank ends within this vector. */
        for (; i < n; i += rank)
            for (int64_t q = 0; q < least(least(rank - r, n - i), LANES); q++) sums[q] += to_f32(x[i + q]);
#if HAS_TILES
        if (low_rank_takes_tiles(size)) {
            store_pairs(v + r, sums * w);
            continue;
        }
#endif
        store_f32(v + r, sums * w);
    }
}
