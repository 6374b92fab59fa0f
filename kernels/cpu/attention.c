/* Causal attention of new tokens over a paged KV cache, one (row, KV head) at a time.
 *
 * All scores of a row first, then their softmax, then the weighted values: the result of a row
 * depends on its own query and its own keys only, in position order.
 */
#include "vec.h"

#include <math.h>
#include <omp.h>

#define MAX_VECTORS 16 /* of a head: up to 256 dimensions */
#define HEADS 4        /* query heads taken together at most */

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

/* scores[g][t] = q_g . k_t for count positions, LANES at a time; q is scaled already. Stores whole
 * vectors, the lanes past count are 0. */
INLINE void score(const float *q, int64_t vectors, int64_t group, const bf16 *k, int64_t stride,
                  int64_t count, float *scores, int64_t scores_stride) {
    int64_t dim = vectors * LANES;
    for (int64_t t = 0; t < count; t += LANES, k += LANES * stride) {
        int64_t some = count - t < LANES ? count - t : LANES;
        for (int64_t g = 0; g < group; g += HEADS) {
            int64_t heads = group - g < HEADS ? group - g : HEADS;
            f32x16 parts[HEADS][LANES];
            for (int64_t i = 0; i < some; i++) {
                const bf16 *row = k + i * stride;
                f32x16 key[MAX_VECTORS];
                for (int64_t d = 0; d < vectors; d++) key[d] = load_bf16(row + d * LANES);
                __builtin_prefetch(row + 4 * stride);
                __builtin_prefetch(row + 4 * stride + 2 * LANES);
                for (int64_t j = 0; j < heads; j++) {
                    f32x16 s = {0};
                    for (int64_t d = 0; d < vectors; d++)
                        s += load_f32(q + (g + j) * dim + d * LANES) * key[d];
                    parts[j][i] = s;
                }
            }
            for (int64_t j = 0; j < heads; j++) {
                for (int64_t i = some; i < LANES; i++) parts[j][i] = (f32x16){0};
                store_f32(scores + (g + j) * scores_stride + t, sum_each(parts[j]));
            }
        }
    }
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

typedef struct {
    const Heads *h;
    const Span *span;
    int64_t kv, low, end;
    const float *p; /* [heads, stride], not divided by their sums yet */
    int64_t stride;
    const float *sums;
} Values;

/* out[j] = sum_t p[j][t] v_t / sums[j] for a constant number of heads. */
INLINE void gather(const Values *values, int64_t vectors, const int heads, bf16 *out) {
    const Heads *h = values->h;
    int64_t dim = vectors * LANES, size = h->block_size, stride = h->kv_heads * dim;
    f32x16 acc[HEADS][MAX_VECTORS];
    for (int j = 0; j < heads; j++)
        for (int64_t d = 0; d < vectors; d++) acc[j][d] = (f32x16){0};
    for (int64_t t = values->low; t < values->end;) {
        int64_t stop = (t / size + 1) * size < values->end ? (t / size + 1) * size : values->end;
        const bf16 *v = h->v + (values->span->blocks[t / size] * size + t % size) * stride;
        v += values->kv * dim;
        const float *p = values->p + t - values->low;
        for (int64_t i = 0; i < stop - t; i++, v += stride)
            for (int64_t d = 0; d < vectors; d++) {
                f32x16 value = load_bf16(v + d * LANES);
                for (int j = 0; j < heads; j++) acc[j][d] += p[j * values->stride + i] * value;
            }
        t = stop;
    }
    for (int j = 0; j < heads; j++)
        for (int64_t d = 0; d < vectors; d++)
            store_bf16(out + j * dim + d * LANES, acc[j][d] / values->sums[j]);
}

INLINE void attend(const Plan *plan, const Heads *h, const Span *span, int64_t i, int64_t kv,
                   float *scratch, int64_t vectors) {
    int64_t dim = vectors * LANES, group = h->heads / h->kv_heads, size = h->block_size;
    int64_t stride = h->kv_heads * dim;
    int64_t end = span->num_context + i + 1, low = span->num_padding;
    if (plan->window && end - plan->window > low) low = end - plan->window;
    int64_t count = end - low, row = span->first_row + i;
    /* Whole vectors are stored from any position on. */
    int64_t scores_stride = (count + LANES - 1) / LANES * LANES + LANES;
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
    float sums[group];
    for (int64_t g = 0; g < group; g++) sums[g] = softmax(scores + g * scores_stride, count);
    bf16 *out = h->out + (row * h->heads + kv * group) * dim;
    /* As many heads together as have room in the registers: each value is loaded once for them. */
    int64_t most = vectors <= 4 ? HEADS : vectors <= 8 ? 2 : 1;
    for (int64_t g = 0; g < group; g += most, scores += most * scores_stride, out += most * dim) {
        Values values = {h, span, kv, low, end, scores, scores_stride, sums + g};
        switch (group - g < most ? group - g : most) {
        case 4: gather(&values, vectors, 4, out); break;
        case 3: gather(&values, vectors, 3, out); break;
        case 2: gather(&values, vectors, 2, out); break;
        default: gather(&values, vectors, 1, out);
        }
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
