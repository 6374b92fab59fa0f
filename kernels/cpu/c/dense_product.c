/* y = W x for bf16 weights in their own layout, [out, in]: the head and modules that are not quantised. A library
 * would first copy W into another layout in every call.
 *
 * Tiles (dense_tiles.h) are used if the weight's shape allows. Otherwise each output is a sum of pairs of
 * inputs, first in each lane in the order of the inputs, and then over the lanes as sum_each adds them. So the
 * bits do not depend on how many rows or outputs are computed together. Blocks are 4 rows by 4 outputs. Without
 * instructions for bf16, products.c computes the same product as fp32 sums.
 */
#include "tiles.h"

#if HAS_AVX512_BF16
#include "team.h"

#define SIDE 4
#define STEP 32 /* inputs at a time: 16 pairs */
#define CHUNK 64 /* outputs of one piece of work, for all rows */
#define ROW_BLOCK 64 /* rows that stay in the cache during a piece of work */

typedef struct {
    const bf16 *x, *w;
    bf16 *y;
    const bf16 *transposed; /* see transpose_rows */
    int64_t x_stride, y_stride, rows, out_features, in_features;
} Product;

#if HAS_TILES
#include "dense_tiles.h"
#endif

/* Computes outputs [out, out + count) for rows [row, row + rows); count is at most SIDE. */
INLINE void multiply(const Product *p, int64_t row, const int rows, int64_t out,
                                 int64_t count) {
    const bf16 *x = p->x + row * p->x_stride, *w[SIDE];
    int64_t n = p->in_features, tail = n % STEP;
    __m512 s[SIDE * SIDE];
    /* Missing outputs repeat the last one. */
    for (int c = 0; c < SIDE; c++) w[c] = p->w + (out + (c < count ? c : count - 1)) * n;
    for (int i = 0; i < SIDE * SIDE; i++) s[i] = _mm512_setzero_ps();
    for (int64_t k = 0; k < n; k += STEP) {
        __mmask32 mask = k + STEP <= n ? 0xffffffffu : (1u << tail) - 1;
        __m512bh column[SIDE];
        for (int c = 0; c < SIDE; c++) {
            __builtin_prefetch(w[c] + k + SIDE * n, 0, 2);
            column[c] = (__m512bh)_mm512_maskz_loadu_epi16(mask, w[c] + k);
        }
        for (int r = 0; r < rows; r++) {
            __m512bh v = (__m512bh)_mm512_maskz_loadu_epi16(mask, x + r * p->x_stride + k);
            for (int c = 0; c < SIDE; c++)
                s[r * SIDE + c] = _mm512_dpbf16_ps(s[r * SIDE + c], v, column[c]);
        }
    }
    f32x16 sums[LANES];
    for (int i = 0; i < LANES; i++) sums[i] = (f32x16)s[i];
    bf16 found[LANES];
    store_bf16(found, sum_each(sums));
    bf16 *y = p->y + row * p->y_stride + out;
    for (int r = 0; r < rows; r++, y += p->y_stride)
        if (count == SIDE)
            memcpy(y, found + r * SIDE, SIDE * sizeof(bf16));
        else
            memcpy(y, found + r * SIDE, count * sizeof(bf16));
}

static void multiply_rows(const Product *p, int64_t row, int64_t end, int64_t low, int64_t high) {
    for (int64_t out = low; out < high; out += SIDE) {
        int64_t count = high - out < SIDE ? high - out : SIDE, r = row;
        for (; r + SIDE <= end; r += SIDE) multiply(p, r, SIDE, out, count);
        switch (end - r) {
            case 3: multiply(p, r, 3, out, count); break;
            case 2: multiply(p, r, 2, out, count); break;
            case 1: multiply(p, r, 1, out, count); break;
        }
    }
}

static void multiply_chunk(const void *job, int64_t thread, int64_t chunk) {
    const Product *p = job;
    int64_t low = chunk * CHUNK, high = low + CHUNK < p->out_features ? low + CHUNK : p->out_features;
    (void)thread;
    for (int64_t row = 0; row < p->rows; row += ROW_BLOCK)
        multiply_rows(p, row, row + ROW_BLOCK < p->rows ? row + ROW_BLOCK : p->rows, low, high);
}

/* x: [rows, in], with rows x_stride apart; w: [out, in]; y: [rows, out], with rows y_stride apart. scratch: room
 * for as many floats as x has numbers, with the rows rounded up to a multiple of 16. */
EXPORT void turret_dense_product(const bf16 *x, int64_t x_stride, int64_t rows, const bf16 *w, bf16 *y,
                                 int64_t y_stride, int64_t out_features, int64_t in_features,
                                 int64_t num_threads, float *scratch) {
    Product p = {x, w, y, (bf16 *)scratch, x_stride, y_stride, rows, out_features, in_features};
    Work *work = multiply_chunk;
#if HAS_TILES
    if (tiles_serve(&p)) {
        transpose_rows(&p, (bf16 *)scratch);
        work = multiply_chunk_of_tiles;
    }
#endif
    in_repeatable_pieces(work, &p, (out_features + CHUNK - 1) / CHUNK, num_threads);
}
#endif
