/* The product by multiply-adds in fp32, for processors without instructions for bf16. Products of bf16 numbers are
 * exact in fp32, and the terms of a block are added in the order of VDPBF16PS in Intel's manual: pair by pair, the
 * odd input first. Included by nf4_product.c.
 */
#define GROUP (WIDTH == 16 ? 12 : 6) /* rows whose sums stay in registers, for two vectors of outputs */
#define ROW_BLOCK 60 /* rows for which codes are looked up once */

INLINE void begin_products(int64_t rows) { (void)rows; }
INLINE void end_products(void) {}

/* Writes a block's inputs of some rows to `wide`, in fp32. */
INLINE void widen_rows(const bf16 *x, int64_t x_stride, int64_t rows, float *wide) {
    for (int64_t r = 0; r < rows; r++, x += x_stride, wide += BLOCK)
        for (int i = 0; i < BLOCK; i += WIDTH) *(fvec_at *)(wide + i) = fvec_bf16(x + i);
}

/* sums += absmax * (W x) for one row, while codes are looked up. */
INLINE void add_row(const float *x, const uint8_t *packed, const bf16 *absmax, float *sums) {
    fvec s[SIDES];
    for (int i = 0; i < SIDES; i++) s[i] = (fvec){0};
    for (int k = 0; k < PAIRS; k++, packed += TILE_OUT, x += 2) {
        Pair w;
        look_up_pair(packed, w);
        if (k % 2 == 0) __builtin_prefetch(packed + DISTANCE);
        for (int odd = 1; odd >= 0; odd--)
            for (int i = 0; i < SIDES; i++) s[i] = add_product(s[i], x[odd] - (fvec){0}, w[odd][i]);
    }
    for (int i = 0; i < SIDES; i++) {
        fvec_at *sum = (fvec_at *)(sums + i * WIDTH);
        *sum = add_product(*sum, s[i], fvec_bf16(absmax + i * WIDTH));
    }
}

/* The same for several rows and two vectors of outputs, after the codes were looked up. */
INLINE void add_rows(const int rows, const float *x, const Pair *w, const bf16 *absmax, float *sums) {
    fvec s[GROUP][2];
    for (int r = 0; r < rows; r++) s[r][0] = s[r][1] = (fvec){0};
    for (int k = 0; k < PAIRS; k++, x += 2)
        for (int odd = 1; odd >= 0; odd--) {
            fvec first = w[k][odd][0], second = w[k][odd][1];
            for (int r = 0; r < rows; r++) {
                fvec v = x[r * BLOCK + odd] - (fvec){0};
                s[r][0] = add_product(s[r][0], v, first);
                s[r][1] = add_product(s[r][1], v, second);
            }
        }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < 2; i++) {
            fvec_at *sum = (fvec_at *)(sums + r * TILE_OUT + i * WIDTH);
            *sum = add_product(*sum, s[r][i], fvec_bf16(absmax + i * WIDTH));
        }
}

/* Adds to all outputs of the tile. Dispatches on the number of rows, which must be constant so that the sums stay in
 * registers. */
static void add_group(int64_t rows, const float *x, const Pair *w, const bf16 *absmax, float *sums) {
    for (int i = 0; i < SIDES; i += 2, absmax += 2 * WIDTH, sums += 2 * WIDTH) {
        const Pair *from = (const Pair *)&(*w)[0][i]; /* begins at the first of the two vectors */
        switch (rows) {
#define CASE(rows) \
    case rows: add_rows(rows, x, from, absmax, sums); break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if WIDTH == 16
            CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
        }
    }
}

/* Computes the outputs of one tile for rows [first, first + rows), at most ROW_BLOCK. */
static void multiply_tile(const Product *p, int64_t tile, int64_t first, int64_t rows, Walk *walk) {
    float sums[ROW_BLOCK * TILE_OUT] __attribute__((aligned(64)));
    Pair w[PAIRS] __attribute__((aligned(64)));
    const bf16 *absmax = p->absmax + tile * TILE_OUT, *x = p->x + first * p->x_stride;
    const uint8_t *packed = p->packed + tile * TILE_OUT * p->in_features / 2;
    int64_t groups = (rows + GROUP - 1) / GROUP;
    memset(sums, 0, sizeof(float) * rows * TILE_OUT);
    for (int64_t b = 0; b < p->in_features / BLOCK; b++) {
        float wide[GROUP * BLOCK] __attribute__((aligned(64)));
        if (rows == 1) {
            widen_rows(x, p->x_stride, 1, wide);
            add_row(wide, packed, absmax, sums);
        } else {
            Lines ahead = next_lines(walk, rows, 2 * PAIRS);
            for (int k = 0; k < PAIRS; k++) {
                look_up_pair(packed + k * TILE_OUT, w[k]);
                for (int n = k; n < ahead.count; n += PAIRS)
                    __builtin_prefetch(ahead.start + n * LINE, 0, 2); /* to L2 */
                if (k % 2 == 0) __builtin_prefetch(packed + k * TILE_OUT + DISTANCE);
            }
            for (int64_t g = 0; g < groups; g++) {
                int64_t start = rows * g / groups, stop = rows * (g + 1) / groups;
                widen_rows(x + start * p->x_stride, p->x_stride, stop - start, wide);
                add_group(stop - start, wide, w, absmax, sums + start * TILE_OUT);
            }
        }
        packed += BLOCK_BYTES;
        absmax += p->out_features;
        x += BLOCK;
    }
    for (int64_t r = 0; r < rows; r++)
        store_row(p->y + (first + r) * p->out_features + tile * TILE_OUT, sums + r * TILE_OUT);
}
