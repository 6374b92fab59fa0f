/* Checks gradients against differences of values in double precision, products with transposed weights against loops,
 * and each row or sequence alone against the same one in a batch.
 */
#include "native_checks.h"

typedef struct {
    const void *qkv;
    const float *cos, *sin, *growth, *sinks, *grad;
    float *out, *scratch;
    const int64_t *starts;
    int64_t sequences, heads, kv_heads, dim, pairs, is_interleaved, window, stride, threads;
    double scale, softcap;
} AttentionGradient;
typedef struct {
    const void *x;
    const float *a, *b, *grad;
    float *of_a, *of_b, *of_x, *z, *of_z;
    int64_t rows, rank, in, out, x_row, grad_row, kind, turn;
} Update;
void turret_attention_gradient(const AttentionGradient *);
void turret_attention_gradient_f32(const AttentionGradient *);
void turret_norm_gradient(const bf16 *, const float *, const float *, double, float *, int64_t, int64_t, int64_t);
void turret_norm_gradient_f32(const float *, const float *, const float *, double, float *, int64_t, int64_t, int64_t);
void turret_gate_gradient(const bf16 *, const float *, float *, int64_t, int64_t, int64_t, int64_t);
void turret_gate_gradient_f32(const float *, const float *, float *, int64_t, int64_t, int64_t, int64_t);
void turret_low_rank_gradients(const Update *, int64_t, int64_t);
void turret_log_softmax(const float *, float *, float *, int64_t, int64_t, int64_t);
void turret_log_sums(const bf16 *, float *, int64_t, int64_t, int64_t);
void turret_logit_gradients(bf16 *, float *, const int64_t *, const float *, int64_t, int64_t, int64_t);
void turret_transposed_product(const void *, int64_t, int64_t, const bf16 *, float *, int64_t, int64_t, int64_t, bf16 *);
void turret_nf4_transposed_product(const void *, int64_t, int64_t, const uint8_t *, const bf16 *, float *, int64_t,
                                   int64_t, int64_t, bf16 *);

#define DIFFERENCE 1e-5

/* The sum of a row's results times their gradients. */
static double norm_value(const double *x, const float *w, const float *grad, int64_t width) {
    double squares = 0, sum = 0;
    for (int64_t i = 0; i < width; i++) squares += x[i] * x[i];
    for (int64_t i = 0; i < width; i++) sum += grad[i] * x[i] / sqrt(squares / width + 1e-6) * w[i];
    return sum;
}

/* The same for silu or gelu of the gates, times the ups. */
static double gate_value(const double *gate, const double *up, const float *grad, int64_t width, int is_gelu) {
    double sum = 0;
    for (int64_t i = 0; i < width; i++) {
        double y = is_gelu ? 1.5957691216057308 * (gate[i] + 0.044715 * gate[i] * gate[i] * gate[i]) : gate[i];
        sum += grad[i] * gate[i] / (1 + exp(-y)) * up[i];
    }
    return sum;
}

/* Checks the gradients of a norm and of a gate, for every input, against differences of the two values above. */
static void check_between(int64_t width, int is_gelu) {
    bf16 *half = halves(MAX_ROWS * 2 * width);
    float *x = floats(MAX_ROWS * 2 * width), *w = floats(width), *grad = floats(MAX_ROWS * width);
    float *sum = floats(MAX_ROWS * width), *again = floats(2 * MAX_ROWS * width), *found = floats(2 * MAX_ROWS * width);
    double *norm = calloc(MAX_ROWS * width, 8), *gate = calloc(2 * MAX_ROWS * width, 8), *row = calloc(2 * width, 8);
    for (int64_t i = 0; i < MAX_ROWS * 2 * width; i++) x[i] = to_f32(half[i]);
    for (int64_t r = 0; r < MAX_ROWS; r++)
        for (int64_t i = 0; i < 2 * width; i++) {
            double found[2][2];
            for (int side = 0; side < 2; side++) {
                double more = side ? DIFFERENCE : -DIFFERENCE;
                for (int64_t n = 0; n < 2 * width; n++) row[n] = x[2 * r * width + n] + (n == i ? more : 0);
                found[0][side] = gate_value(row, row + width, grad + r * width, width, is_gelu);
                for (int64_t n = 0; n < width; n++) row[n] = x[r * width + n] + (n == i ? more : 0);
                found[1][side] = norm_value(row, w, grad + r * width, width);
            }
            gate[2 * r * width + i] = (found[0][1] - found[0][0]) / (2 * DIFFERENCE);
            if (i < width) norm[r * width + i] = sum[r * width + i] + (found[1][1] - found[1][0]) / (2 * DIFFERENCE);
        }
    memcpy(again, sum, MAX_ROWS * width * 4), memcpy(found, sum, MAX_ROWS * width * 4);
    turret_norm_gradient(half, w, grad, 1e-6, sum, MAX_ROWS, width, threads);
    near("gradient of a norm", sum, norm, MAX_ROWS * width, 1e-5);
    for (int64_t r = 0; r < MAX_ROWS; r++)
        turret_norm_gradient(half + r * width, w, grad + r * width, 1e-6, again + r * width, 1, width, threads);
    same("gradient of a norm", again, sum, MAX_ROWS * width * 4);
    turret_norm_gradient_f32(x, w, grad, 1e-6, found, MAX_ROWS, width, threads);
    near("gradient of a norm in fp32", found, norm, MAX_ROWS * width, 1e-5);
    turret_gate_gradient(half, grad, found, MAX_ROWS, width, is_gelu, threads);
    near("gradient of a gate", found, gate, 2 * MAX_ROWS * width, 1e-5);
    for (int64_t r = 0; r < MAX_ROWS; r++)
        turret_gate_gradient(half + 2 * r * width, grad + r * width, again + 2 * r * width, 1, width, is_gelu, threads);
    same("gradient of a gate", again, found, 2 * MAX_ROWS * width * 4);
    turret_gate_gradient_f32(x, grad, found, MAX_ROWS, width, is_gelu, threads);
    near("gradient of a gate in fp32", found, gate, 2 * MAX_ROWS * width, 1e-5);
    free(half), free(x), free(w), free(grad), free(sum), free(again), free(found), free(norm), free(gate), free(row);
}

/* The sum of the results times their gradients, of one sequence that begins at row `start`. */
static double attention_value(const AttentionGradient *a, const double *qkv, int64_t start, int64_t length) {
    int64_t per = a->heads + 2 * a->kv_heads, dim = a->dim, step = a->is_interleaved ? 2 : 1;
    int64_t second = a->is_interleaved ? 1 : a->pairs;
    double *turned = malloc(length * per * dim * 8), sum = 0;
    memcpy(turned, qkv, length * per * dim * 8);
    for (int64_t t = 0; t < length; t++)
        for (int64_t h = 0; h < a->heads + a->kv_heads; h++)
            for (int64_t i = 0; i < a->pairs; i++) {
                double *x = turned + (t * per + h) * dim, c = a->cos[(start + t) * a->pairs + i];
                double s = a->sin[(start + t) * a->pairs + i], u = x[step * i], v = x[step * i + second];
                x[step * i] = u * c - v * s, x[step * i + second] = v * c + u * s;
            }
    for (int64_t t = 0; t < length; t++)
        for (int64_t h = 0; h < a->heads; h++) {
            int64_t kv = a->heads + h / (a->heads / a->kv_heads);
            double total = a->sinks ? exp(a->sinks[h]) : 0, result = 0;
            for (int64_t s = a->window && t + 1 > a->window ? t + 1 - a->window : 0; s <= t; s++) {
                double score = 0, value = 0;
                for (int64_t i = 0; i < dim; i++) {
                    score += turned[(t * per + h) * dim + i] * turned[(s * per + kv) * dim + i];
                    value += turned[(s * per + kv + a->kv_heads) * dim + i] * a->grad[((start + t) * a->heads + h) * dim + i];
                }
                score *= a->scale * (a->growth ? a->growth[start + t] : 1);
                if (a->softcap) score = a->softcap * tanh(score / a->softcap);
                total += exp(score), result += exp(score) * value;
            }
            sum += result / total;
        }
    free(turned);
    return sum;
}

/* Checks the gradients of queries, keys and values before their rotation, for 40 random inputs of each of three
 * sequences, against differences of attention_value. */
static void check_attention_gradient(int64_t heads, int64_t kv_heads, int64_t dim, int64_t window, double cap,
                                     int has_others, int64_t long_length) {
    int64_t starts[] = {0, 5, 6, 6 + long_length}, rows = starts[3], per = heads + 2 * kv_heads, width = per * dim;
    int64_t positions = (long_length + 15) / 16 * 16, queries = 32 * heads / kv_heads;
    int64_t stride = 5 * positions * dim + queries * (3 * dim + 2 * positions) + positions;
    bf16 *half = halves(rows * width);
    float *x = floats(rows * width), *out = floats(rows * width), *again = floats(rows * width);
    for (int64_t i = 0; i < rows * width; i++) x[i] = to_f32(half[i]);
    AttentionGradient a = {half, floats(rows * dim / 2), floats(rows * dim / 2), has_others ? floats(rows) : 0,
                           has_others ? floats(heads) : 0, floats(rows * heads * dim), out, floats(threads * stride),
                           starts, 3, heads, kv_heads, dim, has_others ? dim / 4 : dim / 2, has_others, window,
                           stride, threads, 0.5, cap};
    turret_attention_gradient(&a);
    for (int sequence = 0; sequence < 3; sequence++) {
        int64_t start = starts[sequence], length = starts[sequence + 1] - start, count = 40;
        double *qkv = malloc(length * width * 8), expected[40];
        float found[40];
        for (int64_t i = 0; i < length * width; i++) qkv[i] = x[start * width + i];
        for (int64_t n = 0; n < count; n++) {
            int64_t at = rand() % (length * width);
            double value = qkv[at], difference;
            qkv[at] = value + DIFFERENCE, difference = attention_value(&a, qkv, start, length);
            qkv[at] = value - DIFFERENCE, difference -= attention_value(&a, qkv, start, length);
            qkv[at] = value, expected[n] = difference / (2 * DIFFERENCE), found[n] = out[start * width + at];
        }
        near("gradient of attention", found, expected, count, 3e-5);
        AttentionGradient alone = a;
        int64_t ends[] = {0, length};
        alone.qkv = half + start * width, alone.out = again, alone.starts = ends, alone.sequences = 1;
        alone.cos += start * a.pairs, alone.sin += start * a.pairs, alone.grad += start * heads * dim;
        if (a.growth) alone.growth += start;
        turret_attention_gradient(&alone);
        same("gradient of attention", again, out + start * width, length * width * 4);
        alone.qkv = x + start * width;
        turret_attention_gradient_f32(&alone);
        for (int64_t i = 0; i < length * width; i++) qkv[i] = out[start * width + i];
        near("gradient of attention in fp32", again, qkv, length * width, 1e-5);
        free(qkv);
    }
    free(half), free(x), free(out), free(again), free((void *)a.cos), free((void *)a.sin), free((void *)a.growth);
    free((void *)a.sinks), free((void *)a.grad), free(a.scratch);
}

/* Checks the gradients of a, b and x against sums in double precision, for two segments. The first segment has updates
 * of two slices of the outputs. */
static void check_low_rank_gradients(int64_t in, int64_t out, int64_t rank) {
    enum { ROWS = 70, SPLIT = 41 };
    bf16 *x = halves(ROWS * in);
    float *grad = floats(ROWS * 2 * out), *of_x = floats(ROWS * in), *before = floats(ROWS * in);
    float *again = floats(ROWS * in);
    memcpy(before, of_x, ROWS * in * 4), memcpy(again, of_x, ROWS * in * 4);
    Update updates[3];
    double *expected = calloc(ROWS * in, 8), *of_a = calloc(rank * in, 8), *of_b = calloc(rank * out, 8);
    for (int64_t i = 0; i < ROWS * in; i++) expected[i] = before[i];
    for (int n = 0; n < 3; n++) {
        int64_t first = n < 2 ? 0 : SPLIT, rows = n < 2 ? SPLIT : ROWS - SPLIT;
        updates[n] = (Update){x + first * in, floats(rank * in), floats(rank * out), grad + first * 2 * out + n % 2 * out,
                              floats(rank * in), floats(rank * out), of_x + first * in, floats(rank * rows),
                              floats(rank * rows), rows, rank, in, out, in, 2 * out, 1, n % 2};
    }
    turret_low_rank_gradients(updates, 3, threads);
    for (int n = 0; n < 3; n++) {
        const Update *u = updates + n;
        memset(of_a, 0, rank * in * 8), memset(of_b, 0, rank * out * 8);
        for (int64_t r = 0; r < u->rows; r++)
            for (int64_t k = 0; k < rank; k++) {
                double z = 0, of_z = 0;
                const bf16 *xr = (const bf16 *)u->x + r * in;
                for (int64_t i = 0; i < in; i++) z += to_f32(xr[i]) * u->a[k * in + i];
                for (int64_t o = 0; o < out; o++) of_z += u->grad[r * 2 * out + o] * u->b[k * out + o];
                for (int64_t i = 0; i < in; i++) {
                    of_a[k * in + i] += of_z * to_f32(xr[i]);
                    expected[(xr - x) + i] += of_z * u->a[k * in + i];
                }
                for (int64_t o = 0; o < out; o++) of_b[k * out + o] += z * u->grad[r * 2 * out + o];
            }
        near("gradient of a", u->of_a, of_a, rank * in, 1e-5);
        near("gradient of b", u->of_b, of_b, rank * out, 1e-5);
        Update alone = *u;
        alone.of_x = again + (u->of_x - of_x), alone.of_a = floats(rank * in), alone.of_b = floats(rank * out);
        alone.turn = 0;
        turret_low_rank_gradients(&alone, 1, threads);
        same("gradient of a", alone.of_a, u->of_a, rank * in * 4);
        same("gradient of b", alone.of_b, u->of_b, rank * out * 4);
        free(alone.of_a), free(alone.of_b);
    }
    near("gradient of x", of_x, expected, ROWS * in, 1e-5);
    same("gradient of x", again, of_x, ROWS * in * 4);
    for (int n = 0; n < 3; n++) {
        Update u = updates[n];
        free((void *)u.a), free((void *)u.b), free(u.of_a), free(u.of_b), free(u.z), free(u.of_z);
    }
    free(x), free(grad), free(of_x), free(before), free(again), free(expected), free(of_a), free(of_b);
}

/* Checks the log softmax, and the gradient of the targets' log probabilities by the logits, against their formulas. */
static void check_logits(int64_t width) {
    bf16 *x = halves(MAX_ROWS * width), *grads = halves(MAX_ROWS * width), *one = halves(width);
    float *wide = floats(MAX_ROWS * width), *out = floats(MAX_ROWS * width), *slopes = floats(MAX_ROWS);
    float *sums = floats(2 * MAX_ROWS), *other = floats(2 * MAX_ROWS), *again = floats(width);
    double *expected = calloc(MAX_ROWS * width, 8), *of_logits = calloc(MAX_ROWS * width, 8);
    int64_t targets[MAX_ROWS];
    for (int64_t r = 0; r < MAX_ROWS; r++) {
        double sum = 0;
        targets[r] = rand() % width;
        for (int64_t i = r * width; i < (r + 1) * width; i++)
            wide[i] = to_f32(x[i] = to_bf16(20 * noise())), sum += exp(wide[i]);
        for (int64_t i = 0; i < width; i++) {
            expected[r * width + i] = wide[r * width + i] - log(sum);
            of_logits[r * width + i] = slopes[r] * ((i == targets[r]) - exp(wide[r * width + i]) / sum);
        }
    }
    turret_log_softmax(wide, out, sums, MAX_ROWS, width, threads);
    near("log softmax", out, expected, MAX_ROWS * width, 1e-6);
    turret_log_sums(x, other, MAX_ROWS, width, threads);
    same("sums of narrow logits", other, sums, 2 * MAX_ROWS * 4);
    memcpy(grads, x, MAX_ROWS * width * sizeof(bf16));
    turret_logit_gradients(grads, sums, targets, slopes, MAX_ROWS, width, threads);
    near_bf16("gradient of logits", grads, of_logits, MAX_ROWS * width);
    for (int64_t r = 0; r < MAX_ROWS; r++) {
        turret_log_softmax(wide + r * width, again, other, 1, width, threads);
        same("log softmax", again, out + r * width, width * 4);
        memcpy(one, x + r * width, width * sizeof(bf16));
        turret_logit_gradients(one, other, targets + r, slopes + r, 1, width, threads);
        same("gradient of logits", one, grads + r * width, width * sizeof(bf16));
    }
    free(x), free(grads), free(one), free(wide), free(out), free(slopes), free(sums), free(other), free(again);
    free(expected), free(of_logits);
}

/* Checks products with a transposed NF4 weight, or with a bf16 weight if `values` is null. */
static void check_transposed(const double *values, int64_t out, int64_t in) {
    const char *name = values ? "transposed nf4" : "transposed";
    float *grad = floats(PRODUCT_ROWS * out), *dx = floats(PRODUCT_ROWS * in), *one = floats(in);
    bf16 *half = halves(PRODUCT_ROWS * out), *w = halves(out * in), *scale = halves((in + 63) / 64 * out);
    bf16 *scratch = halves(PRODUCT_ROWS * (out + 31));
    uint8_t *packed = malloc(out * in / 2 + 256);
    double *expected = calloc(PRODUCT_ROWS * in, 8);
    for (int64_t i = 0; i < PRODUCT_ROWS * out; i++) half[i] = to_bf16(grad[i]);
    for (int64_t i = 0; i < out * in / 2; i++) packed[i] = rand();
    for (int64_t o = 0; o < out; o++)
        for (int64_t k = 0; k < in; k++) {
            double weight = to_f32(w[o * in + k]);
            if (values) {
                uint8_t byte = packed[o / 32 * 16 * in + k / 2 * 32 + o % 16 * 2 + k % 2];
                weight = values[o % 32 < 16 ? byte & 15 : byte >> 4] * to_f32(scale[k / 64 * out + o]);
            }
            for (int64_t r = 0; r < PRODUCT_ROWS; r++) expected[r * in + k] += grad[r * out + o] * weight;
        }
#define MULTIPLY(grad, is_rounded, rows, dx)                                                                    \
    if (values) turret_nf4_transposed_product(grad, is_rounded, rows, packed, scale, dx, out, in, threads, scratch); \
    else turret_transposed_product(grad, is_rounded, rows, w, dx, out, in, threads, scratch)
    MULTIPLY(grad, 0, PRODUCT_ROWS, dx);
    near(name, dx, expected, PRODUCT_ROWS * in, 8e-3);
    for (int64_t r = 0; r < PRODUCT_ROWS; r++) {
        MULTIPLY(grad + r * out, 0, 1, one);
        same(name, one, dx + r * in, in * 4);
        MULTIPLY(half + r * out, 1, 1, one);
        same("a rounded gradient", one, dx + r * in, in * 4);
    }
#undef MULTIPLY
    free(grad), free(dx), free(one), free(half), free(w), free(scale), free(scratch), free(packed), free(expected);
}

static void check_gradients(const double *nf4) {
    check_between(7, 0), check_between(64, 1), check_between(100, 0), check_between(39, 1);
    check_attention_gradient(3, 1, 64, 0, 0, 0, 44), check_attention_gradient(8, 2, 32, 20, 2, 1, 75);
    check_attention_gradient(4, 4, 96, 7, 0, 1, 33), check_attention_gradient(6, 3, 32, 0, 0.5, 0, 17);
    check_low_rank_gradients(64, 96, 8), check_low_rank_gradients(70, 33, 3), check_low_rank_gradients(192, 40, 19);
    check_logits(7), check_logits(64), check_logits(1003);
    check_transposed(0, 70, 64), check_transposed(0, 1003, 96), check_transposed(0, 3, 32);
    check_transposed(nf4, 64, 64), check_transposed(nf4, 96, 192), check_transposed(nf4, 1056, 128);
}
