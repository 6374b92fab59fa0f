/* The adapters of a fused projection: y = G * y + b + sum_k w_k delta_k(x), rounded to bf16 once.
 *
 * The rows of a segment read the factors of its own adapters in place, through a table of pointers per
 * adapter. A call makes two passes over the segments, shrink and expand. Each pass is divided into units, which
 * are assigned to the threads by their cost. Results do not depend on which thread computes a unit.
 */
#include "adapters.h"
#include "entries.h"
#include "team.h"

#define ROWS 32 /* rows of a segment in one unit */
/* The cost of reading a unit's weights, relative to computing one row with them. */
#define READING 3

typedef struct {
    const bf16 *x;
    bf16 *y;
    const bf16 *bias; /* the base's, [sum of widths], or null */
    int64_t x_stride, y_stride;
    const int64_t *widths;
    int64_t in_features, num_slices;
    int64_t module; /* index of the first slice's module */
} Projection;

/* A thread's share of a pass: the units that begin in [low, high) on the axis of summed costs. `at` is where the
 * next unit begins: the cost of all units before it. The first walk over the units has high = 0 and only computes
 * the total cost, which is `at` at its end. */
typedef struct {
    int64_t low, high, at;
} Share;

/* Whether this thread computes the next unit. */
INLINE int take(Share *share, int64_t cost) {
    int64_t at = share->at;
    share->at += cost;
    return at >= share->low && at < share->high;
}

/* Skips `count` units at once if this thread computes none of them. */
INLINE int skip(Share *share, int64_t count, int64_t cost) {
    int64_t end = share->at + count * cost;
    if (end > share->low && share->at < share->high) return 0;
    share->at = end;
    return 1;
}

/* Part number `part` of the units that the walk of `share` passed, divided into `parts` of equal cost. */
INLINE Share next_walk(const Share *share, int64_t part, int64_t parts) {
    return (Share){share->at * part / parts, share->at * (part + 1) / parts, 0};
}

INLINE float *activations(const Step *step, const Projection *p, const Segment *seg,
                          const Component *c, int64_t row, int64_t j) {
    return step->scratch + c->scratch + ((row - seg->row_start) * p->num_slices + j) * c->width;
}

/* Shrinks the operators that compute a row as a whole: each row is one unit. */
static void shrink_rows(const Step *step, const Projection *p, const Segment *seg,
                        const Component *c, int64_t j, int64_t row, int64_t stop, Share *share) {
    const Module *m = &c->modules[p->module + j];
    ModuleSize size = {p->in_features, p->widths[j]};
    int64_t first = 0;
    for (int64_t s = 0; s < j; s++) first += p->widths[s];
    for (int64_t i = row; i < stop; i++) {
        float *v = activations(step, p, seg, c, i, j);
        if (m->rank && !m->a && take(share, 1))
            pieces_shrink(p->x + i * p->x_stride, &size, m->rank, (float)c->weight, v);
        if (m->circulant && take(share, m->circulant->width / RANKS))
            circulant_shrink(m->circulant, p->x + i * p->x_stride, v + circulant_start(m));
        if (m->pairs && take(share, 1))
            pairs_shrink(p->y + i * p->y_stride + first, p->widths[j], v + pairs_start(m));
    }
}

/* Returns the module that is read after slice *j of a component, or null, and sets *j to its slice. */
static const Module *next_module(const Step *step, const Projection *p, const Segment *seg, const Component *c,
                                 int64_t *j) {
    *j = *j + 1 < p->num_slices ? *j + 1 : 0;
    if (*j == 0 && ++c == step->components + seg->last) {
        do seg++;
        while (seg < step->segments + step->num_segments && seg->first == seg->last);
        if (seg == step->segments + step->num_segments) return 0;
        c = &step->components[seg->first];
    }
    return &c->modules[p->module + *j];
}

/* Finds the columns of B that are read after [low, low + COLUMNS) of slice j. */
INLINE void find_next(const Step *step, const Projection *p, const Segment *seg, const Component *c, int64_t j,
                      int64_t low, Rows *rows) {
    const Module *m = &c->modules[p->module + j];
    rows->next = 0;
    if (low + COLUMNS < p->widths[j]) rows->next = m->b + low + COLUMNS;
    else if ((m = next_module(step, p, seg, c, &j))) rows->next = m->b;
    rows->next_stride = p->widths[j];
}

/* Shrinks rows [row, stop) of a segment for one component and one slice. A unit costs about four dot
 * products of the input per row. */
static void shrink_module(const Step *step, const Projection *p, const Segment *seg,
                          const Component *c, int64_t j, int64_t row, int64_t stop, Share *share) {
    const Module *m = &c->modules[p->module + j];
    ModuleSize size = {p->in_features, p->widths[j]};
    int64_t n = p->in_features, cost = stop - row + READING, ranks = low_rank_step(&size), after = j;
    const Module *next = next_module(step, p, seg, c, &after);
    if (m->a && !skip(share, (m->rank + ranks - 1) / ranks, cost))
        for (int64_t r = 0; r < m->rank; r += ranks)
            if (take(share, cost)) {
                Rows rows = {.x = p->x + row * p->x_stride, .v = activations(step, p, seg, c, row, j),
                             .count = stop - row, .x_stride = p->x_stride, .v_stride = p->num_slices * c->width,
                             .next = next ? next->a : 0, .next_stride = n};
                low_rank_shrink(m, &rows, &size, (float)c->weight, r);
            }
    if (m->hadamard) {
        int64_t tiles = hadamard_tiles(m->hadamard);
        if (!skip(share, tiles, 2 * cost))
            for (int64_t tile = 0; tile < tiles; tile++)
                if (take(share, 2 * cost))
                    for (int64_t i = row; i < stop; i++)
                        hadamard_shrink(m->hadamard, p->x + i * p->x_stride, n, tile,
                                        activations(step, p, seg, c, i, j) + hadamard_start(m));
    }
    if (m->kronecker) {
        const Kronecker *k = m->kronecker;
        int64_t chunk = 2 * RANKS * k->in_m / kronecker_width(k);
        if (chunk < 1) chunk = 1;
        if (!skip(share, (k->in_m + chunk - 1) / chunk, 2 * cost))
            for (int64_t low = 0; low < k->in_m; low += chunk) {
                int64_t high = low + chunk < k->in_m ? low + chunk : k->in_m;
                if (take(share, 2 * cost))
                    for (int64_t i = row; i < stop; i++)
                        kronecker_shrink(k, p->x + i * p->x_stride, low, high,
                                         activations(step, p, seg, c, i, j) + kronecker_start(m));
            }
    }
    if ((m->rank && !m->a) || m->circulant || m->pairs)
        shrink_rows(step, p, seg, c, j, row, stop, share);
}

static void shrink(const Step *step, const Projection *p, Share *share) {
    for (int64_t s = 0; s < step->num_segments; s++) {
        const Segment *seg = &step->segments[s];
        for (int64_t row = seg->row_start; row < seg->row_end; row += ROWS) {
            int64_t stop = row + ROWS < seg->row_end ? row + ROWS : seg->row_end;
            for (int64_t k = seg->first; k < seg->last; k++)
                for (int64_t j = 0; j < p->num_slices; j++)
                    shrink_module(step, p, seg, &step->components[k], j, row, stop, share);
        }
    }
}

/* acc *= 1 + sum_k w_k (g_k - 1), where g_k are the gains of slice j. */
INLINE void apply_gain(const Step *step, const Projection *p, const Segment *seg, int64_t j,
                       int64_t low, int64_t count, float *acc, int64_t rows) {
    float gain[COLUMNS];
    int has_gain = 0;
    for (int64_t k = seg->first; k < seg->last; k++) {
        const Component *c = &step->components[k];
        const float *g = c->modules[p->module + j].gain;
        if (!g) continue;
        if (!has_gain)
            for (int64_t o = 0; o < count; o++) gain[o] = 1.0f;
        has_gain = 1;
        float w = (float)c->weight;
        for (int64_t o = 0; o < count; o++) gain[o] += w * (g[low + o] - 1.0f);
    }
    if (has_gain)
        for (int64_t i = 0; i < rows; i++)
            for (int64_t o = 0; o < count; o++) acc[i * COLUMNS + o] *= gain[o];
}

INLINE void widen(const bf16 *from, int64_t count, float *to) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store_f32(to + i, load_bf16(from + i));
    for (; i < count; i++) to[i] = to_f32(from[i]);
}

/* With AVX512-BF16, subnormal results become 0, as in the base's product. */
INLINE void narrow(const float *from, int64_t count, bf16 *to) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
#if HAS_AVX512_BF16
        *(u16x16 *)(to + i) = (u16x16)_mm512_cvtneps_pbh((__m512)load_f32(from + i));
#else
        store_bf16(to + i, load_f32(from + i));
#endif
    }
    for (; i < count; i++) to[i] = to_bf16(from[i]);
}

/* Expands at most AT_ONCE rows from `row` on, for columns [low, low + count) of slice j, which starts at column
 * `first` of y. */
KERNEL static void expand_columns(const Step *step, const Projection *p, const Segment *seg,
                                  int64_t row, int64_t rows, int64_t j, int64_t first, int64_t low,
                                  int64_t count) {
    float acc[AT_ONCE * COLUMNS] __attribute__((aligned(64)));
    bf16 *y = p->y + row * p->y_stride + first + low;
    for (int64_t i = 0; i < rows; i++) widen(y + i * p->y_stride, count, acc + i * COLUMNS);
    apply_gain(step, p, seg, j, low, count, acc, rows);
    if (p->bias)
        for (int64_t i = 0; i < rows; i++)
            for (int64_t o = 0; o < count; o++)
                acc[i * COLUMNS + o] += to_f32(p->bias[first + low + o]);
    for (int64_t k = seg->first; k < seg->last; k++) {
        const Component *c = &step->components[k];
        const Module *m = &c->modules[p->module + j];
        float w = (float)c->weight;
        Rows part = {.x = p->x + row * p->x_stride, .v = activations(step, p, seg, c, row, j), .acc = acc,
                     .count = rows, .x_stride = p->x_stride, .v_stride = p->num_slices * c->width};
        int64_t width = p->widths[j];
        if (m->bias)
            for (int64_t i = 0; i < rows; i++)
                for (int64_t o = 0; o < count; o++) acc[i * COLUMNS + o] += w * m->bias[low + o];
        if (m->rank && rows == 1) find_next(step, p, seg, c, j, low, &part);
        if (m->rank) low_rank_expand(m, &part, &(ModuleSize){p->in_features, width}, low, count);
        if (m->sparse) sparse_expand(m->sparse, &part, w, p->in_features, low, count);
        if (m->dense) dense_expand(m->dense, &part, w, low, count);
        for (int64_t i = 0; i < rows; i++) {
            const float *v = part.v + i * part.v_stride;
            float *sums = acc + i * COLUMNS;
            if (m->hadamard)
                hadamard_expand(m->hadamard, v + hadamard_start(m), w, width, low, count, sums);
            if (m->kronecker)
                kronecker_expand(m->kronecker, v + kronecker_start(m), w, low, count, sums);
            if (m->circulant)
                circulant_expand(m->circulant, v + circulant_start(m), w, low, count, sums);
            if (m->pairs) pairs_expand(m->pairs, v + pairs_start(m), w, low, count, sums);
        }
    }
    for (int64_t i = 0; i < rows; i++) narrow(acc + i * COLUMNS, count, y + i * p->y_stride);
}

/* The cost of a column of slice j: its products, plus a constant for reading and rounding it. */
static int64_t column_cost(const Step *step, const Projection *p, const Segment *seg, int64_t j) {
    int64_t cost = 8;
    for (int64_t k = seg->first; k < seg->last; k++) {
        const Module *m = &step->components[k].modules[p->module + j];
        cost += m->rank;
        if (m->hadamard) cost += m->hadamard->rank * m->hadamard->rank / 2;
        if (m->pairs) cost += 2;
        if (m->circulant) cost++;
        if (m->kronecker) cost += m->kronecker->w2 ? m->kronecker->in_m : 2 * m->kronecker->rank;
        /* An entry counts as 8 products: its input must be looked up. */
        if (m->sparse) cost += 8 * m->sparse->mean;
        if (m->dense) cost += m->dense->in_features;
    }
    return cost;
}

static void expand(const Step *step, const Projection *p, Share *share) {
    for (int64_t s = 0; s < step->num_segments; s++) {
        const Segment *seg = &step->segments[s];
        int64_t first = 0;
        for (int64_t j = 0; j < p->num_slices; first += p->widths[j++]) {
            int64_t width = p->widths[j], units = (width + COLUMNS - 1) / COLUMNS;
            int64_t column = column_cost(step, p, seg, j);
            for (int64_t row = seg->row_start; row < seg->row_end; row += ROWS) {
                int64_t stop = row + ROWS < seg->row_end ? row + ROWS : seg->row_end;
                int64_t cost = column * (stop - row + READING);
                if (skip(share, units, cost)) continue;
                for (int64_t o = 0; o < width; o += COLUMNS) {
                    if (!take(share, cost)) continue;
                    int64_t count = width - o < COLUMNS ? width - o : COLUMNS;
                    for (int64_t i = row; i < stop; i += AT_ONCE)
                        expand_columns(step, p, seg, i, least(stop - i, AT_ONCE), j, first, o, count);
                }
            }
        }
    }
}

typedef struct {
    const Step *step;
    const Projection *projection;
    Share shrinking, expanding; /* walks over whole passes, with their total costs */
    int64_t pieces;
} Job;

static void shrink_piece(const void *job, int64_t thread, int64_t piece) {
    const Job *j = job;
    Share own = next_walk(&j->shrinking, piece, j->pieces);
    (void)thread;
    low_rank_begin();
    shrink(j->step, j->projection, &own);
    low_rank_end();
}

static void expand_piece(const void *job, int64_t thread, int64_t piece) {
    const Job *j = job;
    Share own = next_walk(&j->expanding, piece, j->pieces);
    (void)thread;
    low_rank_begin();
    expand(j->step, j->projection, &own);
    low_rank_end();
}

EXPORT void turret_adapt(const Step *step, const int64_t *shape, const bf16 *x, int64_t x_stride,
                         bf16 *y, int64_t y_stride, const bf16 *bias) {
    Projection p = {x, y, bias, x_stride, y_stride, shape + 3, shape[0], shape[1], shape[2]};
    int64_t threads = step->num_threads;
    Job job = {step, &p, {0}, {0}, threads > 1 ? threads * PIECES_EACH : 1};
    shrink(step, &p, &job.shrinking);
    expand(step, &p, &job.expanding);
    in_repeatable_pieces(shrink_piece, &job, job.pieces, threads);
    in_pieces(expand_piece, &job, job.pieces, threads);
}
