/* Causal attention of new tokens over a paged KV cache, one (row, KV head) at a time.
 *
 * All scores of a row first, then their softmax, then the weighted values: the result of a row
 * depends on its own query and its own keys only, in position order.
 */
#include "vec.h"

#include <math.h>
#include <omp.h>

#define MAX_VECTORS 16 /* of a head: up to 256 dimensions */

typedef struct {
    int64_t first_row, num_new, num_context, num_padding;
    const int64_t *blocks;
} Span;

typedef struct {
    const Span *spans;
    float *scratch; /* [threads, scratch_stride]: scores of a KV head's query heads */
    int64_t num_spans, scratch_stride, num_threads;
    int64_t window; /* 0: none */
} Plan;

typedef struct {
    const float *q;  /* [rows, heads, head_dim], rotated */
    const bf16 *k, *v; /* [blocks, block_size, kv_heads, head_dim] */
    bf16 *out;       /* [rows, heads, head_dim] */
    int64_t heads, kv_heads, head_dim, block_size;
    double scale;
} Heads;

/* scores[g][t] = scale * q_g . k_t for t in [low, high); q is scaled already. */
INLINE void score(const float *q, int64_t vectors, int64_t group, const bf16 *k, int64_t stride,
                  int64_t count, float *scores, int64_t scores_stride) {
    int64_t dim = vectors * LANES;
    for (int64_t t = 0; t < count; t++, k += stride) {
        f32x16 key[MAX_VECTORS];
        for (int64_t d = 0; d < vectors; d++) key[d] = load_bf16(k + d * LANES);
        __builtin_prefetch(k + 4 * stride);
        __builtin_prefetch(k + 4 * stride + 2 * LANES);
        for (int64_t g = 0; g < group; g++) {
            f32x16 s = {0};
            for (int64_t d = 0; d < vectors; d++) s += load_f32(q + g * dim + d * LANES) * key[d];
            scores[g * scores_stride + t] = sum_lanes(s);
        }
    }
}

/* acc += sum_t p_t v_t */
INLINE void gather(f32x16 *acc, const float *p, int64_t vectors, const bf16 *v, int64_t stride,
                   int64_t count) {
    for (int64_t t = 0; t < count; t++, v += stride)
        for (int64_t d = 0; d < vectors; d++) acc[d] += p[t] * load_bf16(v + d * LANES);
}

/* In place; returns the sum. The buffer is padded to whole vectors. */
INLINE float softmax(float *s, int64_t count) {
    int64_t padded = (count + LANES - 1) / LANES * LANES;
    for (int64_t t = count; t < padded; t++) s[t] = -INFINITY;
    f32x16 best = load_f32(s);
    for (int64_t t = LANES; t < padded; t += LANES) best = max_vec(best, load_f32(s + t));
    float lanes[LANES], top;
    memcpy(lanes, &best, sizeof lanes);
    top = lanes[0];
    for (int i = 1; i < LANES; i++) top = lanes[i] > top ? lanes[i] : top;
    f32x16 sum = {0};
    for (int64_t t = 0; t < padded; t += LANES) {
        f32x16 e = exp_vec(load_f32(s + t) - top);
        store_f32(s + t, e);
        sum += e;
    }
    return sum_lanes(sum);
}

INLINE void attend(const Plan *plan, const Heads *h, const Span *span, int64_t i, int64_t kv,
                   float *scratch, int64_t vectors) {
    int64_t dim = vectors * LANES, group = h->heads / h->kv_heads, size = h->block_size;
    int64_t stride = h->kv_heads * dim;
    int64_t end = span->num_context + i + 1, low = span->num_padding;
    if (plan->window && end - plan->window > low) low = end - plan->window;
    int64_t count = end - low, row = span->first_row + i;
    int64_t scores_stride = (count + LANES - 1) / LANES * LANES;
    float *q = scratch, *scores = scratch + group * dim;
    const float *source = h->q + (row * h->heads + kv * group) * dim;
    for (int64_t d = 0; d < group * dim; d += LANES)
        store_f32(q + d, load_f32(source + d) * (float)h->scale);
    for (int64_t t = low; t < end;) {
        int64_t stop = (t / size + 1) * size < end ? (t / size + 1) * size : end;
        const bf16 *k = h->k + (span->blocks[t / size] * size + t % size) * stride + kv * dim;
        score(q, vectors, group, k, stride, stop - t, scores + t - low, scores_stride);
        t = stop;
    }
    for (int64_t g = 0; g < group; g++) {
        float *p = scores + g * scores_stride;
        float sum = softmax(p, count);
        f32x16 acc[MAX_VECTORS];
        for (int64_t d = 0; d < vectors; d++) acc[d] = (f32x16){0};
        for (int64_t t = low; t < end;) {
            int64_t stop = (t / size + 1) * size < end ? (t / size + 1) * size : end;
            const bf16 *v = h->v + (span->blocks[t / size] * size + t % size) * stride + kv * dim;
            gather(acc, p + t - low, vectors, v, stride, stop - t);
            t = stop;
        }
        bf16 *out = h->out + (row * h->heads + kv * group + g) * dim;
        for (int64_t d = 0; d < vectors; d++) store_bf16(out + d * LANES, acc[d] / sum);
    }
}

/* The usual sizes get loops of known length, whose sums stay in registers. */
KERNEL static void attend_row(const Plan *plan, const Heads *h, const Span *span, int64_t i,
                              int64_t kv, float *scratch) {
    switch (h->head_dim / LANES) {
    case 4: attend(plan, h, span, i, kv, scratch, 4); break;
    case 8: attend(plan, h, span, i, kv, scratch, 8); break;
    default: attend(plan, h, span, i, kv, scratch, h->head_dim / LANES);
    }
}

EXPORT void turret_attend(const Plan *plan, const Heads *heads) {
#pragma omp parallel num_threads(plan->num_threads)
    {
        int64_t part = omp_get_thread_num(), parts = omp_get_num_threads();
        float *scratch = plan->scratch + part * plan->scratch_stride;
        /* Shares of equal numbers of keys, not of rows. */
        int64_t total = 0, done = 0;
        for (int64_t s = 0; s < plan->num_spans; s++) {
            const Span *p = &plan->spans[s];
            total += heads->kv_heads * p->num_new * (p->num_context + (p->num_new + 1) / 2);
        }
        int64_t low = total * part / parts, high = total * (part + 1) / parts;
        for (int64_t s = 0; s < plan->num_spans; s++) {
            const Span *p = &plan->spans[s];
            for (int64_t i = 0; i < p->num_new; i++)
                for (int64_t kv = 0; kv < heads->kv_heads; kv++) {
                    if (done >= low && done < high)
                        attend_row(plan, heads, p, i, kv, scratch);
                    done += p->num_context + (p->num_new + 1) / 2;
                }
        }
    }
}
