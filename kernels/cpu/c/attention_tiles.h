/* Attention on AMX tiles. Included by attention.c.
 *
 * Up to 16 queries of a KV head are computed together: the heads of one row, or of several consecutive
 * rows. Keys are taken 16 at a time, from positions that are multiples of 16, so that each lane of a softmax's
 * sum has every sixteenth key. Keys that a query does not see have weight 0, which adds nothing to its sums.
 * A row therefore has the same bits alone and in a batch.
 *
 * Queries and weights are each represented as the sum of two bf16 numbers, which is exact to 2^-17. The two parts of
 * a query are multiplied separately. For weights, the pair (high, low) is multiplied by the pair (value, value).
 */
#define QUERIES TILE_ROWS
#define KEYS TILE_ROWS /* of one tile */
#define SPLIT 2        /* number of bf16 numbers whose sum is a query */

/* Numbers of the tiles for keys and queries. Tiles 0 to 3 are the scores of 64 keys. The numbers
 * are macros, because the number of a tile is part of the instruction. */
#define KEYS_0 4
#define KEYS_1 5
#define HIGH 6
#define LOW 7
/* Tiles of the second product, for weights and values. Tiles 0 to 3 are the results of 64 dimensions. */
#define WEIGHTS 4
#define VALUES_0 5
#define VALUES_1 6

/* Rows [number, number + rows) of a span, and query heads [head, head + heads) of a KV head. */
typedef struct {
    const Plan *plan;
    const Heads *h;
    const Span *span;
    int64_t number, rows, kv, head, heads;
    int64_t low, end; /* range of the keys that some row sees */
} Pack;

INLINE int tiles_attend(const Heads *h) {
    return h->head_dim % TILE_INPUTS == 0 && h->block_size % KEYS == 0;
}

/* Number of rows that are computed together. */
INLINE int64_t rows_of_pack(int64_t group) { return group < QUERIES ? QUERIES / group : 1; }

/* The address of the keys or values (`cache`) of position t. */
INLINE const bf16 *keys_at(const Pack *p, const void *cache, int64_t t) {
    const Heads *h = p->h;
    int64_t place = p->span->blocks[t / h->block_size] * h->block_size + t % h->block_size;
    return (const bf16 *)cache + (place * h->kv_heads + p->kv) * h->head_dim;
}

/* The position of query q in h->q and h->out. */
INLINE int64_t query_at(const Pack *p, int64_t q) {
    int64_t row = p->span->first_row + p->number + q / p->heads;
    int64_t head = p->kv * (p->h->heads / p->h->kv_heads) + p->head + q % p->heads;
    return (row * p->h->heads + head) * p->h->head_dim;
}

/* Transposes the queries for the tiles, to [dimensions / 32, high and low, 16 pairs, 16 queries]. */
static void transpose_queries(const Pack *p, bf16 *transposed) {
    int64_t queries = p->rows * p->heads;
    for (int64_t d = 0; d < p->h->head_dim; d += TILE_INPUTS) {
        bf16 both[SPLIT][QUERIES][TILE_INPUTS] __attribute__((aligned(64)));
        memset(both, 0, sizeof both);
        for (int64_t q = 0; q < queries; q++)
            for (int64_t i = 0; i < TILE_INPUTS; i += LANES) {
                f32x16 v = load_f32(p->h->q + query_at(p, q) + d + i) * (float)p->h->scale;
                store_bf16(both[0][q] + i, v);
                store_bf16(both[1][q] + i, v - load_bf16(both[0][q] + i));
            }
        for (int part = 0; part < SPLIT; part++) {
            fvec v[WIDTH];
            for (int q = 0; q < QUERIES; q++) v[q] = load_f32((const float *)both[part][q]);
            transpose(v);
            for (int i = 0; i < LANES; i++, transposed += TILE_INPUTS) store_f32((float *)transposed, v[i]);
        }
    }
}

#define SCORE(tile, keys) \
    if (tiles > tile) { \
        tile_load(keys, at[tile] + d, row_bytes); \
        tile_add_product(tile, keys, HIGH); \
        tile_add_product(tile, keys, LOW); \
    }
#define STORE_SCORES(tile) \
    if (tiles > tile) tile_store(tile, scores + (t - start + tile * KEYS) * QUERIES, TILE_BYTES);

/* Computes the scores from position `start` on, [keys, 16 queries]. */
static void score_tiles(const Pack *p, const bf16 *transposed, int64_t start, float *scores) {
    int64_t row_bytes = p->h->kv_heads * p->h->head_dim * sizeof(bf16);
    for (int64_t t = start; t < p->end; t += 4 * KEYS) {
        int64_t tiles = least((p->end - t + KEYS - 1) / KEYS, 4);
        const bf16 *at[4], *q = transposed;
        for (int64_t i = 0; i < tiles; i++) at[i] = keys_at(p, p->h->k, t + i * KEYS);
        tile_zero(0);
        tile_zero(1);
        tile_zero(2);
        tile_zero(3);
        for (int64_t d = 0; d < p->h->head_dim; d += TILE_INPUTS) {
            tile_load(HIGH, q, TILE_BYTES);
            tile_load(LOW, q + TILE_ROWS * TILE_INPUTS, TILE_BYTES);
            q += SPLIT * TILE_ROWS * TILE_INPUTS;
            SCORE(0, KEYS_0) SCORE(1, KEYS_1) SCORE(2, KEYS_0) SCORE(3, KEYS_1)
        }
        STORE_SCORES(0) STORE_SCORES(1) STORE_SCORES(2) STORE_SCORES(3)
    }
}

/* A mask of the 16 keys from position t on that a query sees. */
INLINE __mmask16 seen(const Pack *p, int64_t q, int64_t t) {
    int64_t number = p->number + q / p->heads, low = low_of(p->plan, p->span, number) - t;
    int64_t count = p->span->num_context + number + 1 - t;
    uint32_t before = low <= 0 ? 0 : low >= KEYS ? 0xffff : (1u << low) - 1;
    return (__mmask16)((count >= KEYS ? 0xffff : count <= 0 ? 0 : (1u << count) - 1) & ~before);
}

/* Transposes scores to [keys / 16, 16 queries, 16 keys], with -inf where a query does not see a key, and
 * finds each query's largest score. */
static void transpose_scores(const Pack *p, int64_t start, float *scores, float *tops) {
    int64_t queries = p->rows * p->heads;
    float cap = (float)p->h->softcap;
    f32x16 top[QUERIES];
    for (int64_t q = 0; q < queries; q++) top[q] = splat(-INFINITY);
    for (int64_t t = start; t < p->end; t += KEYS) {
        float *s = scores + (t - start) * QUERIES;
        fvec v[WIDTH];
        for (int i = 0; i < KEYS; i++) v[i] = load_f32(s + i * QUERIES);
        transpose(v);
        int is_whole = t + KEYS <= p->span->num_context + p->number + 1 &&
                       t >= low_of(p->plan, p->span, p->number + p->rows - 1);
        for (int64_t q = 0; q < queries; q++) {
            f32x16 some = v[q];
            if (cap > 0) some = cap * tanh_vec(some / cap);
            if (!is_whole)
                some = (f32x16)_mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), seen(p, q, t), (__m512)some);
            store_f32(s + q * KEYS, some);
            top[q] = max_vec(top[q], some);
        }
    }
    for (int64_t q = 0; q < queries; q++) tops[q] = _mm512_reduce_max_ps((__m512)top[q]);
}

/* Replaces scores by weights in pairs of bf16, [keys / 16, 16 queries, 16 pairs], and returns their
 * sums. */
static void weigh(const Pack *p, int64_t start, float *scores, float *sums) {
    float tops[QUERIES];
    int64_t first = p->kv * (p->h->heads / p->h->kv_heads) + p->head;
    transpose_scores(p, start, scores, tops);
    for (int64_t q = 0; q < p->rows * p->heads; q++) {
        f32x16 sum = {0};
        const float *sink = p->h->sinks ? p->h->sinks + first + q % p->heads : 0;
        if (sink && *sink > tops[q]) tops[q] = *sink;
        for (int64_t t = start; t < p->end; t += KEYS) {
            float *s = scores + (t - start) * QUERIES + q * KEYS;
            f32x16 e = exp_vec(load_f32(s) - tops[q]);
            sum += e;
            __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)e));
            __m512 rest = (__m512)(e - (f32x16)_mm512_slli_epi32(high, 16));
            __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(rest));
            store_f32(s, (f32x16)_mm512_or_si512(high, _mm512_slli_epi32(low, 16)));
        }
        sums[q] = sum_lanes(sum) + (sink ? exp_vec(splat(*sink - tops[q]))[0] : 0);
    }
}

#define TWICE(word) ((word) << 16 | (word))

/* Stores values of 16 keys twice each, [dimensions / 16, 16 keys, 16 pairs]. Keys that no row sees
 * become 0, because their memory may hold anything. */
INLINE void widen_values(const Pack *p, int64_t t, int64_t dim, int64_t dims, uint32_t *values) {
    const bf16 *at = keys_at(p, p->h->v, t) + dim;
    int64_t stride = p->h->kv_heads * p->h->head_dim;
    const __m512i first = (__m512i)(u32x16){TWICE(0), TWICE(1), TWICE(2), TWICE(3), TWICE(4), TWICE(5),
                                            TWICE(6), TWICE(7), TWICE(8), TWICE(9), TWICE(10), TWICE(11),
                                            TWICE(12), TWICE(13), TWICE(14), TWICE(15)};
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(TWICE(LANES)));
    for (int64_t i = 0; i < KEYS; i++, at += stride, values += LANES) {
        int is_seen = t + i >= p->low && t + i < p->end;
        for (int64_t d = 0; d < dims; d += TILE_INPUTS) {
            __m512i once = is_seen ? _mm512_loadu_si512(at + d) : _mm512_setzero_si512();
            _mm512_store_si512(values + d * KEYS, _mm512_permutexvar_epi16(first, once));
            _mm512_store_si512(values + (d + LANES) * KEYS, _mm512_permutexvar_epi16(second, once));
        }
    }
}

#define ADD_VALUES(tile, with) \
    if (dims > tile * LANES) { \
        tile_load(with, now + tile * LANES * KEYS, TILE_BYTES); \
        tile_add_product(tile, WEIGHTS, with); \
    }
#define STORE_RESULTS(tile) \
    if (dims > tile * LANES) tile_store(tile, found[tile], TILE_BYTES);

/* Computes the results of up to 64 dimensions. */
static void add_values(const Pack *p, int64_t start, const float *weights, int64_t dim, int64_t dims,
                       const float *sums) {
    uint32_t values[2][4 * LANES * KEYS] __attribute__((aligned(64)));
    float found[4][QUERIES * LANES] __attribute__((aligned(64)));
    tile_zero(0);
    tile_zero(1);
    tile_zero(2);
    tile_zero(3);
    widen_values(p, start, dim, dims, values[0]);
    for (int64_t t = start, n = 0; t < p->end; t += KEYS, n++) {
        const uint32_t *now = values[n % 2];
        if (t + KEYS < p->end) widen_values(p, t + KEYS, dim, dims, values[(n + 1) % 2]);
        tile_load(WEIGHTS, weights + (t - start) * QUERIES, TILE_BYTES);
        ADD_VALUES(0, VALUES_0) ADD_VALUES(1, VALUES_1) ADD_VALUES(2, VALUES_0) ADD_VALUES(3, VALUES_1)
    }
    STORE_RESULTS(0) STORE_RESULTS(1) STORE_RESULTS(2) STORE_RESULTS(3)
    for (int64_t q = 0; q < p->rows * p->heads; q++)
        for (int64_t d = 0; d < dims; d += LANES)
            store_bf16((bf16 *)p->h->out + query_at(p, q) + dim + d,
                       load_f32(found[d / LANES] + q * LANES) / sums[q]);
}

/* Whether all values of keys [low, high) are finite. Only finite values add nothing at a weight of 0. */
static int values_are_finite(const Pack *p, int64_t low, int64_t high) {
    for (int64_t t = low; t < high; t++) {
        const bf16 *at = keys_at(p, p->h->v, t);
        for (int64_t d = 0; d < p->h->head_dim; d++)
            if ((at[d] & 0x7f80) == 0x7f80) return 0;
    }
    return 1;
}

static void attend_pack(Pack *p, float *scratch) {
    int64_t dim = p->h->head_dim, context = p->span->num_context, last = p->number + p->rows - 1;
    p->low = low_of(p->plan, p->span, p->number);
    p->end = context + last + 1;
    if (p->rows > 1 && !(values_are_finite(p, context + p->number + 1, p->end) &&
                         values_are_finite(p, p->low, low_of(p->plan, p->span, last)))) {
        for (int64_t i = 0; i < p->rows; i++) {
            Pack alone = *p;
            alone.number += i;
            alone.rows = 1;
            attend_pack(&alone, scratch);
        }
        return;
    }
    bf16 *transposed = (bf16 *)scratch;
    float *scores = scratch + dim * QUERIES, sums[QUERIES];
    int64_t start = p->low / KEYS * KEYS;
    transpose_queries(p, transposed);
    score_tiles(p, transposed, start, scores);
    weigh(p, start, scores, sums);
    for (int64_t d = 0; d < dim; d += 4 * LANES)
        add_values(p, start, scores, d, least(dim - d, 4 * LANES), sums);
}

/* Computes a piece of the work. A KV head of a pack is never divided between pieces. */
static void attend_packs(const void *job, int64_t thread, int64_t piece) {
    const Job *j = job;
    const Plan *plan = j->plan;
    const Heads *h = j->heads;
    float *scratch = plan->scratch + thread * plan->scratch_stride;
    int64_t low = j->total * piece / j->pieces, high = j->total * (piece + 1) / j->pieces, done = 0;
    int64_t group = h->heads / h->kv_heads, most = rows_of_pack(group);
    TileShapes shapes = tile_shapes(0, 0);
    tiles_begin(&shapes);
    for (int64_t s = 0; s < plan->num_spans; s++) {
        const Span *span = &plan->spans[s];
        for (int64_t i = 0; i < span->num_new; i += most)
            for (int64_t kv = 0; kv < h->kv_heads; kv++) {
                int64_t rows = least(span->num_new - i, most), before = done;
                done += keys_seen(span, i, rows);
                if (before < low || before >= high) continue;
                for (int64_t head = 0; head < group; head += QUERIES) {
                    Pack pack = {.plan = plan, .h = h, .span = span, .number = i, .rows = rows, .kv = kv,
                                 .head = head, .heads = least(group - head, QUERIES)};
                    attend_pack(&pack, scratch);
                }
            }
    }
    tiles_end();
}
