/* Low-rank updates of experts: y_p += sum_k w_k B_e (A_e x_p) for pairs p of a row and an expert e.
 *
 * Each pair is computed separately, in an order that depends only on the adapters of its row.
 */
#include "adapters.h"
#include "team.h"

KERNEL static void adapt(const ExpertStep *step, const ExpertPairs *p, int64_t pair, float *scratch) {
    int64_t row = p->row[pair], expert = p->expert[pair];
    int64_t first = step->first[row], last = step->first[row + 1];
    const bf16 *x = p->x + (p->input ? p->input[pair] : pair) * p->x_stride;
    bf16 *y = p->y + pair * p->out_features;
    ModuleSize size = {p->in_features, p->out_features};
    float *v = scratch;
    int has_update = 0;
    low_rank_begin();
    for (int64_t k = first; k < last; k++) {
        const ExpertUpdate *u = step->members[k].updates + p->update;
        Module m = {.a = u->a + expert * u->rank * p->in_features, .rank = u->rank};
        Rows rows = {.x = x, .v = v, .count = 1, .x_stride = p->x_stride};
        float w = (float)step->members[k].weight;
        for (int64_t r = 0; r < u->rank; r += low_rank_step(&size)) low_rank_shrink(&m, &rows, &size, w, r);
        v += PADDED(u->rank);
        has_update |= u->rank > 0;
    }
    if (!has_update) return;
    float acc[COLUMNS] __attribute__((aligned(64)));
    for (int64_t low = 0; low < p->out_features; low += COLUMNS) {
        int64_t count = p->out_features - low < COLUMNS ? p->out_features - low : COLUMNS;
        for (int64_t o = 0; o < count; o++) acc[o] = to_f32(y[low + o]);
        v = scratch;
        for (int64_t k = first; k < last; k++) {
            const ExpertUpdate *u = step->members[k].updates + p->update;
            Module m = {.b = u->b + expert * u->rank * p->out_features, .rank = u->rank};
            Rows rows = {.v = v, .acc = acc, .count = 1};
            if (u->rank) low_rank_expand(&m, &rows, &size, low, count);
            v += PADDED(u->rank);
        }
        for (int64_t o = 0; o < count; o++) y[low + o] = to_bf16(acc[o]);
    }
    low_rank_end();
}

typedef struct {
    const ExpertStep *step;
    const ExpertPairs *pairs;
} Job;

static void adapt_pair(const void *job, int64_t thread, int64_t pair) {
    const Job *j = job;
    if (j->pairs->row[pair] < j->step->rows)
        adapt(j->step, j->pairs, pair, j->step->scratch + thread * j->step->width);
}

EXPORT void turret_adapt_experts(const ExpertStep *step, const ExpertPairs *p) {
    Job job = {step, p};
    int64_t threads = step->threads < MOST_THREADS ? step->threads : MOST_THREADS;
    in_pieces(adapt_pair, &job, p->pairs, threads);
}
