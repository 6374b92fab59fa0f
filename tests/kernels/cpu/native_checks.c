/* Checks of the compiled CPU kernels without Python: every exported function against plain loops in
 * double precision, and every row alone against the same row in a batch. Built and run by
 * test_native_checks.py, for this machine and for others under an emulator. Exits with 1 on a failure.
 */
#define _GNU_SOURCE
#include "native_checks.h"

#include "attention_checks.h"
#include "gradient_checks.h"
#include "product_checks.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* Silu and gelu: each row alone must have the same bits as well. */
static void check_gated(int64_t width, int is_gelu) {
    const char *name = is_gelu ? "gelu" : "silu";
    void (*exact)(const float *, float *, int64_t, int64_t, int64_t) = is_gelu ? turret_gelu_mul_f32 : turret_silu_mul_f32;
    void (*half)(const bf16 *, bf16 *, int64_t, int64_t, int64_t) = is_gelu ? turret_gelu_mul : turret_silu_mul;
    float *x = floats(MAX_ROWS * 2 * width), *y = floats(MAX_ROWS * width), *one = floats(width);
    bf16 *hx = halves(MAX_ROWS * 2 * width), *hy = halves(MAX_ROWS * width), *hone = halves(width);
    double *expected = calloc(MAX_ROWS * width, sizeof(double)), *hexpected = calloc(MAX_ROWS * width, 8);
    /* gate sigmoid(gate) up, or for gelu gate sigmoid(2 sqrt(2 / pi) (gate + 0.044715 gate^3)) up */
    for (int64_t r = 0; r < MAX_ROWS; r++)
        for (int64_t i = 0; i < width; i++) {
            double gate = x[r * 2 * width + i], hgate = to_f32(hx[r * 2 * width + i]);
            double y = is_gelu ? 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate) : gate;
            double hy = is_gelu ? 1.5957691216057308 * (hgate + 0.044715 * hgate * hgate * hgate) : hgate;
            expected[r * width + i] = gate / (1 + exp(-y)) * x[(r * 2 + 1) * width + i];
            hexpected[r * width + i] = hgate / (1 + exp(-hy)) * to_f32(hx[(r * 2 + 1) * width + i]);
        }
    exact(x, y, MAX_ROWS, width, threads);
    half(hx, hy, MAX_ROWS, width, threads);
    near(name, y, expected, MAX_ROWS * width, 1e-5);
    near_bf16(name, hy, hexpected, MAX_ROWS * width);
    for (int64_t r = 0; r < MAX_ROWS; r++) {
        exact(x + r * 2 * width, one, 1, width, threads);
        same(name, one, y + r * width, width * sizeof(float));
        half(hx + r * 2 * width, hone, 1, width, threads);
        same(name, hone, hy + r * width, width * sizeof(bf16));
    }
    free(x), free(y), free(one), free(hx), free(hy), free(hone), free(expected), free(hexpected);
}

/* Gates and ups that alternate, on both sides of the limit. */
static void check_clamped(int64_t width) {
    float *x = floats(MAX_ROWS * 2 * width), *y = floats(MAX_ROWS * width), *one = floats(width);
    bf16 *hx = halves(MAX_ROWS * 2 * width), *hy = halves(MAX_ROWS * width), *hone = halves(width);
    double *expected = calloc(MAX_ROWS * width, sizeof(double)), *hexpected = calloc(MAX_ROWS * width, 8);
    double alpha = 1.5, limit = 0.25;
    /* (up + 1) gate sigmoid(alpha gate) of the clamped gate and up */
    for (int64_t i = 0; i < MAX_ROWS * width; i++) {
        double gate = fmin(x[2 * i], limit), up = fmax(fmin(x[2 * i + 1], limit), -limit);
        expected[i] = (up + 1) * gate / (1 + exp(-alpha * gate));
        gate = fmin(to_f32(hx[2 * i]), limit), up = fmax(fmin(to_f32(hx[2 * i + 1]), limit), -limit);
        hexpected[i] = (up + 1) * gate / (1 + exp(-alpha * gate));
    }
    turret_clamped_swiglu_f32(x, y, MAX_ROWS, width, alpha, limit, threads);
    turret_clamped_swiglu(hx, hy, MAX_ROWS, width, alpha, limit, threads);
    near("clamped swiglu", y, expected, MAX_ROWS * width, 1e-5);
    near_bf16("clamped swiglu", hy, hexpected, MAX_ROWS * width);
    for (int64_t r = 0; r < MAX_ROWS; r++) {
        turret_clamped_swiglu_f32(x + r * 2 * width, one, 1, width, alpha, limit, threads);
        same("clamped swiglu", one, y + r * width, width * sizeof(float));
        turret_clamped_swiglu(hx + r * 2 * width, hone, 1, width, alpha, limit, threads);
        same("clamped swiglu", hone, hy + r * width, width * sizeof(bf16));
    }
    free(x), free(y), free(one), free(hx), free(hy), free(hone), free(expected), free(hexpected);
}

/* Norm and exponential; the norm in bf16 as well, from the same values. */
static void check_elementwise(int64_t width) {
    float *x = floats(MAX_ROWS * 2 * width), *w = floats(width), *y = floats(MAX_ROWS * width);
    float *one = floats(width), *sum = floats(MAX_ROWS * width), *delta = floats(MAX_ROWS * width);
    bf16 *hx = halves(MAX_ROWS * 2 * width), *hy = halves(MAX_ROWS * width);
    bf16 *hone = halves(width), *hsum = halves(MAX_ROWS * width);
    double *expected = calloc(MAX_ROWS * width, sizeof(double)), *hexpected = calloc(MAX_ROWS * width, 8);
    memcpy(sum, x, MAX_ROWS * width * sizeof(float));
    memcpy(hsum, hx, MAX_ROWS * width * sizeof(bf16));
    /* v / sqrt(mean of v^2 + 1e-6) w, for v = x + delta, or v = x in bf16 */
    for (int64_t r = 0; r < MAX_ROWS; r++) {
        double squares = 0, hsquares = 0;
        for (int64_t i = 0; i < width; i++) {
            double v = (double)x[r * width + i] + delta[r * width + i], h = to_f32(hx[r * width + i]);
            squares += v * v, hsquares += h * h;
        }
        for (int64_t i = 0; i < width; i++) {
            double v = (double)x[r * width + i] + delta[r * width + i], h = to_f32(hx[r * width + i]);
            expected[r * width + i] = v / sqrt(squares / width + 1e-6) * w[i];
            hexpected[r * width + i] = h / sqrt(hsquares / width + 1e-6) * w[i];
        }
    }
    turret_add_rms_norm_f32(sum, delta, w, 1e-6, y, MAX_ROWS, width, threads);
    turret_add_rms_norm(hsum, 0, w, 1e-6, hy, MAX_ROWS, width, threads);
    near("norm", y, expected, MAX_ROWS * width, 1e-5);
    near_bf16("norm", hy, hexpected, MAX_ROWS * width);
    for (int64_t r = 0; r < MAX_ROWS; r++) {
        memcpy(one, x + r * width, width * sizeof(float));
        float *result = floats(width);
        turret_add_rms_norm_f32(one, delta + r * width, w, 1e-6, result, 1, width, threads);
        same("norm", result, y + r * width, width * sizeof(float));
        free(result);
        turret_add_rms_norm(hsum + r * width, 0, w, 1e-6, hone, 1, width, threads);
        same("norm in bf16", hone, hy + r * width, width * sizeof(bf16));
    }
    for (int64_t i = 0; i < width; i++) one[i] = 80 * noise(), expected[i] = exp(one[i]);
    memcpy(y, one, width * sizeof(float));
    turret_exp_f32(y, width);
    for (int64_t i = 0; i < width; i++) {
        if (!(fabs(y[i] / expected[i] - 1) < 1e-5)) fail("exp", "value", i, y[i], expected[i]);
        turret_exp_f32(one + i, 1);
    }
    same("exp", one, y, width * sizeof(float));
    free(x), free(w), free(y), free(one), free(sum), free(delta), free(hx), free(hy), free(hone);
    free(hsum), free(expected), free(hexpected);
}

/* Row `row` has the change in both inputs. The next row has its own change per input, and the second module has
 * none. All other rows stay unchanged. */
static void check_change(const Step *step, const bf16 *x, int64_t in, int64_t row, const bf16 *expected) {
    bf16 *out = halves(2 * MAX_ROWS * in);
    int64_t changes[3 * MAX_ROWS] = {0};
    Inputs inputs = {changes, 2};
    Module modules[2] = {step->components[0].modules[0]};
    Component component = step->components[0];
    Step two = *step;
    component.modules = modules, two.components = &component;
    changes[3 * row + 1] = 1;
    if (row + 1 < MAX_ROWS) changes[3 * row + 4] = changes[3 * row + 5] = 1;
    turret_change_inputs(&two, 0, &inputs, x, MAX_ROWS, in, out);
    for (int64_t n = 0; n < 2 * MAX_ROWS; n++) {
        const bf16 *found = out + n * in, *r = x + n % MAX_ROWS * in;
        if (n % MAX_ROWS == row) same("changed input", found, expected, in * sizeof(bf16));
        else if (n >= MAX_ROWS || n != row + 1) same("kept input", found, r, in * sizeof(bf16));
        else if (!memcmp(found, r, in * sizeof(bf16))) fail("own input", "row", n, 0, 1);
    }
    free(out);
}

/* Checks a module with every operator, for rows of one segment, then for each row in a separate segment. */
static void check_adapters(int64_t in, int64_t out, int64_t rank, int64_t side) {
    int64_t in_m = 4, out_l = 3, in_n = in / 4, out_k = out / 3;
    bf16 *a = halves(rank * in), *b = halves(rank * out), *x = halves(MAX_ROWS * in), *y = halves(MAX_ROWS * out);
    float *gain = floats(out), *bias = floats(out), *l = floats(in);
    Hadamard h = {halves(side * out), halves(side * out), halves(side * in), halves(side * in), side};
    Kronecker k = {halves(out_l * in_m), halves(in_n * out_k), 0, 0, out_l, in_m, out_k, in_n, 0};
    int64_t size = in % 8 ? 4 : 8;
    InputBlocks d = {halves(in * size), in / size, size};
    /* Output o has o % 5 entries: every (in / 8)th input from o % (in / 2) on. */
    int64_t most = 0;
    int32_t *row_starts = calloc(out + 1, sizeof(int32_t));
    for (int64_t o = 0; o < out; o++) row_starts[o + 1] = most += o % 5;
    bf16 *entries = halves(most + 1);
    uint16_t *columns = calloc(most + 1, sizeof(uint16_t));
    for (int64_t o = 0; o < out; o++)
        for (int64_t e = row_starts[o]; e < row_starts[o + 1]; e++)
            columns[e] = (uint16_t)(o % (in / 2) + in / 8 * (e - row_starts[o]));
    int64_t steps = turret_sparse_steps(columns, row_starts, out);
    /* The kernel may read past the last entry. */
    bf16 *kept = halves(most + 64);
    uint8_t *places = calloc(most + 64, 1), *outputs = calloc(out, 1);
    uint32_t *masks = calloc(steps + 1, sizeof(uint32_t));
    uint16_t *skips = calloc(steps + 1, sizeof(uint16_t));
    int32_t *starts = calloc(2 * (out / LANES + 2), sizeof(int32_t));
    turret_sparse_fill(entries, columns, row_starts, out, kept, places, masks, skips, starts, outputs);
    Sparse s = {kept, places, masks, skips, starts, outputs, 2};
    Dense whole = {halves(out * in), in};
    Module module = {a, b, gain, bias, l, rank, &h, &k, &d, 0, 0, &s, &whole};
    double *expected = calloc(MAX_ROWS * out, sizeof(double)), weight = -0.75;
    /* y with the gain and the bias, and x times each change of the weight: the entries; the dense change; b a; the
     * product of w1a w1b and w2a w2b element by element; the Kronecker product of w1 and w2. */
    for (int64_t r = 0; r < MAX_ROWS; r++) {
        double *e = expected + r * out;
#define X(i) (double)to_f32(x[r * in + (i)])
        for (int64_t o = 0; o < out; o++)
            e[o] = to_f32(y[r * out + o]) * (1 + weight * (gain[o] - 1.0)) + weight * bias[o];
        for (int64_t o = 0; o < out; o++)
            for (int64_t q = row_starts[o]; q < row_starts[o + 1]; q++)
                e[o] += weight * X(columns[q]) * to_f32(entries[q]);
        for (int64_t o = 0; o < out; o++)
            for (int64_t i = 0; i < in; i++) e[o] += weight * X(i) * to_f32(whole.weight[o * in + i]);
        for (int64_t j = 0; j < rank; j++) {
            double v = 0;
            for (int64_t i = 0; i < in; i++) v += X(i) * to_f32(a[j * in + i]);
            for (int64_t o = 0; o < out; o++) e[o] += weight * v * to_f32(b[j * out + o]);
        }
        for (int64_t j = 0; j < side; j++)
            for (int64_t i = 0; i < side; i++) {
                double u = 0;
                for (int64_t n = 0; n < in; n++) u += X(n) * to_f32(h.w2b[j * in + n]) * to_f32(h.w1b[i * in + n]);
                for (int64_t o = 0; o < out; o++)
                    e[o] += weight * u * to_f32(h.w2a[j * out + o]) * to_f32(h.w1a[i * out + o]);
            }
        for (int64_t m = 0; m < in_m; m++)
            for (int64_t c = 0; c < out_k; c++) {
                double z = 0;
                for (int64_t n = 0; n < in_n; n++) z += X(m * in_n + n) * to_f32(k.w2[n * out_k + c]);
                for (int64_t o = 0; o < out_l; o++) e[o * out_k + c] += weight * z * to_f32(k.w1[o * in_m + m]);
            }
    }
    int64_t width = PADDED(rank) + PADDED(PADDED(side) * side) + in_m * PADDED(out_k);
    float *scratch = floats(MAX_ROWS * width);
    Component component = {&module, 0, width, weight};
    Segment segment = {0, MAX_ROWS, 0, 1};
    Step step = {&segment, &component, scratch, 1, threads, 0, 1, 1, 0, 0};
    int64_t shape[] = {in, 1, 0, out};
    bf16 *start = halves(MAX_ROWS * out), *gained = halves(MAX_ROWS * in);
    memcpy(start, y, MAX_ROWS * out * sizeof(bf16));
    turret_adapt(&step, shape, x, in, y, out, 0);
    near_bf16("adapters", y, expected, MAX_ROWS * out);
    for (int64_t r = 0; r < MAX_ROWS; r++) {
        Segment alone = {r, r + 1, 0, 1};
        int64_t members[] = {0, 1};
        step.segments = &alone;
        turret_adapt(&step, shape, x, in, start, out, 0);
        same("adapters", start + r * out, y + r * out, out * sizeof(bf16));
        turret_input_change(&step, 0, in, x, in, &r, members, 1, 1.0, gained);
        /* x with the gain of the inputs, and x times each block */
        for (int64_t i = 0; i < in; i++) {
            double g = X(i) * (1 + weight * (l[i] - 1.0));
            for (int64_t j = 0; j < size; j++)
                g += weight * X(i / size * size + j) * to_f32(d.blocks[(i / size * size + j) * size + i % size]);
            if (!(fabs(to_f32(gained[i]) - g) < 3e-2)) fail("input change", "value", i, to_f32(gained[i]), g);
        }
        check_change(&step, x, in, r, gained);
    }
}

/* Low-rank updates alone, whose bits are compared with another build's: rows of a mix of two, then runs of these
 * rows in separate segments. With a small scale, the products are subnormal numbers. */
static void check_low_rank(int64_t in, int64_t out, int64_t rank, float scale) {
    enum { ROWS = PRODUCT_ROWS, OTHER = 3 };
    bf16 *a = halves(rank * in), *b = halves(rank * out), *x = halves(ROWS * in), *y = halves(ROWS * out);
    bf16 *a2 = halves(OTHER * in), *b2 = halves(OTHER * out), *start = halves(ROWS * out);
    Module modules[] = {{.a = a, .b = b, .rank = rank}, {.a = a2, .b = b2, .rank = OTHER}};
    double *expected = calloc(ROWS * out, sizeof(double)), weights[] = {-0.75, 1.5};
    for (int64_t i = 0; i < rank * in; i++) a[i] = to_bf16(to_f32(a[i]) * scale);
    for (int64_t i = 0; i < OTHER * in; i++) a2[i] = to_bf16(to_f32(a2[i]) * scale);
    if (scale < 1) memset(y, 0, ROWS * out * sizeof(bf16));
    /* y plus each component's weight times b a x */
    for (int64_t r = 0; r < ROWS; r++)
        for (int64_t o = 0; o < out; o++) {
            double *e = expected + r * out + o;
            *e = to_f32(y[r * out + o]);
            for (int k = 0; k < 2; k++)
                for (int64_t j = 0; j < modules[k].rank; j++) {
                    double v = 0;
                    for (int64_t i = 0; i < in; i++)
                        v += (double)to_f32(x[r * in + i]) * to_f32(modules[k].a[j * in + i]);
                    *e += weights[k] * v * to_f32(modules[k].b[j * out + o]);
                }
        }
    int64_t width = PADDED(rank) + PADDED(OTHER), shape[] = {in, 1, 0, out};
    float *scratch = floats(2 * ROWS * width);
    Component components[] = {{modules, 0, width, weights[0]}, {modules + 1, ROWS * width, width, weights[1]}};
    Segment segment = {0, ROWS, 0, 2};
    Step step = {&segment, components, scratch, 1, threads, 0, 1, 1, 0, 0};
    memcpy(start, y, ROWS * out * sizeof(bf16));
    turret_adapt(&step, shape, x, in, y, out, 0);
    int64_t far = 0; /* results that are not the nearest bf16, as fp32 sums may give if two are almost equally near */
    for (int64_t i = 0; i < ROWS * out; i++) far += y[i] != to_bf16((float)expected[i]);
    if (scale == 1) near_bf16("low rank", y, expected, ROWS * out);
    if (scale == 1 && far * 100 > ROWS * out) fail("low rank", "results", ROWS * out, far, 0);
    add_bits(y, ROWS * out);
    for (int64_t count = 1; count < ROWS; count += count % 3 + 1)
        for (int64_t r = 0; r + count <= ROWS; r += count) {
            segment = (Segment){r, r + count, 0, 2};
            bf16 *own = start + r * out, *kept = halves(count * out);
            memcpy(kept, own, count * out * sizeof(bf16));
            for (int64_t i = 0; i < 2 * ROWS * width; i++) scratch[i] = NAN;
            turret_adapt(&step, shape, x, in, start, out, 0);
            same("low rank", own, y + r * out, count * out * sizeof(bf16));
            memcpy(own, kept, count * out * sizeof(bf16));
            free(kept);
        }
    free(a), free(b), free(x), free(y), free(a2), free(b2), free(start), free(expected), free(scratch);
}

/* A low-rank update whose first factor adds up pieces of the input. */
static void check_pieces(int64_t in, int64_t out, int64_t rank) {
    bf16 *b = halves(rank * out), *x = halves(MAX_ROWS * in), *y = halves(MAX_ROWS * out), *start = halves(MAX_ROWS * out);
    double *expected = calloc(MAX_ROWS * out, sizeof(double));
    /* y - 0.75 b z, where z_j is the sum of the inputs j, j + rank, j + 2 rank, ... */
    for (int64_t r = 0; r < MAX_ROWS; r++)
        for (int64_t o = 0; o < out; o++) {
            double *e = &expected[r * out + o];
            *e = to_f32(y[r * out + o]);
            for (int64_t i = 0; i < in; i++) *e -= 0.75 * X(i) * to_f32(b[i % rank * out + o]);
        }
    memcpy(start, y, MAX_ROWS * out * sizeof(bf16));
    Module module = {0, b, 0, 0, 0, rank};
    float *scratch = floats(MAX_ROWS * PADDED(rank));
    Component component = {&module, 0, PADDED(rank), -0.75};
    Segment segment = {0, MAX_ROWS, 0, 1};
    Step step = {&segment, &component, scratch, 1, threads, 0, 1, 1, 0, 0};
    int64_t shape[] = {in, 1, 0, out};
    turret_adapt(&step, shape, x, in, y, out, 0);
    near_bf16("pieces", y, expected, MAX_ROWS * out);
    for (int64_t r = 0; r < MAX_ROWS; r++) {
        segment = (Segment){r, r + 1, 0, 1};
        turret_adapt(&step, shape, x, in, start, out, 0);
        same("pieces", start + r * out, y + r * out, out * sizeof(bf16));
    }
    free(b), free(x), free(y), free(start), free(expected), free(scratch);
}

/* Each of MAX_ROWS rows is paired with two of four experts. Rows have up to three members, and the last rows come
 * after the last one with a member. The second member has no update in the projection. */
static void check_experts(int64_t in, int64_t out, int64_t rank) {
    enum { EXPERTS = 4, PAIRS = 2 * MAX_ROWS, ROWS = MAX_ROWS - 2 };
    bf16 *x = halves(MAX_ROWS * in), *y = halves(PAIRS * out), *start = halves(PAIRS * out);
    bf16 *a = halves(EXPERTS * rank * in), *b = halves(EXPERTS * rank * out);
    int64_t updates[3][2][3] = {{{0}}};
    updates[0][1][0] = (int64_t)a, updates[0][1][1] = (int64_t)b, updates[0][1][2] = rank;
    updates[2][1][0] = (int64_t)a, updates[2][1][1] = (int64_t)b, updates[2][1][2] = rank;
    struct { const void *updates; double weight; } members[3 * MAX_ROWS];
    int64_t first[ROWS + 1] = {0}, row[PAIRS], expert[PAIRS], count = 0;
    static const double weights[] = {0.5, 1.0, -2.0};
    for (int64_t r = 0; r < ROWS; r++) {
        for (int64_t k = 0; k < r % 4; k++) members[count].updates = updates[k], members[count++].weight = weights[k];
        first[r + 1] = count;
    }
    for (int64_t p = 0; p < PAIRS; p++) row[p] = p * 7 % MAX_ROWS, expert[p] = p / (MAX_ROWS / 2) % EXPERTS;
    int64_t width = 3 * PADDED(rank);
    float *scratch = floats(width * threads);
    const int64_t step[] = {(int64_t)members, (int64_t)first, ROWS, (int64_t)scratch, width, threads};
    int64_t pairs[] = {(int64_t)x, (int64_t)y, (int64_t)row, (int64_t)expert, (int64_t)row, PAIRS, in, in, out, 1};
    memcpy(start, y, PAIRS * out * sizeof(bf16));
    double *expected = calloc(PAIRS * out, sizeof(double));
    /* y plus the weights of the row's members that have an update, times b a x with the factors of the pair's expert */
    for (int64_t p = 0; p < PAIRS; p++)
        for (int64_t o = 0; o < out; o++) {
            double w = 0;
            for (int64_t k = 0; row[p] < ROWS && k < row[p] % 4; k++) w += k == 1 ? 0 : weights[k];
            double sum = to_f32(start[p * out + o]);
            for (int64_t q = 0; q < rank; q++) {
                double v = 0;
                for (int64_t i = 0; i < in; i++)
                    v += (double)to_f32(a[(expert[p] * rank + q) * in + i]) * to_f32(x[row[p] * in + i]);
                sum += w * v * to_f32(b[(expert[p] * rank + q) * out + o]);
            }
            expected[p * out + o] = sum;
        }
    turret_adapt_experts(step, pairs);
    near_bf16("experts", y, expected, PAIRS * out);
    bf16 *one = halves(out);
    for (int64_t p = 0; p < PAIRS; p++) {
        /* Alone, and reading its own row. */
        int64_t alone[] = {(int64_t)(x + row[p] * in), (int64_t)one, (int64_t)(row + p), (int64_t)(expert + p), 0, 1,
                           in, in, out, 1};
        memcpy(one, start + p * out, out * sizeof(bf16));
        turret_adapt_experts(step, alone);
        same("experts", one, y + p * out, out * sizeof(bf16));
    }
    free(x), free(y), free(start), free(a), free(b), free(scratch), free(expected), free(one);
}

/* On Linux, a process must request permission to use AMX tiles; see isa.c. */
static void allow_tiles(void) {
#if defined(__x86_64__) && defined(__linux__)
    syscall(SYS_arch_prctl, 0x1023, 18);
#endif
}

int main(int count, char **arguments) {
    allow_tiles();
    threads = count > 1 ? atoi(arguments[1]) : 1;
    turret_own_threads(count > 2);
    static const int64_t sizes[][2] = {{1, 1}, {5, 17}, {16, 16}, {33, 100}, {70, 192}, {130, 576}, {18, 1100}};
    for (int i = 0; i < 7; i++)
        for (int64_t kind = 0; kind < 3; kind++) {
            check_products(sizes[i][0], sizes[i][1], kind, 0);
            check_products(sizes[i][0], sizes[i][1], kind, 1);
        }
    check_dense(70, 100), check_dense(131, 576), check_dense(9, 64), check_nf4(64, 64), check_nf4(96, 192);
    check_mxfp4(64, 64), check_mxfp4(96, 96);
    if (turret_screen_bytes(1, 2, 1)) { /* this library has a screen */
        check_screen(300, 64, 0.003), check_screen(1000, 136, 0.01), check_screen(513, 576, 2);
        check_screen(3000, 64, 0.001), check_screen_bounds();
    }
    check_elementwise(7), check_elementwise(64), check_elementwise(100);
    for (int is_gelu = 0; is_gelu < 2; is_gelu++)
        check_gated(7, is_gelu), check_gated(64, is_gelu), check_gated(100, is_gelu);
    check_clamped(7), check_clamped(64), check_clamped(100);
    check_attention(3, 1, 64, 0, 0, 0), check_attention(8, 2, 32, 20, 0, 1), check_attention(9, 3, 96, 0, 0, 0);
    check_attention(4, 2, 64, 0, 0.5, 0), check_attention(2, 1, 256, 9, 2, 1);
    check_attention(36, 2, 64, 11, 0, 1), check_attention(16, 1, 128, 0, 0, 0);
    check_adapters(40, 24, 3, 1), check_adapters(64, 192, 16, 8), check_adapters(100, 219, 9, 5);
    check_low_rank(64, 208, 16, 1), check_low_rank(96, 32, 40, 1), check_low_rank(160, 144, 5, 1);
    check_low_rank(64, 48, 20, 0x1p-122f), check_low_rank(72, 40, 9, 1);
    /* Once rounded to bf16, few results show another order of fp32 sums. */
    for (int draw = 0; draw < 16; draw++) check_low_rank(64, 208, 16, 1);
    check_pieces(40, 24, 3), check_pieces(64, 192, 16), check_pieces(100, 219, 37), check_pieces(96, 64, 64);
    check_experts(40, 24, 3), check_experts(64, 192, 16), check_experts(100, 219, 9);
    check_gradients(NF4_VALUES);
    printf("%d threads, bits %016lx: %d failures\n", threads, (unsigned long)sum_of_bits, failures);
    return failures != 0;
}
