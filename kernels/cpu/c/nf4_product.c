/* y = W x for NF4 weights in bitsandbytes' packed CPU layout, and for MXFP4 weights, if mxfp4_product.c includes
 * this file.
 *
 * For each panel of 32 outputs and each block of inputs, products of bf16 numbers are summed in fp32, in
 * the same order for any number of rows. The sum times the block's absmax is added to the output. The function
 * that does this, multiply_tile, is in one of three files, which is included below:
 *
 *     nf4_tiles.h      with AMX tiles
 *     nf4_pairs.h      with VDPBF16PS, but without tiles
 *     nf4_vectors.h    without instructions for bf16
 *
 * Without tiles, computing several rows takes longer than reading the weight. The kernel uses that time to
 * prefetch the adapters that are read next (ahead.h). With tiles, or with few rows, the memory is busy anyway.
 */
#include "adapters/ahead.h"
#include "entries.h"

#ifdef __aarch64__
#include <arm_neon.h>
#endif

#ifdef MXFP4
#define NAME(name) turret_mxfp4_##name
#define BLOCK 32 /* inputs that share an absmax (MXFP4: a power of two) */
#else
#define NAME(name) turret_nf4_##name
#define BLOCK 64

/* Lists the ranges of cache lines that a thread prefetches during one product, at most `most`, and returns their
 * number. Only tests call this function: prefetching the wrong memory would change no result. */
EXPORT int64_t turret_ahead(const Step *step, int64_t module, int64_t rows, int64_t part,
                            int64_t parts, Lines *lines, int64_t most) {
    Walk walk = begin_ahead(step, module, part, parts);
    int64_t n = 0;
    while (n < most && (lines[n] = next_lines(&walk, rows, BLOCK)).count) n++;
    end_ahead(&walk);
    return n;
}

#endif

#include "team.h"
#include "tiles.h"
#ifndef MXFP4
#include "transposed.h"
#endif

#define TILE_OUT 32 /* outputs of a tile of codes: two vectors */
#define PAIRS (BLOCK / 2)
#define SIDES (TILE_OUT / WIDTH) /* vectors of a tile's outputs */
#define BLOCK_BYTES (PAIRS * TILE_OUT) /* bytes of a tile and block; two codes a byte */
#define DISTANCE 2048 /* bytes: how far ahead the weight is prefetched */

typedef struct {
    const bf16 *x;
    const uint8_t *packed; /* [out / 32, in / 2, 32]: low nibbles are outputs 0 to 15, high 16 to 31 */
    const bf16 *absmax;    /* [in / BLOCK, out] */
    bf16 *y;
    int64_t rows, x_stride, out_features, in_features;
} Product;

/* The 16 values in bf16. They are repeated, so that the lookup may include bit 4 of a byte, which belongs to the
 * other code. */
#define TWICE(...) {__VA_ARGS__, __VA_ARGS__}
#ifdef MXFP4
/* E2M1: a sign, two bits of exponent, one bit of mantissa. */
static const uint16_t VALUES[32] = TWICE(
    0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0,
    0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0);
#else
static const uint16_t VALUES[32] = TWICE(
    0xbf80, 0xbf32, 0xbf06, 0xbeca, 0xbe92, 0xbe3d, 0xbdba, 0x0000,
    0x3da3, 0x3e25, 0x3e7c, 0x3ead, 0x3ee2, 0x3f10, 0x3f39, 0x3f80);
#endif

/* The weights of one pair of inputs for 32 outputs: those of the even input, then those of the odd input. */
typedef fvec Pair[2][SIDES];

#if WIDTH == 16
/* Looks up the weights of a pair of inputs. A lane of w has the weights of both inputs for one output. */
INLINE void look_up(const uint8_t *packed, __m512i values, __m512i *w) {
    __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)packed));
    w[0] = _mm512_permutexvar_epi16(words, values);
    w[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), values);
}

INLINE void look_up_pair(const uint8_t *packed, Pair w) {
    const __m512i values = _mm512_loadu_si512(VALUES);
    __m512i both[2];
    look_up(packed, values, both);
    for (int i = 0; i < SIDES; i++) {
        w[0][i] = (fvec)((uvec)both[i] << 16);
        w[1][i] = (fvec)((uvec)both[i] & 0xffff0000u);
    }
}
#elif WIDTH == 8 || defined(__aarch64__)
typedef uint8_t bytes __attribute__((vector_size(4 * WIDTH), may_alias));
typedef uint8_t bytes_at __attribute__((vector_size(4 * WIDTH), aligned(1), may_alias)); /* in memory */

/* The bytes of a table of 16 at the given places, which are below 16. */
INLINE bytes pick_bytes(const uint8_t *table, bytes places) {
#if WIDTH == 8
    return (bytes)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(*(const __m128i_u *)table), (__m256i)places);
#else
    return (bytes)vqtbl1q_u8(vld1q_u8(table), (uint8x16_t)places);
#endif
}

INLINE void look_up_pair(const uint8_t *packed, Pair w) {
    uint8_t low[16], high[16];
    for (int i = 0; i < 16; i++) low[i] = (uint8_t)VALUES[i], high[i] = VALUES[i] >> 8;
    for (int q = 0; q < TILE_OUT / (int)sizeof(bytes); q++) {
        bytes codes = *(const bytes_at *)(packed + q * sizeof(bytes));
#if WIDTH == 8 /* instructions that join two registers work on halves; this puts outputs in order again */
        codes = (bytes)_mm256_permute4x64_epi64((__m256i)codes, 0xd8);
#endif
        for (int half = 0; half < 2; half++) {
            bytes places = half ? (bytes)(codes >> 4) : (bytes)(codes & 15);
            bytes lows = pick_bytes(low, places), highs = pick_bytes(high, places);
#if WIDTH == 8
            uvec joined[2] = {(uvec)_mm256_unpacklo_epi8((__m256i)lows, (__m256i)highs),
                              (uvec)_mm256_unpackhi_epi8((__m256i)lows, (__m256i)highs)};
#else
            uvec joined[2] = {
                (uvec)PICK(lows, highs, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
                (uvec)PICK(lows, highs, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)};
#endif
            for (int i = 0; i < 2; i++) {
                int side = half * SIDES / 2 + 2 * q + i;
                w[0][side] = (fvec)(joined[i] << 16);
                w[1][side] = (fvec)(joined[i] & 0xffff0000u);
            }
        }
    }
}
#else
INLINE void look_up_pair(const uint8_t *packed, Pair w) {
    for (int odd = 0; odd < 2; odd++)
        for (int i = 0; i < SIDES; i++) {
            const uint8_t *codes = packed + i % (SIDES / 2) * WIDTH * 2 + odd;
            uvec found = {0};
            for (int n = 0; n < WIDTH; n++) found[n] = VALUES[codes[2 * n] >> (i < SIDES / 2 ? 0 : 4) & 15];
            w[odd][i] = (fvec)(found << 16);
        }
}
#endif

#if HAS_AVX512_BF16
INLINE __m512 widen(const bf16 *p) {
    return (__m512)_mm512_slli_epi32(
        _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
}

INLINE void store_row(bf16 *y, const float *sum) {
    __m512bh both = _mm512_cvtne2ps_pbh(_mm512_load_ps(sum + LANES), _mm512_load_ps(sum));
    _mm512_storeu_si512(y, (__m512i)both);
}

#if HAS_TILES
#include "nf4_tiles.h"
#else
#include "nf4_pairs.h"
#endif
#else
INLINE void store_row(bf16 *y, const float *sum) {
    store_bf16(y, load_f32(sum));
    store_bf16(y + LANES, load_f32(sum + LANES));
}
#include "nf4_vectors.h"
#endif

/* Bytes of weights that stay in the L2 cache while all rows are multiplied by them. */
#define KEPT_BYTES (256 << 10)

/* Computes the outputs of tiles [low, high) for all rows. The rows are divided into blocks that differ by at most one
 * row. The inputs of a block stay in the L2 cache, too, while they are multiplied by several tiles. */
static void multiply_tiles(const Product *p, int64_t low, int64_t high, Walk *walk) {
    int64_t most = KEPT_BYTES / (TILE_OUT * p->in_features / 2) + 1, blocks = (p->rows + ROW_BLOCK - 1) / ROW_BLOCK;
    for (; low < high; low += most)
        for (int64_t b = 0; b < blocks; b++) {
            int64_t first = p->rows * b / blocks, end = p->rows * (b + 1) / blocks;
            for (int64_t tile = low; tile < least(low + most, high); tile++)
                multiply_tile(p, tile, first, end - first, walk);
        }
}

typedef struct {
    const Product *product;
    Walk *walks; /* one per thread */
    int64_t tiles, pieces;
} Job;

static void multiply_piece(const void *job, int64_t thread, int64_t piece) {
    const Job *j = job;
    const Product *p = j->product;
    Walk walk = j->walks[thread];
    begin_products(p->rows);
    multiply_tiles(p, j->tiles * piece / j->pieces, j->tiles * (piece + 1) / j->pieces, &walk);
    end_products();
    j->walks[thread] = walk;
}

/* y is contiguous. `step` contains the adapters to prefetch, starting with those of projection `module`. It may
 * be null. */
EXPORT void NAME(product)(const bf16 *x, int64_t x_stride, int64_t rows, const uint8_t *packed,
                          const bf16 *absmax, bf16 *y, int64_t out_features, int64_t in_features,
                          int64_t num_threads, const Step *step, int64_t module) {
    Product p = {x, packed, absmax, y, rows, x_stride, out_features, in_features};
    Walk walks[MOST_THREADS];
    int64_t tiles = out_features / TILE_OUT, threads = num_threads;
    if (threads > tiles) threads = tiles;
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    for (int64_t t = 0; t < threads; t++) walks[t] = begin_ahead(step, module, t, threads);
    Job job = {&p, walks, tiles, threads * PIECES_EACH < tiles ? threads * PIECES_EACH : tiles};
    in_repeatable_pieces(multiply_piece, &job, job.pieces, threads);
    for (int64_t t = 0; t < threads; t++) end_ahead(&walks[t]);
}

/* The same product with several weights of one shape. `weights` has the codes and absmax of each. Rows
 * [ends[e - 1], ends[e]) of x and y belong to weight e. */
typedef struct {
    const bf16 *x;
    bf16 *y;
    const int64_t *ends;
    const void *const *weights;
    int64_t count, x_stride, out_features, in_features, tiles, pieces;
} Experts;

/* Multiplies by one share of every weight's tiles. */
static void multiply_share(const void *job, int64_t thread, int64_t piece) {
    const Experts *j = job;
    Walk walk = begin_ahead(0, 0, 0, 1);
    (void)thread;
    for (int64_t e = 0, start = 0; e < j->count; start = j->ends[e++]) {
        int64_t rows = j->ends[e] - start;
        Product p = {j->x + start * j->x_stride, j->weights[2 * e], j->weights[2 * e + 1],
                     j->y + start * j->out_features, rows, j->x_stride, j->out_features, j->in_features};
        if (!rows) continue;
        begin_products(rows);
        multiply_tiles(&p, j->tiles * piece / j->pieces, j->tiles * (piece + 1) / j->pieces, &walk);
    }
    end_products();
}

EXPORT void NAME(experts)(const bf16 *x, int64_t x_stride, const int64_t *ends, int64_t num_experts,
                          const void *const *weights, bf16 *y, int64_t out_features,
                          int64_t in_features, int64_t num_threads) {
    int64_t tiles = out_features / TILE_OUT, threads = num_threads;
    if (threads > tiles) threads = tiles;
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    Experts job = {x, y, ends, weights, num_experts, x_stride, out_features, in_features, tiles,
                   threads * PIECES_EACH < tiles ? threads * PIECES_EACH : tiles};
    in_repeatable_pieces(multiply_share, &job, job.pieces, threads);
}

#ifndef MXFP4
/* The product in which each slice of the outputs has its own input: x is [slices, rows, in]. shape: as in
 * turret_adapt; widths are multiples of TILE_OUT. */
typedef struct {
    Job job;
    const int64_t *shape;
} Slices;

static void multiply_slices(const void *job, int64_t thread, int64_t piece) {
    const Slices *s = job;
    const Job *j = &s->job;
    const int64_t *widths = s->shape + 3;
    Product p = *j->product;
    Walk walk = j->walks[thread];
    int64_t end = *widths / TILE_OUT;
    begin_products(p.rows);
    for (int64_t tile = j->tiles * piece / j->pieces; tile < j->tiles * (piece + 1) / j->pieces; tile++) {
        for (; tile >= end; end += *++widths / TILE_OUT) p.x += p.rows * p.x_stride;
        multiply_tiles(&p, tile, tile + 1, &walk);
    }
    end_products();
    j->walks[thread] = walk;
}

EXPORT void turret_nf4_slices(const bf16 *x, int64_t rows, const uint8_t *packed, const bf16 *absmax,
                              bf16 *y, int64_t out_features, int64_t in_features,
                              int64_t num_threads, const Step *step, const int64_t *shape) {
    Product p = {x, packed, absmax, y, rows, in_features, out_features, in_features};
    Walk walks[MOST_THREADS];
    int64_t tiles = out_features / TILE_OUT, threads = least(least(num_threads, tiles), MOST_THREADS);
    for (int64_t t = 0; t < threads; t++) walks[t] = begin_ahead(step, shape[2], t, threads);
    Slices job = {{&p, walks, tiles, least(threads * PIECES_EACH, tiles)}, shape};
    in_repeatable_pieces(multiply_slices, &job, job.job.pieces, threads);
    for (int64_t t = 0; t < threads; t++) end_ahead(&walks[t]);
}

/* dX = dY W; see transposed.h. */

struct Source {
    const uint8_t *packed;
    const bf16 *absmax;
};

#if HAS_AVX512_BF16
/* Joins the weights of two outputs, as join_outputs does, after multiplying by their scales. */
INLINE void join_scaled(const fvec *w, float scale, float next_scale, Numbers to) {
    static const uint16_t places[2 * LANES] __attribute__((aligned(64))) = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                           8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    for (int odd = 0; odd < 2; odd++) {
        uint32_t shift = odd ? 0 : 16;
        fvec x = (fvec)((uvec)w[0] << shift & 0xffff0000u) * scale;
        fvec y = (fvec)((uvec)w[1] << shift & 0xffff0000u) * next_scale;
        __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x);
        _mm512_store_si512(to + odd, _mm512_permutexvar_epi16(_mm512_load_si512(places), both));
    }
}
#endif

static void write_weights(const Transposed *t, int64_t panel, int64_t first, int64_t count, Numbers *to) {
    const uint8_t *packed = t->source->packed + first * t->in_features / 2 + panel * PANEL / 2 * TILE_OUT;
    const bf16 *absmax = t->source->absmax + panel * PANEL / BLOCK * t->out_features + first;
    int64_t tile_bytes = TILE_OUT * t->in_features / 2;
    for (int64_t o = 0; o < count; o += TILE_OUT, packed += tile_bytes, absmax += TILE_OUT) {
        for (int i = 0; i < PANEL / 2 * TILE_OUT; i += LINE) __builtin_prefetch(packed + tile_bytes + i);
#if HAS_AVX512_BF16
        const __m512i values = _mm512_loadu_si512(VALUES);
        fvec w[2][LANES];
        for (int k = 0; k < PANEL / 2; k++) {
            __m512i both[2];
            look_up(packed + k * TILE_OUT, values, both);
            w[0][k] = (fvec)both[0], w[1][k] = (fvec)both[1];
        }
        for (int half = 0; half < 2; half++) {
            transpose(w[half]); /* to [outputs, pairs of inputs] */
            const bf16 *scale = absmax + half * LANES;
            for (int i = 0; i < LANES; i += 2)
                join_scaled(w[half] + i, to_f32(scale[i]), to_f32(scale[i + 1]), *to++);
        }
#else
        float numbers[PANEL][TILE_OUT] __attribute__((aligned(64)));
        for (int k = 0; k < PANEL / 2; k++) {
            Pair pair;
            look_up_pair(packed + k * TILE_OUT, pair);
            for (int odd = 0; odd < 2; odd++)
                for (int i = 0; i < SIDES; i++)
                    *(fvec *)(numbers[2 * k + odd] + i * WIDTH) = pair[odd][i] * fvec_bf16(absmax + i * WIDTH);
        }
        for (int i = 0; i < TILE_OUT; i += WIDTH)
            for (int k = 0; k < PANEL; k += WIDTH) {
                fvec w[WIDTH];
                for (int j = 0; j < WIDTH; j++) w[j] = fvec_f32(numbers[k + j] + i);
                transpose(w);
                for (int j = 0; j < WIDTH; j++) *(fvec_at *)(to[i + j] + k) = w[j];
            }
        to += TILE_OUT;
#endif
    }
}

EXPORT void turret_nf4_transposed_product(const void *grad, int64_t is_rounded, int64_t rows, const uint8_t *packed, const bf16 *absmax,
                                          float *dx, int64_t out_features, int64_t in_features, int64_t num_threads,
                                          bf16 *scratch) {
    Source source = {packed, absmax};
    multiply_transposed(&source, grad, is_rounded, rows, dx, out_features, in_features, num_threads, scratch);
}
#endif
