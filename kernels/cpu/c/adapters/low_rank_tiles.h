/* Low-rank updates on AMX tiles. Factors are read from their place in memory. Included by low_rank.c.
 *
 * Shrink: for several rows, 16 ranks of A are transposed, 32 inputs at a time, and multiplied by the rows. A
 * single row is multiplied as one column, and A is loaded without a transposition. The terms of an element are
 * added in the same order either way.
 *
 * Expand: w A x is represented as the sum of two bf16 numbers, which is exact to 2^-17. The pair (high, low) is
 * multiplied by (b, b).
 */

/* Numbers of the tiles. They are macros, because the number of a tile is part of the instruction. */
#define SUM_0 0
#define SUM_1 1
#define LEFT_0 2
#define LEFT_1 3
#define RIGHT_0 4
#define RIGHT_1 5

/* The form of the tiles that this thread has set: a number of rows (at most 32); for one row, minus the number of
 * ranks; or 0 for none. Setting another form takes as long as a dozen products. */
static __thread int64_t tile_form;

INLINE void shape_tiles(int64_t form) {
    if (form == tile_form) return;
    TileShapes shapes = tile_shapes(0, 0);
    if (form < 0) {
        shapes.rows[SUM_0] = shapes.rows[LEFT_0] = shapes.rows[LEFT_1] = (uint8_t)-form;
        shapes.row_bytes[SUM_0] = sizeof(float);
        shapes.row_bytes[RIGHT_0] = shapes.row_bytes[RIGHT_1] = 2 * sizeof(bf16);
    } else {
        shapes.rows[SUM_0] = shapes.rows[LEFT_0] = (uint8_t)least(form, TILE_ROWS);
        if (form > TILE_ROWS) shapes.rows[SUM_1] = shapes.rows[LEFT_1] = (uint8_t)(form - TILE_ROWS);
    }
    tiles_begin(&shapes);
    tile_form = form;
}

/* A piece that was abandoned (team.h) has not reached low_rank_end, and its tiles may have been reset since. */
void low_rank_begin(void) { tile_form = 0; }

void low_rank_end(void) {
    if (tile_form) tiles_end();
    tile_form = 0;
}

/* Stores sixteen values as pairs of bf16 numbers, (high, low). */
INLINE void store_pairs(float *v, f32x16 value) {
    __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)value));
    __m512 rest = (__m512)(value - (f32x16)_mm512_slli_epi32(high, 16));
    __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(rest));
    _mm512_storeu_si512(v, _mm512_or_si512(high, _mm512_slli_epi32(low, 16)));
}

/* Shrinks at most 16 `ranks` of one row, with zeros up to 16. Also prefetches the same amount of the next factor. */
INLINE void shrink_row(const bf16 *a, const bf16 *x, int64_t n, int64_t ranks, float w, float *v,
                       const bf16 *next) {
    float sums[LANES] __attribute__((aligned(64))) = {0};
    int64_t row_bytes = n * sizeof(bf16), k = 0;
    shape_tiles(-ranks);
    tile_zero(SUM_0);
    for (; k + 2 * TILE_INPUTS <= n; k += 2 * TILE_INPUTS) {
        for (int64_t i = 0; next && i < 2 * ranks; i++, next += TILE_INPUTS) __builtin_prefetch(next);
        tile_load(LEFT_0, a + k, row_bytes);
        tile_load(RIGHT_0, x + k, 2 * sizeof(bf16));
        tile_add_product(SUM_0, LEFT_0, RIGHT_0);
        tile_load(LEFT_1, a + k + TILE_INPUTS, row_bytes);
        tile_load(RIGHT_1, x + k + TILE_INPUTS, 2 * sizeof(bf16));
        tile_add_product(SUM_0, LEFT_1, RIGHT_1);
    }
    if (k < n) {
        tile_load(LEFT_0, a + k, row_bytes);
        tile_load(RIGHT_0, x + k, 2 * sizeof(bf16));
        tile_add_product(SUM_0, LEFT_0, RIGHT_0);
    }
    tile_store(SUM_0, sums, sizeof(float));
    store_pairs(v, load_f32(sums) * w);
}

/* Transposes 32 inputs of `ranks` rows of A to [16 pairs, 16 ranks]. Missing inputs and ranks are 0. */
INLINE void transpose_ranks(const bf16 *a, int64_t n, int64_t ranks, bf16 *transposed) {
    fvec v[WIDTH];
    for (int r = 0; r < TILE_ROWS; r++)
        v[r] = r < ranks ? load_f32((const float *)(a + r * n)) : (f32x16){0};
    transpose(v);
    for (int i = 0; i < TILE_ROWS; i++) store_f32((float *)transposed + i * LANES, v[i]);
}

/* Shrinks at most 16 rows, or two groups of 16 if `two`. */
INLINE void shrink_groups(const Rows *rows, const bf16 *a, int64_t n, int64_t ranks, float w, const int two) {
    bf16 transposed[2][TILE_ROWS * TILE_INPUTS] __attribute__((aligned(64)));
    float sums[2 * TILE_ROWS * LANES] __attribute__((aligned(64)));
    int64_t row_bytes = rows->x_stride * sizeof(bf16);
    const bf16 *x = rows->x, *second = x + TILE_ROWS * rows->x_stride;
    shape_tiles(rows->count);
    tile_zero(SUM_0);
    if (two) tile_zero(SUM_1);
    transpose_ranks(a, n, ranks, transposed[0]);
    for (int64_t k = 0, i = 0; k < n; k += TILE_INPUTS, i++) {
        const bf16 *now = transposed[i % 2];
        if (k + TILE_INPUTS < n) transpose_ranks(a + k + TILE_INPUTS, n, ranks, transposed[(i + 1) % 2]);
        tile_load(RIGHT_0, now, TILE_BYTES);
        tile_load(LEFT_0, x + k, row_bytes);
        tile_add_product(SUM_0, LEFT_0, RIGHT_0);
        if (!two) continue;
        tile_load(LEFT_1, second + k, row_bytes);
        tile_add_product(SUM_1, LEFT_1, RIGHT_0);
    }
    tile_store(SUM_0, sums, TILE_BYTES);
    if (two) tile_store(SUM_1, sums + TILE_ROWS * LANES, TILE_BYTES);
    for (int64_t i = 0; i < rows->count; i++)
        store_pairs(rows->v + i * rows->v_stride, load_f32(sums + i * LANES) * w);
}

static void shrink_by_tiles(const Module *m, const Rows *rows, int64_t n, float w, int64_t r) {
    int64_t ranks = least(m->rank - r, TILE_ROWS);
    const bf16 *a = m->a + r * n, *next = r + ranks < m->rank ? a + ranks * n : rows->next;
    Rows part = *rows;
    part.v += r;
    if (rows->count == 1) shrink_row(a, rows->x, n, ranks, w, part.v, next);
    else if (rows->count <= TILE_ROWS) shrink_groups(&part, a, n, ranks, w, 0);
    else shrink_groups(&part, a, n, ranks, w, 1);
}

#define TWICE(word) ((word) << 16 | (word))

/* Repeats each of 16 columns of `ranks` rows of B, to [16 ranks, 16 pairs]. Missing ranks are 0. */
INLINE void widen_ranks(const bf16 *b, int64_t width, int64_t ranks, uint32_t *pairs) {
    const __m512i twice = (__m512i)(u32x16){TWICE(0), TWICE(1), TWICE(2), TWICE(3), TWICE(4), TWICE(5),
                                            TWICE(6), TWICE(7), TWICE(8), TWICE(9), TWICE(10), TWICE(11),
                                            TWICE(12), TWICE(13), TWICE(14), TWICE(15)};
    for (int64_t r = 0; r < TILE_ROWS; r++) {
        __m512i once = _mm512_setzero_si512();
        if (r < ranks) once = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(b + r * width)));
        _mm512_store_si512(pairs + r * LANES, _mm512_permutexvar_epi16(twice, once));
    }
}

/* Adds the update to 16 columns of at most 16 rows, or of two groups of 16 if `two`. */
INLINE void expand_groups(const Module *m, const Rows *rows, int64_t width, int64_t low, float *acc,
                          const int two) {
    uint32_t pairs[2][TILE_ROWS * LANES] __attribute__((aligned(64)));
    int64_t v_bytes = rows->v_stride * sizeof(float), acc_bytes = COLUMNS * sizeof(float);
    const float *v = rows->v, *second = v + TILE_ROWS * rows->v_stride;
    const bf16 *b = m->b + low;
    widen_ranks(b, width, m->rank, pairs[0]);
    tile_load(SUM_0, acc, acc_bytes);
    if (two) tile_load(SUM_1, acc + TILE_ROWS * COLUMNS, acc_bytes);
    for (int64_t r = 0, i = 0; r < m->rank; r += TILE_ROWS, i++) {
        int64_t next = r + TILE_ROWS;
        if (next < m->rank) widen_ranks(b + next * width, width, m->rank - next, pairs[(i + 1) % 2]);
        tile_load(RIGHT_0, pairs[i % 2], TILE_BYTES);
        tile_load(LEFT_0, v + r, v_bytes);
        tile_add_product(SUM_0, LEFT_0, RIGHT_0);
        if (!two) continue;
        tile_load(LEFT_1, second + r, v_bytes);
        tile_add_product(SUM_1, LEFT_1, RIGHT_0);
    }
    tile_store(SUM_0, acc, acc_bytes);
    if (two) tile_store(SUM_1, acc + TILE_ROWS * COLUMNS, acc_bytes);
}

/* The same for one row and `vectors` vectors of columns, without tiles. Sums even and odd terms separately, 16
 * ranks at a time, as a tile does, and prefetches the same amount of the next columns. */
INLINE void add_vectors(const Module *m, const Rows *rows, int64_t width, int64_t low, float *acc,
                        const int vectors) {
    const bf16 *b = m->b + low, *next = rows->next;
    f32x16 s[vectors];
    for (int j = 0; j < vectors; j++) s[j] = load_f32(acc + j * LANES);
    for (int64_t r = 0; r < m->rank; r += TILE_ROWS) {
        f32x16 even[vectors], odd[vectors];
        float high[LANES], rest[LANES];
        u32x16 words = (u32x16)load_f32(rows->v + r);
        store_f32(high, (f32x16)(words << 16));
        store_f32(rest, (f32x16)(words & 0xffff0000u));
        for (int j = 0; j < vectors; j++) even[j] = odd[j] = splat(0);
        for (int64_t q = 0; q < least(m->rank - r, TILE_ROWS); q++, b += width) {
            for (int j = 0; next && j < vectors; j += 2) __builtin_prefetch(next + j * LANES);
            if (next) next += rows->next_stride;
            for (int j = 0; j < vectors; j++) {
                f32x16 column = load_bf16(b + j * LANES);
                even[j] += high[q] * column;
                odd[j] += rest[q] * column;
            }
        }
        /* Tiles add zeros for missing ranks. */
        for (int j = 0; j < vectors; j++) s[j] += (even[j] + 0.0f) + (odd[j] + 0.0f);
    }
    for (int j = 0; j < vectors; j++) store_f32(acc + j * LANES, s[j]);
}

KERNEL static void expand_row(const Module *m, const Rows *rows, int64_t width, int64_t low, int64_t count) {
    int64_t o = 0;
    for (; o + COLUMNS <= count; o += COLUMNS)
        add_vectors(m, rows, width, low + o, rows->acc + o, COLUMN_VECTORS);
    for (; o < count; o += LANES) add_vectors(m, rows, width, low + o, rows->acc + o, 1);
}

#define SUBNORMALS_ARE_ZERO 0x8040 /* for operands and for results */

static void expand_by_tiles(const Module *m, const Rows *rows, int64_t width, int64_t low, int64_t count) {
    if (rows->count == 1) {
        unsigned before = _mm_getcsr();
        _mm_setcsr(before | SUBNORMALS_ARE_ZERO);
        expand_row(m, rows, width, low, count);
        _mm_setcsr(before);
        return;
    }
    shape_tiles(rows->count);
    for (int64_t o = 0; o < count; o += LANES) {
        if (rows->count <= TILE_ROWS) expand_groups(m, rows, width, low + o, rows->acc + o, 0);
        else expand_groups(m, rows, width, low + o, rows->acc + o, 1);
    }
}
