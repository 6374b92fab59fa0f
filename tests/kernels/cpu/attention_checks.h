/* Checks rotation into a paged cache, and attention over it, against loops in double precision. */
#include "native_checks.h"

typedef struct {
    int64_t first_row, num_new, num_context, num_padding;
    const int64_t *blocks;
} Span;
typedef struct {
    const Span *spans;
    float *scratch;
    int64_t num_spans, scratch_stride, num_threads, window;
} Plan;
typedef struct {
    const void *q, *k, *v;
    void *out;
    int64_t heads, kv_heads, head_dim, block_size;
    double scale, softcap;
    const float *sinks;
} Heads;
#define POSITIONS 80

/* Checks prompts of several lengths, then each row alone. */
static void check_attention(int64_t heads, int64_t kv_heads, int64_t dim, int64_t window, double cap,
                            int has_sinks) {
    int64_t blocks[POSITIONS / 16], slots[POSITIONS], rows = 20, per = heads + 2 * kv_heads;
    float *k = floats(POSITIONS * kv_heads * dim), *v = floats(POSITIONS * kv_heads * dim);
    float *qkv = floats(rows * per * dim), *cos = floats(rows * dim / 2), *sin = floats(rows * dim / 2);
    float *q = floats(rows * heads * dim), *out = floats(rows * heads * dim), *one = floats(rows * heads * dim);
    int64_t stride = fmax(heads, 48) * (2 * dim + POSITIONS + 32);
    float *scratch = floats(threads * stride);
    double *expected = calloc(rows * heads * dim, sizeof(double));
    float *sinks = has_sinks ? floats(heads) : 0;
    for (int64_t i = 0; i < POSITIONS / 16; i++) blocks[i] = (i * 3 + 1) % (POSITIONS / 16);
    Span spans[2] = {{0, 13, 45, 2, blocks}, {13, 7, 0, 0, blocks + 4}};
    for (int64_t i = 0; i < 13; i++) slots[i] = blocks[(45 + i) / 16] * 16 + (45 + i) % 16;
    for (int64_t i = 0; i < 7; i++) slots[13 + i] = blocks[4] * 16 + i;
    turret_rope_kv_write_f32(qkv, cos, sin, slots, q, k, v, rows, heads, kv_heads, dim, dim / 2, 0, threads);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t h = 0; h < heads + kv_heads; h++)
            for (int64_t i = 0; i < dim; i++) {
                const float *head = qkv + (r * per + h) * dim;
                double c = cos[r * dim / 2 + i % (dim / 2)], s = sin[r * dim / 2 + i % (dim / 2)];
                double turned = i < dim / 2 ? head[i] * c - head[i + dim / 2] * s : head[i] * c + head[i - dim / 2] * s;
                float found = h < heads ? q[(r * heads + h) * dim + i] : k[(slots[r] * kv_heads + h - heads) * dim + i];
                if (!(fabs(found - turned) < 1e-5)) fail("rope", "value", i, found, turned);
            }
    /* softmax(q k / 8) v over the keys that a row sees. A sink only adds to the sum of the softmax. */
    for (int s = 0; s < 2; s++)
        for (int64_t n = 0; n < spans[s].num_new; n++)
            for (int64_t h = 0; h < heads; h++) {
                int64_t end = spans[s].num_context + n + 1, low = spans[s].num_padding, row = spans[s].first_row + n;
                if (window && end - window > low) low = end - window;
                double total = sinks ? exp(sinks[h]) : 0, *to = expected + (row * heads + h) * dim;
                for (int64_t t = low; t < end; t++) {
                    int64_t at = ((spans[s].blocks[t / 16] * 16 + t % 16) * kv_heads + h / (heads / kv_heads)) * dim;
                    double score = 0;
                    for (int64_t i = 0; i < dim; i++) score += (double)q[(row * heads + h) * dim + i] * k[at + i];
                    score *= 0.125;
                    total += score = exp(cap ? cap * tanh(score / cap) : score);
                    for (int64_t i = 0; i < dim; i++) to[i] += score * v[at + i];
                }
                for (int64_t i = 0; i < dim; i++) to[i] /= total;
            }
    Plan plan = {spans, scratch, 2, stride, threads, window};
    Heads of = {q, k, v, out, heads, kv_heads, dim, 16, 0.125, cap, sinks};
    turret_attend_f32(&plan, &of);
    near("attention", out, expected, rows * heads * dim, 1e-5);
    bf16 *hk = halves(POSITIONS * kv_heads * dim), *hv = halves(POSITIONS * kv_heads * dim);
    bf16 *hout = halves(rows * heads * dim), *hone = halves(rows * heads * dim);
    for (int64_t i = 0; i < POSITIONS * kv_heads * dim; i++) hk[i] = to_bf16(k[i]), hv[i] = to_bf16(v[i]);
    /* A block may hold anything after the last key of its span. */
    for (int64_t t = 58; t < 64; t++)
        for (int64_t i = 0; i < kv_heads * dim; i++) {
            int64_t at = (blocks[t / 16] * 16 + t % 16) * kv_heads * dim + i;
            hk[at] = hv[at] = 0x7fc0;
        }
    Heads half = {q, hk, hv, hout, heads, kv_heads, dim, 16, 0.125, cap, sinks};
    turret_attend(&plan, &half);
    near_bf16("attention", hout, expected, rows * heads * dim);
    add_bits(hout, rows * heads * dim);
    /* An infinite value spoils the rows that see it, and no others. */
    hv[(blocks[3] * 16 + 2) * kv_heads * dim] = 0x7f80;
    turret_attend(&plan, &half);
    of.out = one, half.out = hone;
    for (int s = 0; s < 2; s++)
        for (int64_t n = 0; n < spans[s].num_new; n++) {
            Span alone = {spans[s].first_row + n, 1, spans[s].num_context + n, spans[s].num_padding, spans[s].blocks};
            plan.spans = &alone, plan.num_spans = 1;
            turret_attend_f32(&plan, &of);
            turret_attend(&plan, &half);
            int64_t at = alone.first_row * heads * dim;
            same("attention", one + at, out + at, heads * dim * sizeof(float));
            same("attention in bf16", hone + at, hout + at, heads * dim * sizeof(bf16));
        }
    free(k), free(v), free(qkv), free(cos), free(sin), free(q), free(out), free(one), free(scratch);
    free(expected), free(hk), free(hv), free(hout), free(hone), free(sinks);
}
