/* The product with a bf16 weight on AMX tiles. Included by dense_product.c.
 *
 * A tile of 16 outputs and 32 inputs is loaded directly from the weight. The rows are transposed once for all
 * outputs, to [pairs of inputs, 16 rows]. Two tiles of outputs are multiplied by two tiles of rows.
 */
#define GROUP TILE_ROWS /* rows of a tile */

/* Numbers of the tiles for sums ([outputs, rows]), weights and rows. They are macros, because the number of a
 * tile is part of the instruction. */
#define SUM_00 0
#define SUM_01 1
#define SUM_10 2
#define SUM_11 3
#define W_0 4
#define W_1 5
#define X_0 6
#define X_1 7

INLINE int tiles_serve(const Product *p) {
    return p->in_features % TILE_INPUTS == 0 && p->out_features >= TILE_ROWS;
}

/* Transposes the rows for the tiles, to [rows / 16, inputs / 32, 16 pairs, 16 rows]. Missing rows are 0. */
static void transpose_rows(const Product *p, bf16 *transposed) {
    for (int64_t first = 0; first < p->rows; first += GROUP)
        for (int64_t k = 0; k < p->in_features; k += TILE_INPUTS) {
            fvec v[WIDTH];
            for (int64_t r = 0; r < GROUP; r++)
                v[r] = first + r < p->rows
                           ? load_f32((const float *)(p->x + (first + r) * p->x_stride + k))
                           : (f32x16){0};
            transpose(v);
            for (int i = 0; i < LANES; i++, transposed += TILE_INPUTS) store_f32((float *)transposed, v[i]);
        }
}

/* Stores a tile of sums, [outputs, rows]. */
INLINE void store_sums(const Product *p, const float *sums, int64_t first, int64_t out) {
    fvec v[WIDTH];
    for (int i = 0; i < LANES; i++) v[i] = load_f32(sums + i * LANES);
    transpose(v);
    for (int64_t r = 0; r < least(p->rows - first, GROUP); r++)
        store_bf16(p->y + (first + r) * p->y_stride + out, v[r]);
}

/* Computes outputs [out, out + 32) for one or two groups of rows. Missing outputs are replaced by earlier ones,
 * which are computed again. Prefetches the weights at `ahead`. */
INLINE void multiply_tiles(const Product *p, const bf16 *transposed, int64_t first, const int two, int64_t out,
                           const bf16 *ahead) {
    int64_t outs[2] = {least(out, p->out_features - TILE_ROWS),
                       least(out + TILE_ROWS, p->out_features - TILE_ROWS)};
    int64_t n = p->in_features, row_bytes = n * sizeof(bf16);
    const bf16 *w[2] = {p->w + outs[0] * n, p->w + outs[1] * n};
    const bf16 *x[2] = {transposed + first * n, transposed + (first + (two ? GROUP : 0)) * n};
    float sums[4][TILE_ROWS * LANES] __attribute__((aligned(64)));
    tile_zero(SUM_00);
    tile_zero(SUM_10);
    if (two) {
        tile_zero(SUM_01);
        tile_zero(SUM_11);
    }
    for (int64_t k = 0; k < n; k += TILE_INPUTS) {
        if (ahead)
            for (int i = 0; i < 2 * TILE_ROWS; i++, ahead += TILE_INPUTS) __builtin_prefetch(ahead, 0, 2);
        tile_load(W_0, w[0] + k, row_bytes);
        tile_load(W_1, w[1] + k, row_bytes);
        tile_load(X_0, x[0] + k * GROUP, TILE_BYTES);
        tile_add_product(SUM_00, W_0, X_0);
        tile_add_product(SUM_10, W_1, X_0);
        if (!two) continue;
        tile_load(X_1, x[1] + k * GROUP, TILE_BYTES);
        tile_add_product(SUM_01, W_0, X_1);
        tile_add_product(SUM_11, W_1, X_1);
    }
    tile_store(SUM_00, sums[0], TILE_BYTES);
    tile_store(SUM_10, sums[1], TILE_BYTES);
    store_sums(p, sums[0], first, outs[0]);
    store_sums(p, sums[1], first, outs[1]);
    if (!two) return;
    tile_store(SUM_01, sums[2], TILE_BYTES);
    tile_store(SUM_11, sums[3], TILE_BYTES);
    store_sums(p, sums[2], first + GROUP, outs[0]);
    store_sums(p, sums[3], first + GROUP, outs[1]);
}

static void multiply_chunk_of_tiles(const void *job, int64_t thread, int64_t chunk) {
    const Product *p = job;
    TileShapes shapes = tile_shapes(0, 0);
    int64_t low = chunk * CHUNK, high = least(low + CHUNK, p->out_features);
    (void)thread;
    tiles_begin(&shapes);
    for (int64_t first = 0; first < p->rows; first += 2 * GROUP)
        for (int64_t out = low; out < high; out += 2 * TILE_ROWS) {
            const bf16 *ahead = p->w + (out + 2 * TILE_ROWS) * p->in_features;
            if (first || out + 4 * TILE_ROWS > p->out_features) ahead = 0;
            if (first + GROUP < p->rows) multiply_tiles(p, p->transposed, first, 1, out, ahead);
            else multiply_tiles(p, p->transposed, first, 0, out, ahead);
        }
    tiles_end();
}
