/* Causal attention of new tokens over a paged KV cache.
 *
 * A row's scores are computed first, then their softmax, then the weighted sum of the values. So the result
 * of a row depends only on its own query and keys, in the order of the positions. A block of the KV cache
 * holds all KV heads of its positions side by side. All heads of a single row therefore go through the blocks
 * together, so that memory is read in order, and the next block is prefetched meanwhile. Consecutive rows of a
 * prompt are computed together, so that keys and values are converted once for all of them; each row's sums
 * have the same order as for a single row. On processors with AMX, attention_tiles.h adds in another order.
 */
#include "entries.h"
#include "elements.h"
#include "team.h"
#include "tiles.h"

#include <math.h>

#define MAX_VECTORS 16 /* vectors of a head: up to 256 dimensions */
#define HEADS 4        /* query heads that are computed together, at most */
#define MOST_QUERIES 48 /* query heads of several rows that share a KV head, at most */
#define FEWEST 6       /* with fewer queries, transposing keys takes longer than it saves */

/* Positions of a block for one KV head. `next` is the address that is read after this slice, to prefetch it. */
typedef struct {
    const element *at, *next;
    int64_t stride, count;
} Slice;

INLINE void prefetch_head(const element *p, int64_t vectors) {
    for (int64_t d = 0; d < vectors; d += 2) __builtin_prefetch(p + d * LANES);
}

/* scores[g][t] = q_g . k_t, LANES positions at a time; q is scaled already. Stores whole vectors, in which
 * lanes past the end are 0. */
INLINE void score(const float *q, int64_t vectors, int64_t group, const Slice *k, float *scores,
                  int64_t scores_stride) {
    int64_t dim = vectors * LANES;
    for (int64_t t = 0; t < k->count; t += LANES) {
        int64_t some = k->count - t < LANES ? k->count - t : LANES;
        const element *first = k->at + t * k->stride, *next = k->next + t * k->stride;
        for (int64_t g = 0; g < group; g += HEADS) {
            int64_t heads = group - g < HEADS ? group - g : HEADS;
            f32x16 parts[HEADS][LANES];
            for (int64_t i = 0; i < some; i++) {
                const element *row = first + i * k->stride;
                fvec key[MAX_VECTORS * PARTS];
                for (int64_t d = 0; d < vectors * PARTS; d++) key[d] = fvec_element(row + d * WIDTH);
                prefetch_head(next + i * k->stride, vectors);
                for (int64_t j = 0; j < heads; j++) {
                    fvec s[PARTS] = {{0}};
                    for (int64_t d = 0; d < vectors * PARTS; d++)
                        s[d % PARTS] = add_product(s[d % PARTS], fvec_f32(q + (g + j) * dim + d * WIDTH), key[d]);
                    memcpy(&parts[j][i], s, sizeof s);
                }
            }
            for (int64_t j = 0; j < heads; j++) {
                for (int64_t i = some; i < LANES; i++) parts[j][i] = (f32x16){0};
                store_f32(scores + (g + j) * scores_stride + t, sum_each(parts[j]));
            }
        }
    }
}

#define QUERIES_AT_ONCE (WIDTH == 16 ? 4 : 2) /* queries whose sums fit into the registers */

/* Converts up to 16 keys to fp32 and transposes them, to [dimensions, 16 keys]. Missing keys are 0. */
INLINE void transpose_keys(const Slice *k, int64_t vectors, float *transposed) {
    for (int64_t d = 0; d < vectors * LANES; d += WIDTH)
        for (int64_t t = 0; t < LANES; t += WIDTH) {
            fvec v[WIDTH];
            for (int64_t i = 0; i < WIDTH; i++)
                v[i] = t + i < k->count ? fvec_element(k->at + (t + i) * k->stride + d) : (fvec){0};
            transpose(v);
            for (int64_t i = 0; i < WIDTH; i++) *(fvec_at *)(transposed + (d + i) * LANES + t) = v[i];
        }
}

/* The scores of QUERIES_AT_ONCE queries with 16 transposed keys. The order of each sum is that of `score`. */
INLINE void score_transposed(const float *q, int64_t vectors, const float *transposed, float *scores,
                             int64_t scores_stride) {
    for (int p = 0; p < PARTS; p++, transposed += WIDTH, scores += WIDTH) {
        fvec fours[4][QUERIES_AT_ONCE];
        for (int n = 0; n < 4; n++) {
            fvec s[4][QUERIES_AT_ONCE] = {{{0}}};
            for (int64_t d = 4 * n; d < vectors * LANES; d += LANES)
                for (int i = 0; i < 4; i++) {
                    fvec key = fvec_f32(transposed + (d + i) * LANES);
                    for (int j = 0; j < QUERIES_AT_ONCE; j++)
                        s[i][j] = add_product(s[i][j], q[j * vectors * LANES + d + i] - (fvec){0}, key);
                }
            for (int j = 0; j < QUERIES_AT_ONCE; j++) fours[n][j] = (s[0][j] + s[1][j]) + (s[2][j] + s[3][j]);
        }
        for (int j = 0; j < QUERIES_AT_ONCE; j++)
            *(fvec_at *)(scores + j * scores_stride) = (fours[0][j] + fours[1][j]) + (fours[2][j] + fours[3][j]);
    }
}

/* cap * tanh(score / cap), in place. The buffer is padded to whole vectors. */
INLINE void cap_scores(float *s, int64_t count, float cap) {
    for (int64_t t = 0; t < count; t += LANES) store_f32(s + t, cap * tanh_vec(load_f32(s + t) / cap));
}

/* Replaces scores by weights in place and returns their sum. The buffer is padded to whole vectors. The
 * sink, unless it is null, counts as one more score. */
INLINE float softmax(float *s, int64_t count, const float *sink) {
    int64_t padded = (count + LANES - 1) / LANES * LANES;
    for (int64_t t = count; t < padded; t++) s[t] = -INFINITY;
    f32x16 best = load_f32(s);
    for (int64_t t = LANES; t < padded; t += LANES) best = max_vec(best, load_f32(s + t));
    float lanes[LANES], top;
    memcpy(lanes, &best, sizeof lanes);
    top = lanes[0];
    for (int i = 1; i < LANES; i++) top = lanes[i] > top ? lanes[i] : top;
    if (sink && *sink > top) top = *sink;
    f32x16 sum = {0};
    for (int64_t t = 0; t < padded; t += LANES) {
        f32x16 e = exp_vec(load_f32(s + t) - top);
        store_f32(s + t, e);
        sum += e;
    }
    if (sink) sum += (f32x16){exp_vec(splat(*sink - top))[0]};
    return sum_lanes(sum);
}

/* acc[j] += sum_t p[j][t] v_t for a constant number of heads. `wide` holds the values of the slice in fp32,
 * [count, dimensions]; if it is null, they are read from the cache. */
INLINE void gather(const float *p, int64_t p_stride, int64_t vectors, const int heads,
                   const Slice *v, const float *wide, float *acc) {
    int64_t all = vectors * PARTS, some = WIDTH == 16 ? all : 8 / heads; /* registers of a head */
    while (all % some) some--; /* a constant, so that the loops over sums are unrolled */
    for (int64_t low = 0; low < all; low += some) {
        fvec sums[HEADS][MAX_VECTORS];
        for (int j = 0; j < heads; j++)
            for (int64_t d = 0; d < some; d++) sums[j][d] = fvec_f32(acc + (j * all + low + d) * WIDTH);
        const element *at = v->at + low * WIDTH, *next = v->next;
        for (int64_t i = 0; i < v->count; i++, at += v->stride, next += v->stride) {
            if (low == 0 && !wide) prefetch_head(next, vectors);
            for (int64_t d = 0; d < some; d++) {
                fvec value = wide ? fvec_f32(wide + (i * all + low + d) * WIDTH) : fvec_element(at + d * WIDTH);
                for (int j = 0; j < heads; j++)
                    sums[j][d] = add_product(sums[j][d], p[j * p_stride + i] - (fvec){0}, value);
            }
        }
        for (int j = 0; j < heads; j++)
            for (int64_t d = 0; d < some; d++) *(fvec_at *)(acc + (j * all + low + d) * WIDTH) = sums[j][d];
    }
}

/* Computes as many heads together as fit into the registers, so that each value is loaded once for them. */
INLINE void gather_group(const float *p, int64_t p_stride, int64_t vectors, int64_t group,
                         const Slice *v, const float *wide, float *acc) {
    int64_t most = vectors <= 4 ? HEADS : vectors <= 8 ? 2 : 1;
    for (int64_t g = 0; g < group; g += most, p += most * p_stride, acc += most * vectors * LANES)
        switch (group - g < most ? group - g : most) {
        case 4: gather(p, p_stride, vectors, 4, v, wide, acc); break;
        case 3: gather(p, p_stride, vectors, 3, v, wide, acc); break;
        case 2: gather(p, p_stride, vectors, 2, v, wide, acc); break;
        default: gather(p, p_stride, vectors, 1, v, wide, acc);
        }
}

/* Rows [number, number + rows) of a span, and the range of their KV heads. */
typedef struct {
    const Span *span;
    const Span *following; /* the span whose keys are read next */
    int64_t number, rows, kv_low, kv_high;
} Chunk;

/* The first position that a row of a span sees. */
INLINE int64_t low_of(const Plan *plan, const Span *span, int64_t number) {
    int64_t low = span->num_context + number + 1 - plan->window;
    return plan->window && low > span->num_padding ? low : span->num_padding;
}

/* Keys or values (`cache`) of KV head `kv` from position t to the end of its block, or to `end` if that is earlier. */
INLINE Slice slice_of(const Heads *h, const Span *span, const element *cache, int64_t t, int64_t end,
                      int64_t kv) {
    int64_t size = h->block_size, stride = h->kv_heads * h->head_dim;
    int64_t stop = (t / size + 1) * size < end ? (t / size + 1) * size : end;
    const element *at = cache + (span->blocks[t / size] * size + t % size) * stride + kv * h->head_dim;
    return (Slice){at, at, stride, stop - t};
}

INLINE void attend(const Plan *plan, const Heads *h, const Chunk *chunk, float *scratch,
                   int64_t vectors) {
    const Span *span = chunk->span;
    int64_t dim = vectors * LANES, group = h->heads / h->kv_heads;
    int64_t end = span->num_context + chunk->number + 1, low = low_of(plan, span, chunk->number);
    int64_t count = end - low, first = chunk->kv_low * group;
    int64_t heads = (chunk->kv_high - chunk->kv_low) * group;
    /* Pad by one more vector, because `score` stores whole vectors from any position on. */
    int64_t scores_stride = (count + LANES - 1) / LANES * LANES + LANES;
    float *q = scratch, *acc = q + heads * dim, *scores = acc + heads * dim;
    int64_t place = ((span->first_row + chunk->number) * h->heads + first) * dim;
    for (int64_t d = 0; d < heads * dim; d += LANES) {
        store_f32(q + d, load_f32(h->q + place + d) * (float)h->scale);
        store_f32(acc + d, (f32x16){0});
    }
    for (int64_t t = low, stop = end; t < end; t = stop)
        for (int64_t kv = chunk->kv_low; kv < chunk->kv_high; kv++) {
            int64_t g = (kv - chunk->kv_low) * group;
            Slice k = slice_of(h, span, h->k, t, end, kv);
            stop = t + k.count;
            k.next = stop < end ? slice_of(h, span, h->k, stop, end, kv).at
                                : slice_of(h, span, h->v, low, end, kv).at;
            score(q + g * dim, vectors, group, &k, scores + g * scores_stride + t - low,
                  scores_stride);
        }
    float sums[heads];
    for (int64_t g = 0; g < heads && h->softcap > 0; g++)
        cap_scores(scores + g * scores_stride, count, (float)h->softcap);
    for (int64_t g = 0; g < heads; g++)
        sums[g] = softmax(scores + g * scores_stride, count, h->sinks ? h->sinks + first + g : 0);
    for (int64_t t = low, stop = end; t < end; t = stop)
        for (int64_t kv = chunk->kv_low; kv < chunk->kv_high; kv++) {
            int64_t g = (kv - chunk->kv_low) * group;
            Slice v = slice_of(h, span, h->v, t, end, kv);
            stop = t + v.count;
            v.next = stop < end ? slice_of(h, span, h->v, stop, end, kv).at
                                : slice_of(h, chunk->following, h->k, 0, 1, kv).at;
            gather_group(scores + g * scores_stride + t - low, scores_stride, vectors, group, &v, 0,
                         acc + g * dim);
        }
    for (int64_t g = 0; g < heads; g++)
        for (int64_t d = 0; d < vectors; d++)
            store_element((element *)h->out + place + g * dim + d * LANES,
                       load_f32(acc + g * dim + d * LANES) / sums[g]);
}

/* The first query of a KV head in row i of a chunk, in h->q and h->out. */
INLINE int64_t first_query(const Heads *h, const Chunk *chunk, int64_t i, int64_t kv) {
    int64_t row = chunk->span->first_row + chunk->number + i;
    return (row * h->heads + kv * (h->heads / h->kv_heads)) * h->head_dim;
}

/* Attention of several rows for one KV head. */
INLINE void attend_rows(const Plan *plan, const Heads *h, const Chunk *chunk, int64_t kv, float *scratch,
                        int64_t vectors) {
    const Span *span = chunk->span;
    int64_t dim = vectors * LANES, group = h->heads / h->kv_heads, queries = chunk->rows * group;
    int64_t first_end = span->num_context + chunk->number + 1, end = first_end + chunk->rows - 1;
    int64_t low = low_of(plan, span, chunk->number), last_low = low_of(plan, span, chunk->number + chunk->rows - 1);
    int64_t scores_stride = (end - low + LANES - 1) / LANES * LANES + LANES;
    float *q = scratch, *acc = q + MOST_QUERIES * dim, *scores = acc + MOST_QUERIES * dim;
    float sums[MOST_QUERIES];
    /* First the transposed keys of a slice, later the values of a slice. */
    float wide[dim * LANES] __attribute__((aligned(64)));
    for (int64_t i = 0; i < chunk->rows; i++)
        for (int64_t d = 0; d < group * dim; d += LANES)
            store_f32(q + i * group * dim + d, load_f32(h->q + first_query(h, chunk, i, kv) + d) * (float)h->scale);
    memset(q + queries * dim, 0, (MOST_QUERIES - queries) * dim * sizeof(float));
    memset(acc, 0, queries * dim * sizeof(float));
    for (int64_t t = low, stop = end; t < end; t = stop) {
        Slice k = slice_of(h, span, h->k, t, end, kv);
        k.count = least(k.count, LANES);
        stop = t + k.count;
        transpose_keys(&k, vectors, wide);
        for (int64_t n = 0; n < queries; n += QUERIES_AT_ONCE)
            score_transposed(q + n * dim, vectors, wide, scores + n * scores_stride + t - low, scores_stride);
    }
    for (int64_t n = 0; n < queries; n++) {
        int64_t own = low_of(plan, span, chunk->number + n / group), count = first_end + n / group - own;
        float *s = scores + n * scores_stride + own - low;
        if (h->softcap > 0) cap_scores(s, count, (float)h->softcap);
        sums[n] = softmax(s, count, h->sinks ? h->sinks + kv * group + n % group : 0);
    }
    for (int64_t t = low, stop = end; t < end; t = stop) {
        Slice v = slice_of(h, span, h->v, t, end, kv);
        v.count = least(v.count, LANES);
        stop = t + v.count;
        for (int64_t i = 0; i < v.count; i++)
            for (int64_t d = 0; d < dim; d += LANES) store_f32(wide + i * dim + d, load_element(v.at + i * v.stride + d));
        if (t >= last_low && stop <= first_end) {
            gather_group(scores + t - low, scores_stride, vectors, queries, &v, wide, acc);
            continue;
        }
        /* The rows see different values of this slice. */
        for (int64_t i = 0; i < chunk->rows; i++) {
            int64_t from = low_of(plan, span, chunk->number + i), skip = from > t ? from - t : 0;
            Slice own = {v.at, v.at, v.stride, least(stop, first_end + i) - t - skip};
            gather_group(scores + i * group * scores_stride + t + skip - low, scores_stride, vectors, group, &own,
                         wide + skip * dim, acc + i * group * dim);
        }
    }
    for (int64_t n = 0; n < queries; n++)
        for (int64_t d = 0; d < dim; d += LANES)
            store_element((element *)h->out + first_query(h, chunk, n / group, kv) + n % group * dim + d,
                          load_f32(acc + n * dim + d) / sums[n]);
}

INLINE void attend_each(const Plan *plan, const Heads *h, const Chunk *chunk, float *scratch, int64_t vectors) {
    if (chunk->rows == 1) attend(plan, h, chunk, scratch, vectors);
    else
        for (int64_t kv = chunk->kv_low; kv < chunk->kv_high; kv++) attend_rows(plan, h, chunk, kv, scratch, vectors);
}

/* Common sizes have loops of constant length, whose sums stay in registers. */
KERNEL static void attend_some(const Plan *plan, const Heads *h, const Chunk *chunk, float *scratch) {
    switch (h->head_dim / LANES) {
    case 4: attend_each(plan, h, chunk, scratch, 4); break;
    case 8: attend_each(plan, h, chunk, scratch, 8); break;
    case 16: attend_each(plan, h, chunk, scratch, 16); break;
    default: attend_each(plan, h, chunk, scratch, h->head_dim / LANES);
    }
}

typedef struct {
    const Plan *plan;
    const Heads *heads;
    int64_t total, pieces; /* number of keys to read, and number of pieces of the work */
} Job;

/* Number of keys that rows [number, number + rows) of a span see without a window. */
INLINE int64_t keys_seen(const Span *span, int64_t number, int64_t rows) {
    return rows * (span->num_context + number) + rows * (rows + 1) / 2;
}

/* Number of rows that are computed together. */
INLINE int64_t chunk_rows(const Heads *h, int64_t left) {
    int64_t group = h->heads / h->kv_heads, rows = group < MOST_QUERIES ? least(MOST_QUERIES / group, left) : 1;
    return rows * group < FEWEST ? 1 : rows;
}

/* Computes a piece of the work. A KV head of a chunk is never divided. */
static void attend_piece(const void *job, int64_t thread, int64_t piece) {
    const Job *j = job;
    const Plan *plan = j->plan;
    float *scratch = plan->scratch + thread * plan->scratch_stride;
    int64_t low = j->total * piece / j->pieces, high = j->total * (piece + 1) / j->pieces, done = 0;
    for (int64_t s = 0; s < plan->num_spans; s++) {
        const Span *p = &plan->spans[s];
        for (int64_t i = 0, count; i < p->num_new; i += count) {
            count = chunk_rows(j->heads, p->num_new - i);
            int64_t keys = keys_seen(p, i, count);
            const Span *following = i + count < p->num_new || s + 1 == plan->num_spans ? p : p + 1;
            Chunk chunk = {p, following, i, count, j->heads->kv_heads, 0};
            for (int64_t kv = 0; kv < j->heads->kv_heads; kv++, done += keys) {
                if (done < low || done >= high) continue;
                if (kv < chunk.kv_low) chunk.kv_low = kv;
                chunk.kv_high = kv + 1;
            }
            if (chunk.kv_low < chunk.kv_high) attend_some(plan, j->heads, &chunk, scratch);
        }
    }
}

#if HAS_TILES && !defined(ELEMENT_F32)
#include "attention_tiles.h"
#endif

EXPORT void EXPORTED(turret_attend)(const Plan *plan, const Heads *heads) {
    Job job = {plan, heads, 0, plan->num_threads > 1 ? plan->num_threads * PIECES_EACH : 1};
    for (int64_t s = 0; s < plan->num_spans; s++)
        job.total += heads->kv_heads * keys_seen(&plan->spans[s], 0, plan->spans[s].num_new);
    Work *work = attend_piece;
#if HAS_TILES && !defined(ELEMENT_F32)
    if (tiles_attend(heads)) work = attend_packs;
#endif
    in_repeatable_pieces(work, &job, job.pieces, plan->num_threads);
}
