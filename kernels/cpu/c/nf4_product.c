/* y = W x for NF4 weights in bitsandbytes' packed CPU layout, with the bits of its fused product.
 *
 * For each tile of 32 outputs and each block of 64 inputs, products of bf16 pairs are summed in fp32
 * in the order of the inputs; the sum times the block's absmax is added to the output's. bitsandbytes
 * looks the codes up again for every four rows, this kernel once for all.
 *
 * Products of several rows take longer than reading the weight does. Meanwhile the adapters that are
 * read next come into the cache (ahead.h).
 */
#include "adapters/ahead.h"
#include "entries.h"

/* What a thread asks for during one product, at most `most` times; returns how often. For tests: asking
 * for the wrong memory changes no result. */
EXPORT int64_t turret_ahead(const Step *step, int64_t module, int64_t rows, int64_t part,
                            int64_t parts, Lines *lines, int64_t most) {
    Walk walk = begin_ahead(step, module, part, parts);
    int64_t n = 0;
    while (n < most && (lines[n] = next_lines(&walk, rows)).count) n++;
    end_ahead(&walk);
    return n;
}

#if HAS_AVX512_BF16
#include "team.h"

#define TILE_OUT 32 /* outputs of a tile: two vectors */
#define BLOCK 64    /* inputs of an absmax */
#define PAIRS (BLOCK / 2)
#define BLOCK_BYTES (PAIRS * TILE_OUT) /* of a tile and block, two codes a byte */
#define GROUP 8      /* rows whose sums stay in registers */
#define ROW_BLOCK 64 /* rows that codes are looked up for once */
#define DISTANCE (2 * BLOCK_BYTES) /* the weight is asked for before it is needed */

typedef struct {
    const bf16 *x;
    const uint8_t *packed; /* [out / 32, in / 2, 32]: low nibbles are outputs 0 to 15, high 16 to 31 */
    const bf16 *absmax;    /* [in / 64, out] */
    bf16 *y;
    int64_t rows, x_stride, out_features, in_features;
} Product;

/* One tile and block for the rows of a group. */
typedef struct {
    const bf16 *x;
    const uint8_t *packed;
    float *sums; /* [rows, TILE_OUT] */
    int64_t x_stride;
    __m512 scale[2];
    Lines ahead;
} Block;

enum Codes { LOOK_UP, LOOK_UP_AND_KEEP, KEPT };

/* The 16 values in bf16, twice: a byte's bit 4, which belongs to the other code, does not matter. */
static const uint16_t VALUES[32] = {
    0xbf80, 0xbf32, 0xbf06, 0xbeca, 0xbe92, 0xbe3d, 0xbdba, 0x0000,
    0x3da3, 0x3e25, 0x3e7c, 0x3ead, 0x3ee2, 0x3f10, 0x3f39, 0x3f80,
    0xbf80, 0xbf32, 0xbf06, 0xbeca, 0xbe92, 0xbe3d, 0xbdba, 0x0000,
    0x3da3, 0x3e25, 0x3e7c, 0x3ead, 0x3ee2, 0x3f10, 0x3f39, 0x3f80,
};

/* One pair of inputs for 32 outputs. */
INLINE void look_up(const uint8_t *packed, __m512i values, __m512i *w) {
    __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)packed));
    w[0] = _mm512_permutexvar_epi16(words, values);
    w[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), values);
}

INLINE __m512bh pair_of(const bf16 *x) {
    int32_t pair;
    memcpy(&pair, x, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

/* sums[r] += absmax * (W x_r). Codes are looked up while earlier products are summed, and may be kept
 * for the groups after this one in `kept`, [PAIRS, 2]. */
INLINE void add_block(const int rows, const enum Codes codes, const Block *block,
                                  __m512i *kept) {
    const __m512i values = _mm512_loadu_si512(VALUES);
    const uint8_t *packed = block->packed;
    const bf16 *x = block->x;
    const char *ahead = block->ahead.start;
    int64_t per_pair = (block->ahead.count + PAIRS - 1) / PAIRS;
    __m512 s[GROUP][2];
    for (int r = 0; r < rows; r++) s[r][0] = s[r][1] = _mm512_setzero_ps();
    for (int k = 0; k < PAIRS; k++, packed += TILE_OUT, x += 2, kept += 2) {
        __m512i w[2];
        if (codes == KEPT) {
            w[0] = kept[0], w[1] = kept[1];
        } else {
            look_up(packed, values, w);
            if (k % 2 == 0) __builtin_prefetch(packed + DISTANCE);
            for (int64_t n = 0; n < per_pair; n++, ahead += LINE) __builtin_prefetch(ahead, 0, 2); /* to L2 */
        }
        if (codes == LOOK_UP_AND_KEEP) kept[0] = w[0], kept[1] = w[1];
        for (int r = 0; r < rows; r++) {
            __m512bh v = pair_of(x + r * block->x_stride);
            for (int c = 0; c < 2; c++) s[r][c] = _mm512_dpbf16_ps(s[r][c], v, (__m512bh)w[c]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < 2; c++) {
            float *sum = block->sums + r * TILE_OUT + c * LANES;
            _mm512_storeu_ps(sum, _mm512_fmadd_ps(s[r][c], block->scale[c], _mm512_loadu_ps(sum)));
        }
}

/* The number of rows as a constant, so that the sums stay in registers. */
#define CASE(rows) \
    case rows: add_block(rows, codes, block, kept); break
#define ADD(name, kind) \
    static void name(int64_t rows, const Block *block, __m512i *kept) { \
        const enum Codes codes = kind; \
        switch (rows) { CASE(1); CASE(2); CASE(3); CASE(4); CASE(5); CASE(6); CASE(7); CASE(8); } \
    }
ADD(add_alone, LOOK_UP)
ADD(add_first, LOOK_UP_AND_KEEP)
ADD(add_later, KEPT)

INLINE __m512 widen(const bf16 *p) {
    return (__m512)_mm512_slli_epi32(
        _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
}

/* Outputs of one tile for rows [first, first + rows), at most ROW_BLOCK. */
static void multiply_tile(const Product *p, int64_t tile, int64_t first, int64_t rows,
                                      Walk *walk) {
    float sums[ROW_BLOCK * TILE_OUT] __attribute__((aligned(64)));
    __m512i kept[2 * PAIRS];
    const bf16 *absmax = p->absmax + tile * TILE_OUT, *x = p->x + first * p->x_stride;
    const uint8_t *packed = p->packed + tile * TILE_OUT * p->in_features / 2;
    /* Groups that differ by a row at most: the sums of a small one would wait for each other. */
    int64_t groups = (rows + GROUP - 1) / GROUP;
    memset(sums, 0, sizeof(float) * rows * TILE_OUT);
    for (int64_t low = 0; low < p->in_features; low += BLOCK) {
        int64_t stop = rows / groups;
        Block block = {x + low, packed, sums, p->x_stride, {widen(absmax), widen(absmax + LANES)},
                       next_lines(walk, rows)};
        if (groups == 1)
            add_alone(rows, &block, kept);
        else
            add_first(stop, &block, kept);
        for (int64_t g = 1; g < groups; g++) {
            int64_t start = stop;
            stop = rows * (g + 1) / groups;
            block.x = x + start * p->x_stride + low;
            block.sums = sums + start * TILE_OUT;
            add_later(stop - start, &block, kept);
        }
        packed += BLOCK_BYTES;
        absmax += p->out_features;
    }
    for (int64_t r = 0; r < rows; r++) {
        const float *sum = sums + r * TILE_OUT;
        __m512bh both = _mm512_cvtne2ps_pbh(_mm512_load_ps(sum + LANES), _mm512_load_ps(sum));
        _mm512_storeu_si512(p->y + (first + r) * p->out_features + tile * TILE_OUT, (__m512i)both);
    }
}

typedef struct {
    const Product *product;
    Walk *walks; /* of the threads */
    int64_t tiles, pieces;
} Job;

static void multiply_piece(const void *job, int64_t thread, int64_t piece) {
    const Job *j = job;
    const Product *p = j->product;
    Walk walk = j->walks[thread];
    for (int64_t tile = j->tiles * piece / j->pieces; tile < j->tiles * (piece + 1) / j->pieces; tile++)
        for (int64_t first = 0; first < p->rows; first += ROW_BLOCK)
            multiply_tile(p, tile, first,
                          p->rows - first < ROW_BLOCK ? p->rows - first : ROW_BLOCK,
                          &walk);
    j->walks[thread] = walk;
}

EXPORT int64_t turret_has_products(void) { return 1; }

/* y is contiguous. `step` has the adapters to ask for ahead, the next ones being those of projection
 * `module`; or is null. */
EXPORT void turret_nf4_product(const bf16 *x, int64_t x_stride, int64_t rows, const uint8_t *packed,
                               const bf16 *absmax, bf16 *y, int64_t out_features,
                               int64_t in_features, int64_t num_threads, const Step *step,
                               int64_t module) {
    Product p = {x, packed, absmax, y, rows, x_stride, out_features, in_features};
    Walk walks[MOST_THREADS];
    int64_t tiles = out_features / TILE_OUT, threads = num_threads;
    if (threads > tiles) threads = tiles;
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    for (int64_t t = 0; t < threads; t++) walks[t] = begin_ahead(step, module, t, threads);
    Job job = {&p, walks, tiles, threads * PIECES_EACH < tiles ? threads * PIECES_EACH : tiles};
    in_pieces(multiply_piece, &job, job.pieces, threads);
    for (int64_t t = 0; t < threads; t++) end_ahead(&walks[t]);
}

/* The same for rows of several weights of one shape: those of weight e, of which `weights` has the codes
 * and the maxima, are [ends[e - 1], ends[e]) of x and y. */
typedef struct {
    const bf16 *x;
    bf16 *y;
    const int64_t *ends;
    const void *const *weights;
    int64_t count, x_stride, out_features, in_features, tiles, pieces;
} Experts;

/* A share of every weight's tiles. */
static void multiply_share(const void *job, int64_t thread, int64_t piece) {
    const Experts *j = job;
    Walk walk = begin_ahead(0, 0, 0, 1);
    (void)thread;
    for (int64_t e = 0, start = 0; e < j->count; start = j->ends[e++]) {
        int64_t rows = j->ends[e] - start;
        Product p = {j->x + start * j->x_stride, j->weights[2 * e], j->weights[2 * e + 1],
                     j->y + start * j->out_features, rows, j->x_stride, j->out_features, j->in_features};
        if (!rows) continue;
        for (int64_t tile = j->tiles * piece / j->pieces; tile < j->tiles * (piece + 1) / j->pieces; tile++)
            for (int64_t first = 0; first < rows; first += ROW_BLOCK)
                multiply_tile(&p, tile, first, rows - first < ROW_BLOCK ? rows - first : ROW_BLOCK, &walk);
    }
}

EXPORT void turret_nf4_experts(const bf16 *x, int64_t x_stride, const int64_t *ends,
                               int64_t num_experts, const void *const *weights, bf16 *y,
                               int64_t out_features, int64_t in_features, int64_t num_threads) {
    int64_t tiles = out_features / TILE_OUT, threads = num_threads;
    if (threads > tiles) threads = tiles;
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    Experts job = {x, y, ends, weights, num_experts, x_stride, out_features, in_features, tiles,
                   threads * PIECES_EACH < tiles ? threads * PIECES_EACH : tiles};
    in_pieces(multiply_share, &job, job.pieces, threads);
}
#else
EXPORT int64_t turret_has_products(void) { return 0; }
EXPORT void turret_nf4_product(void) {}
EXPORT void turret_nf4_experts(void) {}
#endif
