/* The product by VDPBF16PS, with the same bits as bitsandbytes' fused product: pairs are added in the order of the
 * inputs. bitsandbytes looks the codes up again for every four rows; this kernel looks them up once for many.
 * Included by nf4_product.c.
 */
#define GROUP 8      /* rows whose sums stay in registers */
#define ROW_BLOCK 64 /* rows for which codes are looked up once */

INLINE void begin_products(int64_t rows) { (void)rows; }
INLINE void end_products(void) {}

/* The product of one tile and block with the rows of a group. */
typedef struct {
    const bf16 *x;
    const uint8_t *packed;
    float *sums; /* [rows, TILE_OUT] */
    int64_t x_stride;
    __m512 scale[2];
    Lines ahead;
} Block;

/* KEPT prefetches no factors (ahead.h): testing for them makes a product of many rows 1% slower. */
enum Codes { LOOK_UP, LOOK_UP_AND_KEEP, KEPT_AND_AHEAD, KEPT };

INLINE __m512bh pair_of(const bf16 *x) {
    int32_t pair;
    memcpy(&pair, x, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

/* sums[r] += absmax * (W x_r). Codes are looked up while earlier products are summed. `codes` selects whether the
 * weights are stored in `kept`, [PAIRS, 2], for the next groups, or read from it. */
INLINE void add_block(const int rows, const enum Codes codes, const Block *block,
                                  __m512i *kept) {
    const __m512i values = _mm512_loadu_si512(VALUES);
    const uint8_t *packed = block->packed;
    const bf16 *x = block->x;
    __m512 s[GROUP][2];
    for (int r = 0; r < rows; r++) s[r][0] = s[r][1] = _mm512_setzero_ps();
    /* With two pointers, the rows' offsets fit into registers. */
    const bf16 *later = x + GROUP / 2 * block->x_stride;
    for (int k = 0; k < PAIRS; k++, packed += TILE_OUT, x += 2, later += 2, kept += 2) {
        __m512i w[2];
        if (codes >= KEPT_AND_AHEAD) {
            w[0] = kept[0], w[1] = kept[1];
        } else {
            look_up(packed, values, w);
            if (k % 2 == 0) __builtin_prefetch(packed + DISTANCE);
        }
        /* Prefetch one line per pair: many at once would delay the reads of this block's weights. */
        if (codes != KEPT && k < block->ahead.count)
            __builtin_prefetch(block->ahead.start + k * LINE, 0, 2); /* to L2 */
        if (codes == LOOK_UP_AND_KEEP) kept[0] = w[0], kept[1] = w[1];
        if (codes == KEPT && k < rows) { /* the inputs of the next block */
            const bf16 *next = block->x + k * block->x_stride + BLOCK;
            __builtin_prefetch(next);
            __builtin_prefetch(next + BLOCK / 2);
        }
        for (int r = 0; r < rows; r++) {
            __m512bh v = pair_of(r < GROUP / 2 ? x + r * block->x_stride : later + (r - GROUP / 2) * block->x_stride);
            for (int c = 0; c < 2; c++) s[r][c] = _mm512_dpbf16_ps(s[r][c], v, (__m512bh)w[c]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < 2; c++) {
            float *sum = block->sums + r * TILE_OUT + c * LANES;
            _mm512_storeu_ps(sum, _mm512_fmadd_ps(s[r][c], block->scale[c], _mm512_loadu_ps(sum)));
        }
}

/* Dispatches on the number of rows, which must be constant so that the sums stay in registers. */
#define CASE(rows) \
    case rows: add_block(rows, codes, block, kept); break
#define ADD(name, kind) \
    static void name(int64_t rows, const Block *block, __m512i *kept) { \
        const enum Codes codes = kind; \
        switch (rows) { CASE(1); CASE(2); CASE(3); CASE(4); CASE(5); CASE(6); CASE(7); CASE(8); } \
    }
ADD(add_alone, LOOK_UP)
ADD(add_first, LOOK_UP_AND_KEEP)
ADD(add_later_ahead, KEPT_AND_AHEAD)
ADD(add_later, KEPT)

/* Computes the outputs of one tile for rows [first, first + rows), at most ROW_BLOCK. */
static void multiply_tile(const Product *p, int64_t tile, int64_t first, int64_t rows,
                                      Walk *walk) {
    float sums[ROW_BLOCK * TILE_OUT] __attribute__((aligned(64)));
    __m512i kept[2 * PAIRS];
    const bf16 *absmax = p->absmax + tile * TILE_OUT, *x = p->x + first * p->x_stride;
    const uint8_t *packed = p->packed + tile * TILE_OUT * p->in_features / 2;
    /* Groups differ by at most one row: in a much smaller group, the few sums would wait for each other. */
    int64_t groups = (rows + GROUP - 1) / GROUP;
    memset(sums, 0, sizeof(float) * rows * TILE_OUT);
    /* Each row's results go to a different page. Stores that miss the cache would delay the next tile. */
    for (int64_t r = 0; r < rows; r++) __builtin_prefetch(p->y + (first + r) * p->out_features + tile * TILE_OUT, 1);
    for (int64_t low = 0; low < p->in_features; low += BLOCK) {
        int64_t stop = rows / groups;
        Block block = {x + low, packed, sums, p->x_stride, {widen(absmax), widen(absmax + LANES)},
                       next_lines(walk, rows, PAIRS)};
        if (groups == 1)
            add_alone(rows, &block, kept);
        else
            add_first(stop, &block, kept);
        for (int64_t g = 1; g < groups; g++) {
            int64_t start = stop;
            stop = rows * (g + 1) / groups;
            block.x = x + start * p->x_stride + low;
            block.sums = sums + start * TILE_OUT;
            block.ahead = next_lines(walk, rows, PAIRS);
            (block.ahead.count ? add_later_ahead : add_later)(stop - start, &block, kept);
        }
        packed += BLOCK_BYTES;
        absmax += p->out_features;
    }
    for (int64_t r = 0; r < rows; r++)
        store_row(p->y + (first + r) * p->out_features + tile * TILE_OUT, sums + r * TILE_OUT);
}
