/* The NF4 and MXFP4 products on AMX tiles. Included by nf4_product.c.
 *
 * The codes of a block are looked up into tiles of weights, [16 pairs of inputs, 16 outputs]. Meanwhile the
 * previous block is multiplied by one group of 16 rows after the other. A product of tiles takes as long for
 * one row as for 16. With more rows, the weights stay in their tiles for all groups, and codes are looked up
 * only once.
 */
#define ROW_BLOCK 128 /* most rows for which codes are looked up once */
#define HALVES (BLOCK / TILE_INPUTS) /* a block's groups of TILE_INPUTS: 2 for NF4, 1 for MXFP4 */

/* Numbers of the tiles: sums for either half of the outputs, x for either half of the inputs, then the weights.
 * They are macros, not an enum, because the number of a tile is part of the instruction. */
#define SUM_0 0
#define SUM_1 1
#define X_0 2
#define X_1 3
#define W_00 4
#define W_01 5
#define W_10 6
#define W_11 7

typedef __m512i Weights[2 * HALVES][TILE_ROWS]; /* [outputs / 16, inputs / 32] */

INLINE void begin_products(int64_t rows) {
    /* A tile cannot have 0 rows, even if there are none to multiply. */
    TileShapes shapes = tile_shapes(W_00, rows ? least(rows, TILE_ROWS) : 1);
    tiles_begin(&shapes);
}
INLINE void end_products(void) { tiles_end(); }

/* Looks up a block's weights and prefetches `lines`. */
INLINE void look_up_block(const uint8_t *packed, Lines lines, Weights weights) {
    const __m512i values = _mm512_loadu_si512(VALUES);
    for (int half = 0; half < HALVES; half++, packed += TILE_ROWS * TILE_OUT) {
#pragma GCC unroll 16
        for (int k = 0; k < TILE_ROWS; k++) {
            __m512i w[2];
            look_up(packed + k * TILE_OUT, values, w);
            weights[half][k] = w[0];
            weights[HALVES + half][k] = w[1];
            if (k % 2 == 0) __builtin_prefetch(packed + k * TILE_OUT + DISTANCE);
        }
    }
    const char *ahead = lines.start;
    for (int64_t n = 0; n < lines.count; n++, ahead += LINE) __builtin_prefetch(ahead, 0, 2); /* to L2 */
}

typedef float Found[2][TILE_ROWS * LANES];

/* Computes W x_r for the rows of a group. */
INLINE void multiply_group(const bf16 *x, int64_t x_stride, Found found) {
    tile_zero(SUM_0);
    tile_zero(SUM_1);
    tile_load(X_0, x, x_stride * sizeof(bf16));
    if (HALVES == 2) tile_load(X_1, x + TILE_INPUTS, x_stride * sizeof(bf16));
    tile_add_product(SUM_0, X_0, W_00);
    tile_add_product(SUM_1, X_0, W_10);
    if (HALVES == 2) {
        tile_add_product(SUM_0, X_1, W_01);
        tile_add_product(SUM_1, X_1, W_11);
    }
    tile_store(SUM_0, found[0], TILE_BYTES);
    tile_store(SUM_1, found[1], TILE_BYTES);
}

/* sums[r] += absmax * found[r] */
INLINE void add_group(Found found, int64_t skip, int64_t rows, const __m512 *scale, float *sums) {
#pragma GCC unroll 4
    for (int64_t r = skip; r < rows; r++)
        for (int c = 0; c < 2; c++) {
            float *sum = sums + r * TILE_OUT + c * LANES;
            __m512 product = _mm512_load_ps(found[c] + r * LANES);
            _mm512_store_ps(sum, _mm512_fmadd_ps(product, scale[c], _mm512_load_ps(sum)));
        }
}

/* Computes the outputs of one tile of codes for rows [first, first + rows), at most ROW_BLOCK. */
static void multiply_tile(const Product *p, int64_t tile, int64_t first, int64_t rows, Walk *walk) {
    float sums[ROW_BLOCK * TILE_OUT] __attribute__((aligned(64)));
    Weights weights[2];
    const bf16 *absmax = p->absmax + tile * TILE_OUT, *x = p->x + first * p->x_stride;
    const uint8_t *packed = p->packed + tile * TILE_OUT * p->in_features / 2;
    int64_t group = least(rows, TILE_ROWS), blocks = p->in_features / BLOCK;
    memset(sums, 0, sizeof(float) * rows * TILE_OUT);
    look_up_block(packed, next_lines(walk, rows, 2 * PAIRS), weights[0]);
    for (int64_t b = 0; b < blocks; b++) {
        const __m512i(*w)[TILE_ROWS] = weights[b % 2];
        __m512 scale[2] = {widen(absmax), widen(absmax + LANES)};
        tile_load(W_00, w[0], TILE_BYTES);
        if (HALVES == 2) tile_load(W_01, w[1], TILE_BYTES);
        tile_load(W_10, w[HALVES], TILE_BYTES);
        if (HALVES == 2) tile_load(W_11, w[HALVES + 1], TILE_BYTES);
        packed += BLOCK_BYTES;
        if (b + 1 < blocks) look_up_block(packed, next_lines(walk, rows, 2 * PAIRS), weights[(b + 1) % 2]);
        Found found[2] __attribute__((aligned(64)));
        int64_t groups = (rows + group - 1) / group;
        multiply_group(x + b * BLOCK, p->x_stride, found[0]);
        for (int64_t g = 1; g < groups; g++) {
            /* The last group ends with the last row, so it may repeat rows of the group before. */
            int64_t start = least(g * group, rows - group);
            multiply_group(x + start * p->x_stride + b * BLOCK, p->x_stride, found[g % 2]);
            add_group(found[1 - g % 2], 0, group, scale, sums + (g - 1) * group * TILE_OUT);
        }
        int64_t last = least((groups - 1) * group, rows - group);
        add_group(found[(groups - 1) % 2], (groups - 1) * group - last, group, scale, sums + last * TILE_OUT);
        absmax += p->out_features;
    }
    for (int64_t r = 0; r < rows; r++)
        store_row(p->y + (first + r) * p->out_features + tile * TILE_OUT, sums + r * TILE_OUT);
}
