/* dX = dY W: the gradient of x in y = W x, summed in fp32.
 *
 * A piece of work is a panel of 32 inputs. The weights of some outputs are written into the cache as numbers, once for
 * all rows. dY is rounded to bf16. With instructions for bf16, the weights are rounded to bf16, too. Outputs are then
 * added in pairs, and the sums of even inputs are stored before those of odd inputs until the last outputs are added.
 * The order of a sum does not depend on the number of rows. The including file defines Source and write_weights.
 */
#ifndef TURRET_TRANSPOSED_H
#define TURRET_TRANSPOSED_H

#include "team.h"
#include "tiles.h"

#define PANEL 32 /* inputs */

#if HAS_AVX512_BF16
typedef __m512i Numbers[2]; /* weights of two outputs: those of 16 even inputs, then of 16 odd inputs */
#define OUTPUTS 2           /* of Numbers */
#define PANEL_ROWS 8        /* rows whose sums stay in registers */
#else
typedef float Numbers[PANEL]; /* weights of one output */
#define OUTPUTS 1
#define PANEL_ROWS (WIDTH == 16 ? 12 : 6)
#endif
#define MULTIPLE 32 /* outputs are padded to a multiple of this number */
#define PANEL_OUTPUTS 512 /* outputs whose weights are in the cache at once */

typedef struct Source Source;

typedef struct {
    const void *given; /* [rows, out] fp32, or bf16 if `is_rounded` */
    bf16 *grad;        /* [rows, stride] */
    float *dx;         /* [rows, in] */
    int64_t is_rounded, rows, stride, out_features, in_features;
    const Source *source;
} Transposed;

/* Writes the weights of outputs [first, first + count) and of one panel's inputs. Outputs after the last one are 0. */
static void write_weights(const Transposed *t, int64_t panel, int64_t first, int64_t count, Numbers *to);

#if HAS_AVX512_BF16
/* Joins the weights of two outputs; the even one of a pair of inputs is in the lower half of a lane. */
INLINE void join_outputs(__m512i a, __m512i b, Numbers to) {
    const __m512i high = _mm512_set1_epi32((int)0xffff0000);
    _mm512_store_si512(to, _mm512_mask_mov_epi16(_mm512_slli_epi32(b, 16), 0x55555555, a));
    _mm512_store_si512(to + 1, _mm512_or_si512(_mm512_and_si512(b, high), _mm512_srli_epi32(a, 16)));
}

/* Stores sums; the last ones in the order of the inputs. */
INLINE void store_sums(float *dx, fvec even, fvec odd, int is_last) {
    fvec_at *to = (fvec_at *)dx;
    fvec first = even, second = odd;
    if (is_last) {
        first = PICK(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        second = PICK(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
    to[0] = first, to[1] = second;
}
#endif

static void round_row(const void *job, int64_t thread, int64_t row) {
    const Transposed *t = job;
    int64_t out = t->out_features, i = 0;
    const float *from = (const float *)t->given + row * out;
    bf16 *to = t->grad + row * t->stride;
    (void)thread;
    memset(to + out, 0, (t->stride - out) * sizeof *to);
    if (t->is_rounded) {
        memcpy(to, (const bf16 *)t->given + row * out, out * sizeof *to);
        return;
    }
    for (; i + LANES <= out; i += LANES) store_bf16(to + i, load_f32(from + i));
    for (; i < out; i++) to[i] = to_bf16(from[i]);
}

#if HAS_TILES
/* Numbers of the tiles. They are macros, because the number of a tile is part of the instruction. */
#define T_EVEN 0
#define T_ODD 1
#define T_GRAD 2
#define T_W_EVEN 3
#define T_W_ODD 4

static void add_outputs(const Transposed *t, int64_t panel, int64_t first, int64_t count, const Numbers *w) {
    int64_t row_bytes = t->in_features * sizeof(float);
    for (int64_t row = 0; row < t->rows; row += TILE_ROWS) {
        int64_t rows = least(t->rows - row, TILE_ROWS);
        float *dx = t->dx + row * t->in_features + panel * PANEL;
        const bf16 *grad = t->grad + row * t->stride + first;
        if (row == 0 || rows < TILE_ROWS) {
            TileShapes shapes = tile_shapes(T_W_EVEN, rows);
            tiles_begin(&shapes);
        }
        tile_zero(T_EVEN);
        tile_zero(T_ODD);
        if (first) {
            tile_load(T_EVEN, dx, row_bytes);
            tile_load(T_ODD, dx + LANES, row_bytes);
        }
        for (int64_t o = 0; o < count; o += TILE_INPUTS) {
            tile_load(T_GRAD, grad + o, t->stride * sizeof(bf16));
            tile_load(T_W_EVEN, w[o / 2], sizeof(Numbers));
            tile_load(T_W_ODD, w[o / 2] + 1, sizeof(Numbers));
            tile_add_product(T_EVEN, T_GRAD, T_W_EVEN);
            tile_add_product(T_ODD, T_GRAD, T_W_ODD);
        }
        tile_store(T_EVEN, dx, row_bytes);
        tile_store(T_ODD, dx + LANES, row_bytes);
        for (int64_t r = 0; first + count >= t->out_features && r < rows; r++, dx += t->in_features)
            store_sums(dx, fvec_f32(dx), fvec_f32(dx + LANES), 1);
    }
    tiles_end();
}
#else
#if HAS_AVX512_BF16
INLINE void sum_rows(const int rows, const Transposed *t, const bf16 *grad, const Numbers *w, int64_t count, float *dx,
                     int is_first, int is_last) {
    __m512 s[PANEL_ROWS][2];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < 2; c++)
            s[r][c] = is_first ? _mm512_setzero_ps() : _mm512_loadu_ps(dx + r * t->in_features + c * LANES);
    for (int64_t o = 0; o < count; o += 2, w++)
        for (int r = 0; r < rows; r++) {
            int32_t pair;
            memcpy(&pair, grad + r * t->stride + o, sizeof pair);
            __m512bh v = (__m512bh)_mm512_set1_epi32(pair);
            for (int c = 0; c < 2; c++) s[r][c] = _mm512_dpbf16_ps(s[r][c], v, (__m512bh)(*w)[c]);
        }
    for (int r = 0; r < rows; r++) store_sums(dx + r * t->in_features, (fvec)s[r][0], (fvec)s[r][1], is_last);
}
#else
INLINE void sum_rows(const int rows, const Transposed *t, const bf16 *grad, const Numbers *w, int64_t count, float *dx,
                     int is_first, int is_last) {
    float wide[PANEL_ROWS][PANEL_OUTPUTS];
    (void)is_last;
    for (int r = 0; r < rows; r++)
        for (int64_t o = 0; o < count; o += LANES) store_f32(wide[r] + o, load_bf16(grad + r * t->stride + o));
    for (int i = 0; i < PANEL; i += 2 * WIDTH) {
        fvec s[PANEL_ROWS][2];
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < 2; c++)
                s[r][c] = is_first ? (fvec){0} : (fvec)fvec_f32(dx + r * t->in_features + i + c * WIDTH);
        for (int64_t o = 0; o < count; o++) {
            fvec first = fvec_f32(w[o] + i), second = fvec_f32(w[o] + i + WIDTH);
            for (int r = 0; r < rows; r++) {
                fvec v = wide[r][o] - (fvec){0};
                s[r][0] = add_product(s[r][0], v, first);
                s[r][1] = add_product(s[r][1], v, second);
            }
        }
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < 2; c++) *(fvec_at *)(dx + r * t->in_features + i + c * WIDTH) = s[r][c];
    }
}
#endif

/* Adds the products with the weights of some outputs. Groups of rows differ by at most one row, because the few sums of
 * a small group would wait for each other. */
static void add_outputs(const Transposed *t, int64_t panel, int64_t first, int64_t count, const Numbers *w) {
    int64_t groups = (t->rows + PANEL_ROWS - 1) / PANEL_ROWS;
    int is_first = first == 0, is_last = first + count >= t->out_features;
    for (int64_t g = 0; g < groups; g++) {
        int64_t row = t->rows * g / groups;
        const bf16 *grad = t->grad + row * t->stride + first;
        float *dx = t->dx + row * t->in_features + panel * PANEL;
        switch (t->rows * (g + 1) / groups - row) {
#define CASE(rows) \
    case rows: sum_rows(rows, t, grad, w, count, dx, is_first, is_last); break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if WIDTH == 16
            CASE(7) CASE(8)
#if !HAS_AVX512_BF16
            CASE(9) CASE(10) CASE(11) CASE(12)
#endif
#endif
#undef CASE
        }
    }
}
#endif

static void multiply_transposed_panel(const void *job, int64_t thread, int64_t panel) {
    const Transposed *t = job;
    Numbers numbers[PANEL_OUTPUTS / OUTPUTS] __attribute__((aligned(64)));
    (void)thread;
    for (int64_t first = 0; first < t->out_features; first += PANEL_OUTPUTS) {
        int64_t count = least(t->out_features - first, PANEL_OUTPUTS);
        count = (count + MULTIPLE - 1) / MULTIPLE * MULTIPLE;
        write_weights(t, panel, first, count, numbers);
        add_outputs(t, panel, first, count, numbers);
    }
}

/* grad: [rows, out] fp32, or bf16 if `is_rounded`. dx: [rows, in], where in is a multiple of PANEL. scratch: room for
 * [rows, out rounded up to a multiple of 32] bf16. */
INLINE void multiply_transposed(const Source *source, const void *grad, int64_t is_rounded, int64_t rows, float *dx,
                                int64_t out_features, int64_t in_features, int64_t num_threads, bf16 *scratch) {
    int64_t stride = (out_features + MULTIPLE - 1) / MULTIPLE * MULTIPLE;
    Transposed t = {grad, scratch, dx, is_rounded, rows, stride, out_features, in_features, source};
    if (rows * out_features <= SMALL / PANEL) num_threads = 1;
    if (is_rounded && stride == out_features) t.grad = (bf16 *)grad;
    else in_pieces(round_row, &t, rows, num_threads);
    in_pieces(multiply_transposed_panel, &t, in_features / PANEL, num_threads);
}

#endif
