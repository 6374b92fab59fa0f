/* Checks products against loops in double precision, and each row alone against the same row in a batch. */
#include "native_checks.h"

static float of_f16(uint16_t h) {
    int exponent = h >> 10 & 31;
    float value = exponent ? ldexpf(1024 + (h & 1023), exponent - 25) : ldexpf(h & 1023, -24);
    return h >> 15 ? -value : value;
}
static float element(const void *w, int64_t kind, int64_t i) {
    if (kind == 0) return ((const float *)w)[i];
    return kind == 1 ? to_f32(((const bf16 *)w)[i]) : of_f16(((const uint16_t *)w)[i]);
}

/* Checks dots and columns; the first columns alone must have the same bits as well. */
static void check_products(int64_t columns, int64_t inner, int64_t kind, int by_columns) {
    const char *name = by_columns ? "columns" : "dots";
    float *x = floats(2 * MAX_ROWS * inner), *y = floats(2 * MAX_ROWS * columns), *one = floats(columns);
    uint32_t *w = (uint32_t *)floats(2 * columns * inner);
    if (kind == 1) {
        free(w);
        w = (uint32_t *)halves(2 * columns * inner);
    } else if (kind == 2)
        for (int64_t i = 0; i < 2 * columns * inner; i++) ((uint16_t *)w)[i] = rand() % 0x3c00 | rand() % 2 << 15;
    int64_t w_row = by_columns ? columns : inner;
    Product p = {x, w, y, 2, MAX_ROWS, columns, inner, MAX_ROWS * inner, inner, columns * inner, w_row,
                 MAX_ROWS * columns, columns, kind, 0, threads, 0, 1};
    void (*multiply)(const Product *) = by_columns ? turret_columns : turret_dots;
    multiply(&p);
    double *expected = calloc(2 * MAX_ROWS * columns, sizeof(double));
    for (int64_t b = 0; b < 2; b++)
        for (int64_t r = 0; r < MAX_ROWS; r++)
            for (int64_t c = 0; c < columns; c++)
                for (int64_t k = 0; k < inner; k++)
                    expected[(b * MAX_ROWS + r) * columns + c] +=
                        (double)x[(b * MAX_ROWS + r) * inner + k] *
                        element(w, kind, b * columns * inner + (by_columns ? k * columns + c : c * inner + k));
    near(name, y, expected, 2 * MAX_ROWS * columns, 1e-5);
    for (int64_t r = 0; r < MAX_ROWS; r++) {
        Product alone = p;
        alone.x = x + r * inner, alone.y = one, alone.batches = 1, alone.rows = 1;
        multiply(&alone);
        same(name, one, y + r * columns, columns * sizeof(float));
        if (columns < 3) continue;
        alone.columns = columns - 2;
        multiply(&alone);
        same("fewer columns", one, y + r * columns, (columns - 2) * sizeof(float));
    }
    if (by_columns) { /* zeros before and after, and a sum that begins at y */
        Product wide = p;
        float *zeros = calloc(MAX_ROWS * (inner + 5), sizeof(float)), *more = floats((inner + 5) * columns);
        for (int64_t r = 0; r < MAX_ROWS; r++) memcpy(zeros + r * (inner + 5) + 2, x + r * inner, inner * 4);
        for (int64_t i = 0; i < inner * columns; i++) more[2 * columns + i] = element(w, kind, i);
        float *found = calloc(MAX_ROWS * columns, sizeof(float));
        wide.x = zeros, wide.w = more, wide.y = found, wide.x_row = wide.inner = inner + 5;
        wide.batches = 1, wide.kind = 0, wide.adds = 1;
        multiply(&wide);
        same("zeros among the terms", found, y, MAX_ROWS * columns * sizeof(float));
        free(zeros), free(more), free(found);
    }
    free(x), free(y), free(one), free(w), free(expected);
}

static void check_dense(int64_t out, int64_t in) {
    bf16 *x = halves(PRODUCT_ROWS * in), *w = halves(out * in), *y = halves(PRODUCT_ROWS * out), *one = halves(out);
    double *expected = calloc(PRODUCT_ROWS * out, sizeof(double));
    for (int64_t r = 0; r < PRODUCT_ROWS; r++)
        for (int64_t o = 0; o < out; o++)
            for (int64_t k = 0; k < in; k++)
                expected[r * out + o] += (double)to_f32(x[r * in + k]) * to_f32(w[o * in + k]);
    float *scratch = floats((PRODUCT_ROWS + 15) * in);
    turret_dense_product(x, in, PRODUCT_ROWS, w, y, out, out, in, threads, scratch);
    near_bf16("dense", y, expected, PRODUCT_ROWS * out);
    add_bits(y, PRODUCT_ROWS * out);
    for (int64_t r = 0; r < PRODUCT_ROWS; r++) {
        turret_dense_product(x + r * in, in, 1, w, one, out, out, in, threads, scratch);
        same("dense", one, y + r * out, out * sizeof(bf16));
    }
    free(x), free(w), free(y), free(one), free(expected), free(scratch);
}

typedef void FourBitProduct(const bf16 *, int64_t, int64_t, const uint8_t *, const bf16 *, bf16 *, int64_t,
                            int64_t, int64_t, const Step *, int64_t);
typedef void FourBitExperts(const bf16 *, int64_t, const int64_t *, int64_t, const void *const *, bf16 *,
                            int64_t, int64_t, int64_t);
FourBitProduct turret_nf4_product, turret_mxfp4_product;
FourBitExperts turret_nf4_experts, turret_mxfp4_experts;

/* `format` is the name in failures; `block` inputs share a scale. */
static void check_4bit(const char *format, const double *values, int64_t block, FourBitProduct *multiply,
                       FourBitExperts *multiply_experts, int64_t out, int64_t in) {
    bf16 *x = halves(PRODUCT_ROWS * in), *scale = halves(in / block * out), *y = halves(PRODUCT_ROWS * out);
    bf16 *one = halves(out);
    uint8_t *packed = malloc(out * in / 2 + 256);
    for (int64_t i = 0; i < out * in / 2; i++) packed[i] = rand();
    double *expected = calloc(PRODUCT_ROWS * out, sizeof(double));
    for (int64_t r = 0; r < PRODUCT_ROWS; r++)
        for (int64_t o = 0; o < out; o++)
            for (int64_t k = 0; k < in; k++) {
                /* Low nibbles are outputs 0 to 15, high ones 16 to 31; inputs are stored in pairs. */
                uint8_t byte = packed[o / 32 * 16 * in + k / 2 * 32 + o % 16 * 2 + k % 2];
                double w = values[o % 32 < 16 ? byte & 15 : byte >> 4];
                expected[r * out + o] += to_f32(x[r * in + k]) * w * to_f32(scale[k / block * out + o]);
            }
    multiply(x, in, PRODUCT_ROWS, packed, scale, y, out, in, threads, 0, 0);
    near_bf16(format, y, expected, PRODUCT_ROWS * out);
    add_bits(y, PRODUCT_ROWS * out);
    for (int64_t r = 0; r < PRODUCT_ROWS; r++) {
        multiply(x + r * in, in, 1, packed, scale, one, out, in, threads, 0, 0);
        same(format, one, y + r * out, out * sizeof(bf16));
    }
    /* Three weights: the second gets no rows, and the first and the last are the same. */
    const void *weights[] = {packed, scale, 0, 0, packed, scale};
    int64_t ends[] = {4, 4, PRODUCT_ROWS};
    bf16 *again = halves(PRODUCT_ROWS * out);
    multiply_experts(x, in, ends, 3, weights, again, out, in, threads);
    same(format, again, y, PRODUCT_ROWS * out * sizeof(bf16));
    /* Two slices with separate inputs: the input of the first slice has the rows in reverse order. */
    if (block == 64 && out > 64) {
        const int64_t shape[] = {in, 2, 0, 32, out - 32};
        bf16 *xs = halves(2 * PRODUCT_ROWS * in);
        memcpy(xs + PRODUCT_ROWS * in, x, PRODUCT_ROWS * in * sizeof(bf16));
        for (int64_t r = 0; r < PRODUCT_ROWS; r++)
            memcpy(xs + (PRODUCT_ROWS - 1 - r) * in, x + r * in, in * sizeof(bf16));
        turret_nf4_slices(xs, PRODUCT_ROWS, packed, scale, again, out, in, threads, 0, shape);
        for (int64_t r = 0; r < PRODUCT_ROWS; r++) {
            same("nf4 of the first slice", again + (PRODUCT_ROWS - 1 - r) * out, y + r * out, 32 * sizeof(bf16));
            same("nf4 of the other slice", again + r * out + 32, y + r * out + 32, (out - 32) * sizeof(bf16));
        }
        free(xs);
    }
    free(again);
    free(x), free(scale), free(y), free(one), free(packed), free(expected);
}

static const double NF4_VALUES[16] = {-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343,
                                      -0.09105004, 0.0, 0.0795803, 0.1609302, 0.2461123, 0.33791524,
                                      0.44070983, 0.562617, 0.72295684, 1.0};

static void check_nf4(int64_t out, int64_t in) {
    check_4bit("nf4", NF4_VALUES, 64, turret_nf4_product, turret_nf4_experts, out, in);
}

static void check_mxfp4(int64_t out, int64_t in) {
    static const double values[16] = {0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6};
    check_4bit("mxfp4", values, 32, turret_mxfp4_product, turret_mxfp4_experts, out, in);
}

/* The structure that turret_screen reads. */
typedef struct {
    const void *codes, *scales;
    int64_t out, in;
    double spread, length;
} Screen;

static Screen make_screen(const bf16 *w, int64_t out, int64_t in) {
    int64_t tiles = (out + 31) / 32;
    int8_t *codes = aligned_alloc(64, tiles * 32 * (in + 64));
    float *scales = floats(tiles * 32);
    double *facts = calloc(2 * tiles, sizeof(double));
    Screen screen = {codes, scales, out, in, 0, 0};
    turret_screen_codes(w, out, in, codes, scales, facts, threads);
    for (int64_t t = 0; t < tiles; t++)
        screen.spread = fmax(screen.spread, facts[2 * t]), screen.length = fmax(screen.length, facts[2 * t + 1]);
    free(facts);
    return screen;
}

static int64_t *screened(const Screen *s, const bf16 *x, int64_t rows, int64_t *count) {
    int64_t *left = calloc(s->out, sizeof(int64_t));
    char *memory = malloc(turret_screen_bytes(s->out, s->in, rows));
    *count = turret_screen(s, x, s->in, rows, 0, memory, left, s->out, threads);
    if (*count < 0) fail("screen", "no answer", rows, *count, s->out);
    free(memory);
    return left;
}

static int is_among(const int64_t *left, int64_t count, int64_t best) {
    for (int64_t i = 0; i < count; i++)
        if (left[i] == best) return 1;
    return 0;
}

/* Outputs that differ by less than a code, or by much more: the largest one of each row must remain. */
static void check_screen(int64_t out, int64_t in, float apart) {
    enum { ROWS = 9 };
    bf16 *w = halves(out * in), *x = halves(ROWS * in);
    for (int64_t o = 1; o < out; o++)
        for (int64_t k = 0; k < in; k++)
            w[o * in + k] = to_bf16((to_f32(w[k]) + apart * noise()) * (apart > 1 ? 1 + o % 5 : 1));
    Screen screen = make_screen(w, out, in);
    for (int64_t rows = 1; rows <= ROWS; rows += 4)
        for (int64_t first = 0, count; first + rows <= ROWS; first++) {
            int64_t *left = screened(&screen, x + first * in, rows, &count);
            for (int64_t r = first; r < first + rows; r++) {
                double most = -INFINITY;
                int64_t best = 0;
                for (int64_t o = 0; o < out; o++) {
                    double sum = 0;
                    for (int64_t k = 0; k < in; k++) sum += (double)to_f32(x[r * in + k]) * to_f32(w[o * in + k]);
                    if (sum > most) most = sum, best = o;
                }
                if (!is_among(left, count, best)) fail("screen", "left out", r, count, best);
            }
            if (apart > 1 && count > out / 4) fail("screen", "left over", first, count, out / 4);
            free(left);
        }
    free(w), free(x), free((void *)screen.codes), free((void *)screen.scales);
}

/* The worst case: the part that codes leave out adds as much as possible to the largest output, and takes as
 * much as possible from another one, which is the largest by its codes. */
static void check_screen_bounds(void) {
    enum { OUT = 700, IN = 128, BEST = 600, SECOND = 7 };
    bf16 *w = halves(OUT * IN), *x = halves(IN);
    for (int64_t o = 0; o < OUT; o++)
        for (int64_t k = 0; k < IN; k++) {
            float sign = k % 3 ? 1 : -1, code = sign * 10;
            if (o == BEST) code += sign * 0.25f;
            if (o == SECOND) code += sign * (k % 8 < 3 ? 0.75f : -0.25f);
            if (o != BEST && o != SECOND) code = 0;
            w[o * IN + k] = to_bf16((k ? code : 127) / 128);
            x[k] = to_bf16(k ? sign : 0);
        }
    Screen screen = make_screen(w, OUT, IN);
    int64_t count, *left = screened(&screen, x, 1, &count);
    if (!is_among(left, count, BEST)) fail("screen", "left out by codes", 0, count, BEST);
    if (count != 2) fail("screen", "left over by codes", 0, count, 2);
    free(w), free(x), free(left), free((void *)screen.codes), free((void *)screen.scales);
}
