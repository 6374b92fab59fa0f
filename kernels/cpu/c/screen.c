/* Finds which outputs of a bf16 weight may be the largest of a row, from an 8-bit copy of the weight, which
 * has half as many bytes.
 *
 * A weight is approximated by its output's scale times a code of at most 127. The errors of an output's weights
 * change the output by at most |x| |errors| (Cauchy and Schwarz), about 0.01 of |x| |w|. If an output is below
 * another one by more than the sum of both bounds, it cannot be the largest. The caller computes the few
 * remaining outputs from the weight itself, so it finds the largest of all, for any input.
 *
 * Sums are of integers and therefore exact. The bounds include the rounding errors of floats, here and in the
 * product with the weight itself.
 */
#include "team.h"
#include "vec.h"

#ifdef __AVX2__
#include <immintrin.h>
#include <math.h>

#define TILE 32  /* outputs of a tile of codes */
#define PIECE 8  /* tiles of one piece of work */
#define GROUP 8  /* rows whose sums stay in registers */
#define TOP 127  /* the largest code */
#define STEPS 32767 /* the largest integer that represents a number of a row */
#define FLOAT_ERROR 0x1p-22 /* relative error of a number after two or three roundings */
#define TOO_SMALL 1e-30f /* smaller weights count as 0 */

typedef struct {
    const int8_t *codes;  /* [tiles, in / 2, TILE, 2]; missing outputs repeat the last one */
    const float *scales;  /* [tiles, TILE]: a weight is about its code times its output's scale */
    int64_t out_features, in_features;
    double spread; /* upper bound of |w - scale * codes|, per unit of an output's scale */
    double length; /* upper bound of |w| + |w - scale * codes| */
} Screen;

typedef struct {
    const bf16 *weight; /* [out, in] */
    int8_t *codes;
    float *scales;
    double *facts; /* [tiles, 2]: the tile's spread and length */
    int64_t out_features, in_features;
} Codes;

#define TOGETHER 8 /* weights that are rounded at a time */
typedef double f64x8 __attribute__((vector_size(64)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef uint16_t u16x8 __attribute__((vector_size(16), aligned(2), may_alias));

static void round_tile(const void *job, int64_t thread, int64_t tile) {
    const Codes *j = job;
    int64_t n = j->in_features;
    double *spread = j->facts + 2 * tile, *length = spread + 1;
    (void)thread;
    *spread = *length = 0;
    for (int64_t i = 0; i < TILE; i++) {
        const bf16 *w = j->weight + least(tile * TILE + i, j->out_features - 1) * n;
        int8_t *codes = j->codes + tile * TILE * n + 2 * i;
        bf16 most = 0; /* without signs, bf16 numbers have the order of their bits */
        for (int64_t k = 0; k < n; k++) {
            bf16 size = w[k] & 0x7fff;
            most = size > most ? size : most;
        }
        if (most >= 0x7f80) { /* infinity or NaN */
            *length = INFINITY;
            return;
        }
        float scale = to_f32(most) < TOO_SMALL ? 0 : to_f32(most) / TOP, per_code = scale > 0 ? 1 / scale : 0;
        f64x8 all = {0}, off = {0};
        for (int64_t k = 0; k < n; k += TOGETHER) {
            f32x8 value = (f32x8)(__builtin_convertvector(*(const u16x8 *)(w + k), u32x8) << 16);
            f32x8 code = (value * per_code + 0x1.8p23f) - 0x1.8p23f; /* the nearest integer */
            f64x8 exact = __builtin_convertvector(value, f64x8);
            f64x8 rest = exact - (double)scale * __builtin_convertvector(code, f64x8);
            all += exact * exact;
            off += rest * rest;
            for (int l = 0; l < TOGETHER; l++) codes[(k + l) / 2 * 2 * TILE + l % 2] = (int8_t)code[l];
        }
        double squares = 0, errors = 0;
        for (int l = 0; l < TOGETHER; l++) squares += all[l], errors += off[l];
        j->scales[tile * TILE + i] = scale;
        if (scale > 0) *spread = fmax(*spread, sqrt(errors) / scale);
        *length = fmax(*length, sqrt(squares) + sqrt(errors));
    }
}

/* Computes the 8-bit copy. in_features is a multiple of 8. NaN and infinities make a tile's length infinite, and
 * leave its codes and scales undefined. */
EXPORT void turret_screen_codes(const bf16 *weight, int64_t out_features, int64_t in_features, int8_t *codes,
                                float *scales, double *facts, int64_t threads) {
    Codes job = {weight, codes, scales, facts, out_features, in_features};
    in_pieces(round_tile, &job, (out_features + TILE - 1) / TILE, threads);
}

/* A row as pairs of integers. Each integer times `unit` approximates the row's number. */
typedef struct {
    const int32_t *pairs; /* [in / 2] */
    float unit;
    float per_scale; /* error of a sum, per unit of an output's scale */
    float always;    /* error that is the same for every output */
} Row;

/* Rounds a row to integers; returns whether all of its numbers are finite. */
static int round_row(const Screen *s, const bf16 *x, int32_t *pairs, Row *row) {
    int64_t n = s->in_features;
    double most = 0, sum = 0, all = 0, off = 0;
    for (int64_t k = 0; k < n; k++) {
        double size = fabs((double)to_f32(x[k]));
        most = size > most ? size : most;
        sum += size;
        all += size * size;
    }
    if (!(all <= 1e30)) return 0;
    /* With this unit, no sum of codes times integers overflows 32 bits. */
    double unit = fmax(most / STEPS, TOP * sum / (0x1p31 - 1 - 64 * (double)n));
    double per_unit = unit > 0 ? 1 / unit : 0;
    for (int64_t k = 0; k < n; k += 2) {
        int16_t pair[2];
        for (int i = 0; i < 2; i++) {
            double value = to_f32(x[k + i]), steps = rint(value * per_unit), rest = value - unit * steps;
            pair[i] = (int16_t)steps;
            off += rest * rest;
        }
        memcpy(pairs + k / 2, pair, sizeof pair);
    }
    double size = sqrt(all) * 1.0001, rest = sqrt(off) * 1.0001;
    /* The head's own product has float errors as well: a sum of n terms, each rounded twice. */
    double floats = size * (n * 0x1p-23 + 4 * FLOAT_ERROR) * s->length;
    *row = (Row){pairs, (float)unit, (float)(size * s->spread * 1.001),
                 (float)(1.001 * (rest * s->length + floats + size * n * TOO_SMALL))};
    return 1;
}

/* sums += codes * pair, for 16 outputs. */
INLINE i32x16 add_pair(i32x16 sums, const int8_t *codes, int32_t pair) {
#ifdef __AVX512VNNI__
    __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)codes));
    return (i32x16)_mm512_dpwssd_epi32((__m512i)sums, wide, _mm512_set1_epi32(pair));
#elif defined(__AVX512BW__)
    __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)codes));
    return sums + (i32x16)_mm512_madd_epi16(wide, _mm512_set1_epi32(pair));
#else
    __m256i products[2];
    for (int i = 0; i < 2; i++) {
        __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)codes + i));
        products[i] = _mm256_madd_epi16(wide, _mm256_set1_epi32(pair));
    }
    i32x16 both;
    memcpy(&both, products, sizeof both);
    return sums + both;
#endif
}

typedef struct {
    const Screen *screen;
    const Row *rows;
    float *found; /* [rows, tiles, TILE]: approximate logits */
    float *least, *most; /* [pieces, rows]: a piece's largest lower and upper bounds */
    int64_t num_rows, tiles;
} Job;

/* Computes one tile for `rows` rows. Even and odd pairs are summed separately, so that the sums do not
 * wait for each other. */
INLINE void sum_tile(const Job *j, int64_t tile, int64_t first, const int rows, float *lows, float *highs) {
    const Screen *s = j->screen;
    const int parts = rows > 4 ? 1 : 2;
    int64_t pairs = s->in_features / 2;
    const int8_t *codes = s->codes + tile * TILE * s->in_features;
    const Row *row = j->rows + first;
    i32x16 sums[GROUP][2][2];
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < 4; i++) sums[r][i / 2][i % 2] = (i32x16){0};
    for (int64_t k = 0; k < pairs; k += parts)
        for (int part = 0; part < parts && k + part < pairs; part++, codes += 2 * TILE) {
            __builtin_prefetch(codes + 2 * TILE * 32, 0, 2);
            for (int r = 0; r < rows; r++) {
                int32_t pair = row[r].pairs[k + part];
                for (int half = 0; half < 2; half++)
                    sums[r][half][part] = add_pair(sums[r][half][part], codes + half * TILE, pair);
            }
        }
    for (int r = 0; r < rows; r++)
        for (int half = 0; half < 2; half++) {
            int64_t at = tile * TILE + half * LANES;
            f32x16 scale = load_f32(s->scales + at), error = scale * row[r].per_scale;
            i32x16 sum = sums[r][half][0];
            if (parts == 2) sum += sums[r][half][1];
            f32x16 value = __builtin_convertvector(sum, f32x16) * (scale * row[r].unit);
            store_f32(j->found + (first + r) * j->tiles * TILE + at, value);
            store_f32(lows + r * LANES, max_vec(load_f32(lows + r * LANES), value - error));
            store_f32(highs + r * LANES, max_vec(load_f32(highs + r * LANES), value + error));
        }
}

#define CASE(rows) case rows: sum_tile(j, tile, first, rows, lows, highs); break
KERNEL static void sum_piece(const void *job, int64_t thread, int64_t piece) {
    const Job *j = job;
    int64_t end = least((piece + 1) * PIECE, j->tiles);
    (void)thread;
    for (int64_t first = 0; first < j->num_rows; first += GROUP) {
        int64_t rows = least(GROUP, j->num_rows - first);
        float lows[GROUP * LANES], highs[GROUP * LANES];
        for (int i = 0; i < GROUP * LANES; i++) lows[i] = highs[i] = -INFINITY;
        for (int64_t tile = piece * PIECE; tile < end; tile++)
            switch (rows) {
                CASE(1); CASE(2); CASE(3); CASE(4); CASE(5); CASE(6); CASE(7); CASE(8);
            }
        for (int64_t r = 0; r < rows; r++) {
            float low = -INFINITY, high = -INFINITY;
            for (int i = 0; i < LANES; i++) {
                low = fmaxf(low, lows[r * LANES + i]);
                high = fmaxf(high, highs[r * LANES + i]);
            }
            j->least[piece * j->num_rows + first + r] = low;
            j->most[piece * j->num_rows + first + r] = high;
        }
    }
}

/* The value that an output's upper bound must reach. Upper and lower bounds do not include the error `always`, so it
 * is subtracted here, once for each of the two. */
static float threshold(const Job *j, int64_t pieces, int64_t row, double slack) {
    float best = -INFINITY;
    for (int64_t p = 0; p < pieces; p++) best = fmaxf(best, j->least[p * j->num_rows + row]);
    /* Logits are rounded to bf16, so a logit that is smaller by a 128th may round to the same value. */
    return best - fabsf(best) * 0x1.01p-7f - 2 * j->rows[row].always - (float)slack;
}

/* Lists, in order, every output that may be the largest of some row, or smaller than that by at most `slack`.
 * Returns their number, or -1 if there are more than `most` or a row is not finite. x: [rows, in], with rows
 * x_stride apart. memory: scratch of turret_screen_bytes() bytes. */
EXPORT int64_t turret_screen(const Screen *screen, const bf16 *x, int64_t x_stride, int64_t num_rows,
                             double slack, char *memory, int64_t *outputs, int64_t most,
                             int64_t threads) {
    int64_t tiles = (screen->out_features + TILE - 1) / TILE, pieces = (tiles + PIECE - 1) / PIECE;
    Row *rows = (Row *)memory;
    float *found = (float *)(rows + num_rows), *low = found + num_rows * tiles * TILE;
    float *high = low + pieces * num_rows, *limits = high + pieces * num_rows;
    int32_t *pairs = (int32_t *)(limits + num_rows);
    for (int64_t r = 0; r < num_rows; r++)
        if (!round_row(screen, x + r * x_stride, pairs + r * screen->in_features / 2, &rows[r])) return -1;
    Job job = {screen, rows, found, low, high, num_rows, tiles};
    in_repeatable_pieces(sum_piece, &job, pieces, screen->out_features * screen->in_features > SMALL ? threads : 1);
    for (int64_t r = 0; r < num_rows; r++) limits[r] = threshold(&job, pieces, r, slack);
    int64_t count = 0;
    for (int64_t p = 0; p < pieces; p++) {
        int is_near = 0;
        for (int64_t r = 0; r < num_rows; r++) is_near |= high[p * num_rows + r] >= limits[r];
        if (!is_near) continue;
        int64_t end = least((p + 1) * PIECE * TILE, screen->out_features);
        for (int64_t o = p * PIECE * TILE; o < end; o++) {
            int may_be = 0;
            for (int64_t r = 0; r < num_rows; r++)
                may_be |= found[r * tiles * TILE + o] + screen->scales[o] * rows[r].per_scale >= limits[r];
            if (!may_be) continue;
            if (count == most) return -1;
            outputs[count++] = o;
        }
    }
    return count;
}

EXPORT int64_t turret_screen_bytes(int64_t out_features, int64_t in_features, int64_t num_rows) {
    int64_t tiles = (out_features + TILE - 1) / TILE, pieces = (tiles + PIECE - 1) / PIECE;
    int64_t floats = tiles * TILE + 2 * pieces + 1;
    return num_rows * (int64_t)(sizeof(Row) + sizeof(float) * floats + 2 * in_features);
}
#else
EXPORT void turret_screen_codes(void) {}
EXPORT int64_t turret_screen(void) { return -1; }
EXPORT int64_t turret_screen_bytes(void) { return 0; }
#endif
