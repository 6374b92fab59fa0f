/* All layers of a step in one call. The loop is that of server/models/decoding/decoder.py over the same kernels,
 * and its results have the same bits. Calling the kernels one by one from Python makes a step of one row 1.5 times
 * as slow.
 */
#include "entries.h"
#include "team.h"

enum Projection { QKV, O, GATE_UP, DOWN, PROJECTIONS };

/* A weight is packed and has absmax (see nf4_product.c), or is dense, [out, in]. */
typedef struct {
    const uint8_t *packed;
    const bf16 *absmax, *dense;
    const bf16 *bias; /* [out], or null */
    int64_t out_features, in_features;
} Linear;

/* Norms are [hidden], or null where there is none. */
typedef struct {
    const float *before_attention, *after_attention, *before_mlp, *after_mlp;
    const float *q_norm, *k_norm; /* [head_dim], or as wide as all heads together */
    bf16 *keys, *values;
    int64_t rope, window; /* indices into the pass's rotations and plans */
    Linear linears[PROJECTIONS];
} Layer;

typedef struct {
    const Layer *layers;
    const float *norm; /* the norm after the last layer */
    int64_t num_layers, hidden, heads, kv_heads, head_dim, block_size;
    int64_t q_norm_width, k_norm_width, is_interleaved, is_gelu;
    double eps, residual_scale, attention_scale, attention_softcap;
} Model;

typedef struct {
    const float *cos, *sin; /* [rows, pairs] */
    int64_t pairs;
} Rope;

/* The place of an adapted projection in the step's adapters. */
typedef struct {
    const int64_t *shape;
    int64_t module;
} Place;

typedef struct {
    bf16 *hidden;  /* [rows, hidden]: input, which is overwritten */
    bf16 *out;     /* [rows, hidden] */
    bf16 *normed;  /* [rows, hidden] */
    bf16 *wide;    /* [rows, the most outputs]: results of qkv and gate_up */
    bf16 *narrow;  /* [rows, the most inputs]: inputs of o and down */
    bf16 *delta;   /* [rows, hidden] */
    float *q;      /* [rows, heads, head_dim] */
    const int64_t *slots; /* [rows] */
    const Rope *ropes;
    const Plan *const *plans; /* by window */
    const Step *adapters;     /* or null */
    const Place *places;      /* [layers, PROJECTIONS], with adapters */
    const Inputs *inputs;     /* [PROJECTIONS], or null */
    float *scratch;           /* see turret_dense_product; wide enough for every dense weight */
    bf16 *changed;            /* [slices, rows, in]: inputs of a projection after adapters changed them */
    int64_t updates;          /* bit mask of the projections that adapters change */
    int64_t base_low, base_high; /* range of the rows without adapters */
    int64_t rows, threads;
} Pass;

typedef struct {
    bf16 *x;
    const bf16 *y; /* [width] or, by rows, [rows, width] */
    int64_t width, y_stride;
} Sum;

KERNEL static void add_row(const void *job, int64_t thread, int64_t row) {
    const Sum *s = job;
    bf16 *x = s->x + row * s->width;
    const bf16 *y = s->y + row * s->y_stride;
    (void)thread;
    for (int64_t i = 0; i < s->width; i++) x[i] = to_bf16(to_f32(x[i]) + to_f32(y[i]));
}

static void add(bf16 *x, const bf16 *y, int64_t rows, int64_t width, int64_t y_stride,
                int64_t threads) {
    Sum sum = {x, y, width, y_stride};
    in_pieces(add_row, &sum, rows, rows * width > SMALL ? threads : 1);
}

/* The product with a dense weight. x is [rows, in], or [slices, rows, in] if each slice of the outputs has its own
 * input. The bits of an output do not depend on the other outputs. */
static void multiply_dense(const Pass *p, const Linear *w, const bf16 *x, bf16 *y, int64_t slices,
                           const int64_t *shape) {
    int64_t in = w->in_features, out = w->out_features;
    const int64_t *widths = slices > 1 ? shape + 3 : &out;
    const bf16 *weight = w->dense;
    for (int64_t s = 0; s < slices; s++, x += p->rows * in) {
        turret_dense_product(x, in, p->rows, weight, y, out, widths[s], in, p->threads, p->scratch);
        weight += widths[s] * in;
        y += widths[s];
    }
}

/* y = W x, where adapters may have changed x. */
static void multiply(const Pass *p, const Linear *w, const Place *place, const Inputs *inputs,
                     const bf16 *x, bf16 *y) {
    int64_t in = w->in_features, out = w->out_features, module = place ? place->module : 0;
    if (inputs && inputs->count) {
        turret_change_inputs(p->adapters, module, inputs, x, p->rows, in, p->changed);
        x = p->changed;
    }
    if (w->dense)
        multiply_dense(p, w, x, y, inputs && inputs->count > 1 ? inputs->count : 1, place ? place->shape : 0);
    else if (inputs && inputs->count > 1)
        turret_nf4_slices(x, p->rows, w->packed, w->absmax, y, out, in, p->threads, p->adapters,
                          place->shape);
    else
        turret_nf4_product(x, in, p->rows, w->packed, w->absmax, y, out, in, p->threads, p->adapters,
                           module);
}

/* y = G * (W x) + b + the adapters' updates. */
static void project(const Model *model, const Pass *p, int64_t layer, int projection, const bf16 *x,
                    bf16 *y) {
    const Linear *w = &model->layers[layer].linears[projection];
    const Place *place = p->adapters ? &p->places[layer * PROJECTIONS + projection] : 0;
    multiply(p, w, place, p->inputs ? &p->inputs[projection] : 0, x, y);
    int64_t low = 0, high = p->rows;
    if (place && p->updates >> projection & 1) {
        turret_adapt(p->adapters, place->shape, x, w->in_features, y, w->out_features, w->bias);
        low = p->base_low, high = p->base_high;
    }
    if (w->bias && low < high)
        add(y + low * w->out_features, w->bias, high - low, w->out_features, 0, p->threads);
}

typedef struct {
    bf16 *qkv;
    const Model *model;
    const Layer *layer;
} HeadNorms;

static void norm_heads(const void *job, int64_t thread, int64_t row) {
    const HeadNorms *n = job;
    const Model *m = n->model;
    int64_t q = m->heads * m->head_dim, k = m->kv_heads * m->head_dim;
    bf16 *at = n->qkv + row * (q + 2 * k);
    (void)thread;
    turret_add_rms_norm(at, 0, n->layer->q_norm, m->eps, at, q / m->q_norm_width, m->q_norm_width, 1);
    at += q;
    turret_add_rms_norm(at, 0, n->layer->k_norm, m->eps, at, k / m->k_norm_width, m->k_norm_width, 1);
}

/* Adds the result of the previous part (attention or MLP) to the residual stream, if there is one, and computes
 * the input of the next part. */
static const bf16 *enter(const Model *m, const Pass *p, const bf16 *delta, const float *norm) {
    if (norm) {
        turret_add_rms_norm(p->hidden, delta, norm, m->eps, p->normed, p->rows, m->hidden, p->threads);
        return p->normed;
    }
    if (delta) add(p->hidden, delta, p->rows, m->hidden, m->hidden, p->threads);
    return p->hidden;
}

/* Computes the term that is added to the residual stream from the result of attention or MLP. */
static void leave(const Model *m, const Pass *p, const float *norm) {
    int64_t count = p->rows * m->hidden;
    if (norm)
        turret_add_rms_norm(p->delta, 0, norm, m->eps, p->delta, p->rows, m->hidden, p->threads);
    if (m->residual_scale != 1.0)
        for (int64_t i = 0; i < count; i++)
            p->delta[i] = to_bf16(to_f32(p->delta[i]) * (float)m->residual_scale);
}

static void attend(const Model *m, const Pass *p, const Layer *layer) {
    const Rope *rope = &p->ropes[layer->rope];
    Heads heads = {p->q, layer->keys, layer->values, p->narrow, m->heads, m->kv_heads, m->head_dim,
                   m->block_size, m->attention_scale, m->attention_softcap, 0};
    if (layer->q_norm) {
        HeadNorms norms = {p->wide, m, layer};
        int64_t elements = p->rows * m->heads * m->head_dim;
        in_pieces(norm_heads, &norms, p->rows, elements > SMALL ? p->threads : 1);
    }
    turret_rope_kv_write(p->wide, rope->cos, rope->sin, p->slots, p->q, layer->keys, layer->values,
                         p->rows, m->heads, m->kv_heads, m->head_dim, rope->pairs, m->is_interleaved,
                         p->threads);
    turret_attend(p->plans[layer->window], &heads);
}

EXPORT void turret_layers(const Model *m, const Pass *p) {
    const bf16 *delta = 0;
    for (int64_t n = 0; n < m->num_layers; n++) {
        const Layer *layer = &m->layers[n];
        const bf16 *normed = enter(m, p, delta, layer->before_attention);
        project(m, p, n, QKV, normed, p->wide);
        attend(m, p, layer);
        project(m, p, n, O, p->narrow, p->delta);
        leave(m, p, layer->after_attention);
        normed = enter(m, p, p->delta, layer->before_mlp);
        project(m, p, n, GATE_UP, normed, p->wide);
        (m->is_gelu ? turret_gelu_mul : turret_silu_mul)(
            p->wide, p->narrow, p->rows, layer->linears[DOWN].in_features, p->threads);
        project(m, p, n, DOWN, p->narrow, p->delta);
        leave(m, p, layer->after_mlp);
        delta = p->delta;
    }
    turret_add_rms_norm(p->hidden, delta, m->norm, m->eps, p->out, p->rows, m->hidden, p->threads);
}
