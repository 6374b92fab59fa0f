/* All layers of a step in one call. The loop is that of server/models/decoding/decoder.py over the same kernels,
 * and its results have the same bits. Calling the kernels one by one from Python makes a step of one row 1.5 times
 * as slow.
 */
#include "entries.h"
#include "team.h"

enum Projection { QKV, O, GATE_UP, DOWN, ROUTER, PROJECTIONS };
enum Activation { SILU, GELU, CLAMPED_SWIGLU };

/* A weight is packed and has absmax (see nf4_product.c), or is dense, [out, in]. */
typedef struct {
    const uint8_t *packed;
    const bf16 *absmax, *dense;
    const bf16 *bias; /* [out], or null */
    int64_t out_features, in_features;
} Linear;

/* One projection of a layer's experts. */
typedef struct {
    const void *const *weights; /* the codes and absmax of each expert */
    const bf16 *bias;           /* [experts, out], or null */
    int64_t is_mxfp4, out_features, in_features;
} ExpertLinear;

/* Norms are [hidden], or null where there is none. A layer has gate_up and down, or router and experts. */
typedef struct {
    const float *before_attention, *after_attention, *before_mlp, *after_mlp;
    const float *q_norm, *k_norm; /* [head_dim], or as wide as all heads together */
    const float *sinks;           /* [heads], or null */
    bf16 *keys, *values;
    int64_t rope, window; /* indices into the pass's rotations and plans */
    Linear linears[PROJECTIONS];
    ExpertLinear experts[2]; /* gate_up, down; zeros for a layer with an MLP */
} Layer;

typedef struct {
    const Layer *layers;
    const float *norm; /* the norm after the last layer */
    int64_t num_layers, hidden, heads, kv_heads, head_dim, block_size;
    int64_t q_norm_width, k_norm_width, is_interleaved, activation;
    int64_t experts, per_token, normalizes; /* see kernels/expert_routing.py */
    double eps, residual_scale, attention_scale, attention_softcap;
    double alpha, limit; /* of CLAMPED_SWIGLU */
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

/* One call's rows, and memory for their intermediate results. A pair is a row and one of its experts. */
typedef struct {
    bf16 *hidden;         /* [rows, hidden]: input, which is overwritten */
    bf16 *out;            /* [rows, hidden] */
    bf16 *normed;         /* [rows, hidden] */
    bf16 *wide;           /* [rows, max outputs]: results of qkv, gate_up and router; for experts, [pairs, outputs] */
    bf16 *narrow;         /* [rows, max inputs]: inputs of o and down; for experts, [pairs, inputs] */
    bf16 *delta;          /* [rows, hidden] */
    float *q;             /* [rows, heads, head_dim] */
    const int64_t *slots; /* [rows] */
    const Rope *ropes;
    const Plan *const *plans;          /* by window */
    const Step *adapters;              /* or null */
    const Place *places;               /* [layers, PROJECTIONS], if there are adapters */
    const Inputs *inputs;              /* [PROJECTIONS], or null */
    const ExpertStep *expert_adapters; /* or null */
    int64_t *chosen;                   /* [rows, per_token]: the experts of each row, by descending weight */
    int64_t *pair_places;              /* [rows, per_token]: index of each pair when the pairs are sorted by expert */
    int64_t *pair_rows, *pair_experts; /* [pairs]: the row and the expert of each sorted pair */
    int64_t *ends;                     /* [experts]: where the sorted pairs of each expert end */
    float *weights;     /* [rows, per_token + experts]: the weights of `chosen`, then scratch memory */
    float *scratch;     /* see turret_dense_product; wide enough for every dense weight */
    bf16 *changed;      /* [slices, rows, in]: inputs of a projection after adapters changed them */
    int64_t updates;    /* bit mask of the projections that adapters change */
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
                   m->block_size, m->attention_scale, m->attention_softcap, layer->sinks};
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

static void activate(const Model *m, const Pass *p, int64_t rows, int64_t width) {
    if (m->activation == CLAMPED_SWIGLU)
        turret_clamped_swiglu(p->wide, p->narrow, rows, width, m->alpha, m->limit, p->threads);
    else
        (m->activation == GELU ? turret_gelu_mul : turret_silu_mul)(p->wide, p->narrow, rows, width, p->threads);
}

typedef struct {
    const Model *model;
    const Pass *pass;
    const bf16 *x; /* [rows, hidden] */
} Mixture;

static float sum_by_halves(float *x, int64_t count) {
    for (; count > 1; count /= 2) {
        for (int64_t i = 0; i < count / 2; i++) x[i] += x[count / 2 + i];
        if (count % 2) x[count / 2 - 1] += x[count - 1];
    }
    return x[0];
}

/* Chooses the experts of a row, bit for bit as kernels/expert_routing.py does. NaN is first, as in torch's sort.
 * weights: [per_token], then room for as many floats as there are experts. */
EXPORT void turret_choose_experts(const bf16 *scores, int64_t experts, int64_t per_token, int64_t normalizes,
                                  int64_t *chosen, float *weights) {
    float *powers = weights + per_token;
    for (int64_t e = 0; e < experts; e++) {
        int64_t at = least(e, per_token), last = least(e, per_token - 1);
        float score = to_f32(scores[e]);
        for (; at > 0; at--) {
            float other = to_f32(scores[chosen[at - 1]]);
            if (!(score > other || (score != score && other == other))) break;
        }
        if (at > last) continue;
        memmove(chosen + at + 1, chosen + at, (last - at) * sizeof *chosen);
        chosen[at] = e;
    }
    for (int64_t e = 0; e < experts; e++) powers[e] = to_f32(scores[e]) - to_f32(scores[chosen[0]]);
    turret_exp_f32(powers, experts);
    for (int64_t k = 0; k < per_token; k++) weights[k] = powers[chosen[k]];
    if (normalizes) memcpy(powers, weights, per_token * sizeof *powers);
    float sum = sum_by_halves(powers, normalizes ? per_token : experts);
    for (int64_t k = 0; k < per_token; k++) weights[k] /= sum;
}

static void choose_row(const void *job, int64_t thread, int64_t row) {
    const Model *m = ((const Mixture *)job)->model;
    const Pass *p = ((const Mixture *)job)->pass;
    (void)thread;
    turret_choose_experts(p->wide + row * m->experts, m->experts, m->per_token, m->normalizes,
                          p->chosen + row * m->per_token, p->weights + row * (m->per_token + m->experts));
}

/* Orders the pairs by expert; those of an expert keep the order of the rows. */
static void sort_pairs(const Model *m, const Pass *p) {
    int64_t pairs = p->rows * m->per_token, start = 0;
    memset(p->ends, 0, m->experts * sizeof *p->ends);
    for (int64_t i = 0; i < pairs; i++) p->ends[p->chosen[i]]++;
    for (int64_t e = 0; e < m->experts; e++) {
        start += p->ends[e];
        p->ends[e] = start - p->ends[e];
    }
    for (int64_t i = 0; i < pairs; i++) {
        int64_t place = p->ends[p->chosen[i]]++;
        p->pair_places[i] = place;
        p->pair_rows[place] = i / m->per_token;
        p->pair_experts[place] = p->chosen[i];
    }
}

static void copy_input(const void *job, int64_t thread, int64_t pair) {
    const Mixture *mixture = job;
    const Pass *p = mixture->pass;
    int64_t width = mixture->model->hidden;
    (void)thread;
    memcpy(p->narrow + pair * width, mixture->x + p->pair_rows[pair] * width, width * sizeof(bf16));
}

typedef struct {
    const Pass *pass;
    const ExpertLinear *linear;
} ExpertBiases;

static void add_expert_bias(const void *job, int64_t thread, int64_t pair) {
    const ExpertBiases *b = job;
    int64_t out = b->linear->out_features;
    Sum sum = {b->pass->wide + pair * out, b->linear->bias + b->pass->pair_experts[pair] * out, out, 0};
    add_row(&sum, thread, 0);
}

/* Projects the pairs' inputs in `narrow` to `wide`. */
static void project_experts(const Model *m, const Pass *p, int64_t layer, int projection) {
    const ExpertLinear *w = &m->layers[layer].experts[projection];
    int64_t in = w->in_features, out = w->out_features, pairs = p->rows * m->per_token;
    (w->is_mxfp4 ? turret_mxfp4_experts : turret_nf4_experts)(
        p->narrow, in, p->ends, m->experts, w->weights, p->wide, out, in, p->threads);
    ExpertBiases biases = {p, w};
    if (w->bias) in_pieces(add_expert_bias, &biases, pairs, pairs * out > SMALL ? p->threads : 1);
    if (p->expert_adapters) {
        ExpertPairs adapted = {p->narrow, p->wide, p->pair_rows, p->pair_experts, 0, pairs, in, in, out,
                         2 * layer + projection};
        turret_adapt_experts(p->expert_adapters, &adapted);
    }
}

/* Sums the weighted results of a row's experts in the order of the weights. The width is a multiple of LANES, because
 * the number of an expert's inputs is such a multiple. */
KERNEL static void combine_row(const void *job, int64_t thread, int64_t row) {
    const Model *m = ((const Mixture *)job)->model;
    const Pass *p = ((const Mixture *)job)->pass;
    const int64_t *places = p->pair_places + row * m->per_token;
    const float *weights = p->weights + row * (m->per_token + m->experts);
    (void)thread;
    for (int64_t i = 0; i < m->hidden; i += LANES) {
        f32x16 total = {0};
        for (int64_t k = 0; k < m->per_token; k++) {
            f32x16 term = load_bf16(p->wide + places[k] * m->hidden + i) * weights[k];
            __asm__("" : "+m"(term)); /* keeps the product rounded: the compiler would fuse it with the sum */
            total += term;
        }
        store_bf16(p->delta + row * m->hidden + i, total);
    }
}

static void mix_experts(const Model *m, const Pass *p, int64_t layer, const bf16 *x) {
    Mixture mixture = {m, p, x};
    int64_t pairs = p->rows * m->per_token, size = pairs * m->hidden;
    project(m, p, layer, ROUTER, x, p->wide);
    in_repeatable_pieces(choose_row, &mixture, p->rows, p->rows * m->experts > SMALL ? p->threads : 1);
    sort_pairs(m, p);
    in_repeatable_pieces(copy_input, &mixture, pairs, size > SMALL ? p->threads : 1);
    project_experts(m, p, layer, 0);
    activate(m, p, pairs, m->layers[layer].experts[1].in_features);
    project_experts(m, p, layer, 1);
    in_repeatable_pieces(combine_row, &mixture, p->rows, size > SMALL ? p->threads : 1);
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
        if (layer->experts[0].weights) {
            mix_experts(m, p, n, normed);
        } else {
            project(m, p, n, GATE_UP, normed, p->wide);
            activate(m, p, p->rows, layer->linears[DOWN].in_features);
            project(m, p, n, DOWN, p->narrow, p->delta);
        }
        leave(m, p, layer->after_mlp);
        delta = p->delta;
    }
    turret_add_rms_norm(p->hidden, delta, m->norm, m->eps, p->out, p->rows, m->hidden, p->threads);
}
