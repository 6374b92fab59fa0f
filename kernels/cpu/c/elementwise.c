/* The operations of a decoder layer between its matrix products, each in one pass over the data. */
#include "elements.h"
#include "entries.h"
#include "team.h"

#include <math.h>

/* For one row: hidden += delta, rounded to the type of hidden; then out = rms_norm(hidden) * weight. delta may be
 * null. RMSNorm: arXiv 1910.07467. */
KERNEL static void norm_row(element *hidden, const element *delta, const float *weight, float eps,
                            element *out, int64_t width) {
    f32x16 squares = {0};
    float rest = 0;
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
        f32x16 x = load_element(hidden + i);
        if (delta) {
            store_element(hidden + i, x + load_element(delta + i));
            x = load_element(hidden + i);
        }
        squares += x * x;
    }
    for (; i < width; i++) {
        if (delta) hidden[i] = to_element(from_element(hidden[i]) + from_element(delta[i]));
        rest += from_element(hidden[i]) * from_element(hidden[i]);
    }
    float scale = 1.0f / sqrtf((sum_lanes(squares) + rest) / (float)width + eps);
    for (i = 0; i + LANES <= width; i += LANES)
        store_element(out + i, load_element(hidden + i) * scale * load_f32(weight + i));
    for (; i < width; i++) out[i] = to_element(from_element(hidden[i]) * scale * weight[i]);
}

typedef struct {
    element *hidden;
    const element *delta;
    const float *weight;
    double eps;
    element *out;
    int64_t width;
} Norm;

static void norm_piece(const void *job, int64_t thread, int64_t r) {
    const Norm *n = job;
    (void)thread;
    norm_row(n->hidden + r * n->width, n->delta ? n->delta + r * n->width : 0, n->weight,
             (float)n->eps, n->out + r * n->width, n->width);
}

EXPORT void EXPORTED(turret_add_rms_norm)(element *hidden, const element *delta, const float *weight, double eps,
                                element *out, int64_t rows, int64_t width, int64_t threads) {
    Norm norm = {hidden, delta, weight, eps, out, width};
    in_pieces(norm_piece, &norm, rows, rows * width > SMALL ? threads : 1);
}

/* silu, x * sigmoid(x), or gelu in its tanh form, which is x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)). */
INLINE f32x16 activation(f32x16 x, const int is_gelu) {
    f32x16 y = x;
    if (is_gelu) y = 1.5957691216f * (x + 0.044715f * x * x * x);
    return x / (1.0f + exp_vec(-y));
}

INLINE void gated_row(const element *gate, const element *up, element *out, int64_t count, const int is_gelu) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        store_element(out + i, activation(load_element(gate + i), is_gelu) * load_element(up + i));
    if (i < count) {
        element g[LANES] = {0}, u[LANES] = {0}, o[LANES];
        memcpy(g, gate + i, (count - i) * sizeof(element));
        memcpy(u, up + i, (count - i) * sizeof(element));
        store_element(o, activation(load_element(g), is_gelu) * load_element(u));
        memcpy(out + i, o, (count - i) * sizeof(element));
    }
}

KERNEL static void silu_row(const element *gate, const element *up, element *out, int64_t count) {
    gated_row(gate, up, out, count, 0);
}

KERNEL static void gelu_row(const element *gate, const element *up, element *out, int64_t count) {
    gated_row(gate, up, out, count, 1);
}

typedef struct {
    const element *gate_up; /* [rows, 2 * width] */
    element *out;
    int64_t width;
    void (*row)(const element *, const element *, element *, int64_t);
} Gated;

/* Each row is divided into two pieces. */
static void gated_piece(const void *job, int64_t thread, int64_t piece) {
    const Gated *g = job;
    int64_t width = g->width, half = (width / 2 + LANES - 1) / LANES * LANES;
    const element *gate = g->gate_up + piece / 2 * 2 * width;
    int64_t low = piece % 2 ? half : 0, high = piece % 2 ? width : half < width ? half : width;
    (void)thread;
    if (low < high)
        g->row(gate + low, gate + width + low, g->out + piece / 2 * width + low, high - low);
}

EXPORT void EXPORTED(turret_silu_mul)(const element *gate_up, element *out, int64_t rows, int64_t width,
                            int64_t threads) {
    Gated gated = {gate_up, out, width, silu_row};
    in_repeatable_pieces(gated_piece, &gated, 2 * rows, rows * width > SMALL ? threads : 1);
}

EXPORT void EXPORTED(turret_gelu_mul)(const element *gate_up, element *out, int64_t rows, int64_t width,
                            int64_t threads) {
    Gated gated = {gate_up, out, width, gelu_row};
    in_repeatable_pieces(gated_piece, &gated, 2 * rows, rows * width > SMALL ? threads : 1);
}

/* (up + 1) * gate * sigmoid(alpha * gate), with gates capped at the limit and ups clamped to [-limit, limit];
 * gates and ups alternate. NaN stays NaN. */
INLINE f32x16 clamped_swiglu(f32x16 first, f32x16 second, float alpha, float limit) {
    f32x16 gate = PICK(first, second, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    f32x16 up = PICK(first, second, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    gate = -max_vec(splat(-limit), -gate);
    up = -max_vec(splat(-limit), -max_vec(splat(-limit), up));
    return (up + 1.0f) * (gate / (1.0f + exp_vec(-alpha * gate)));
}

typedef struct {
    const element *gate_up; /* [rows, 2 * width] */
    element *out;
    int64_t width;
    float alpha, limit;
} Clamped;

KERNEL static void clamped_piece(const void *job, int64_t thread, int64_t row) {
    const Clamped *c = job;
    const element *x = c->gate_up + row * 2 * c->width;
    element *out = c->out + row * c->width;
    int64_t i = 0, count = c->width;
    (void)thread;
    for (; i + LANES <= count; i += LANES)
        store_element(out + i, clamped_swiglu(load_element(x + 2 * i), load_element(x + 2 * i + LANES),
                                              c->alpha, c->limit));
    if (i < count) {
        element some[2 * LANES] = {0}, o[LANES];
        memcpy(some, x + 2 * i, 2 * (count - i) * sizeof(element));
        store_element(o, clamped_swiglu(load_element(some), load_element(some + LANES), c->alpha,
                                        c->limit));
        memcpy(out + i, o, (count - i) * sizeof(element));
    }
}

EXPORT void EXPORTED(turret_clamped_swiglu)(const element *gate_up, element *out, int64_t rows, int64_t width,
                                  double alpha, double limit, int64_t threads) {
    Clamped clamped = {gate_up, out, width, (float)alpha, (float)limit};
    in_repeatable_pieces(clamped_piece, &clamped, rows, rows * width > SMALL ? threads : 1);
}

/* Applies rotary positions (arXiv 2104.09864) to the first 2 * pairs features of a head. Pairs are
 * (i, i + pairs), or neighbours if they are interleaved. The other features are copied. */
INLINE void rotate(const element *x, const float *cos, const float *sin, float *out, int64_t dim,
                   int64_t pairs, int64_t is_interleaved) {
    int64_t i = 0, second = is_interleaved ? 1 : pairs, step = is_interleaved ? 2 : 1;
    for (; !is_interleaved && i + LANES <= pairs; i += LANES) {
        f32x16 a = load_element(x + i), b = load_element(x + pairs + i);
        f32x16 c = load_f32(cos + i), s = load_f32(sin + i);
        store_f32(out + i, a * c - b * s);
        store_f32(out + pairs + i, b * c + a * s);
    }
    for (; i < pairs; i++) {
        float a = from_element(x[step * i]), b = from_element(x[step * i + second]);
        out[step * i] = a * cos[i] - b * sin[i];
        out[step * i + second] = b * cos[i] + a * sin[i];
    }
    for (i = 2 * pairs; i < dim; i++) out[i] = from_element(x[i]);
}

typedef struct {
    int64_t heads, kv_heads, dim, pairs, is_interleaved;
} Shape;

/* Queries are stored in fp32; keys and values go to their slots of the cache. */
KERNEL static void rope_row(const element *qkv, const float *cos, const float *sin, float *q, element *k,
                            element *v, const Shape *shape) {
    int64_t heads = shape->heads, kv_heads = shape->kv_heads, dim = shape->dim;
    for (int64_t h = 0; h < heads; h++)
        rotate(qkv + h * dim, cos, sin, q + h * dim, dim, shape->pairs, shape->is_interleaved);
    for (int64_t h = 0; h < kv_heads; h++) {
        float key[512];
        rotate(qkv + (heads + h) * dim, cos, sin, key, dim, shape->pairs, shape->is_interleaved);
        for (int64_t i = 0; i < dim; i += LANES) store_element(k + h * dim + i, load_f32(key + i));
    }
    memcpy(v, qkv + (heads + kv_heads) * dim, kv_heads * dim * sizeof(element));
}

typedef struct {
    const element *qkv;
    const float *cos, *sin;
    const int64_t *slots;
    float *q;
    element *k_cache, *v_cache;
    Shape shape;
} Rope;

static void rope_piece(const void *job, int64_t thread, int64_t r) {
    const Rope *p = job;
    const Shape *s = &p->shape;
    int64_t width = s->kv_heads * s->dim, slot = p->slots[r] * width;
    (void)thread;
    rope_row(p->qkv + r * (s->heads * s->dim + 2 * width), p->cos + r * s->pairs,
             p->sin + r * s->pairs, p->q + r * s->heads * s->dim, p->k_cache + slot,
             p->v_cache + slot, s);
}

EXPORT void EXPORTED(turret_rope_kv_write)(const element *qkv, const float *cos, const float *sin,
                                 const int64_t *slots, float *q, element *k_cache, element *v_cache,
                                 int64_t rows, int64_t heads, int64_t kv_heads, int64_t dim,
                                 int64_t pairs, int64_t is_interleaved, int64_t threads) {
    Rope rope = {qkv, cos, sin, slots, q, k_cache, v_cache,
                 {heads, kv_heads, dim, pairs, is_interleaved}};
    in_repeatable_pieces(rope_piece, &rope, rows, rows * heads * dim > SMALL ? threads : 1);
}

#ifdef ELEMENT_F32
/* Replaces x by e^x in place. */
EXPORT KERNEL void turret_exp_f32(float *x, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store_f32(x + i, exp_vec(load_f32(x + i)));
    if (i < count) {
        float some[LANES] = {0};
        memcpy(some, x + i, (count - i) * sizeof(float));
        store_f32(some, exp_vec(load_f32(some)));
        memcpy(x + i, some, (count - i) * sizeof(float));
    }
}
#endif
