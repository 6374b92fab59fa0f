/* A fused projection's adapters: y = G * y + b + sum_k w_k B_k (A_k x), one rounding to bf16.
 *
 * Each segment's rows read the factors of its own adapters where they lie, through a table of
 * pointers per adapter. Every dot product, and every sum over ranks, runs in an order that depends
 * on its own adapter only.
 */
#include "vec.h"

#include <omp.h>

#define RANKS 4           /* ranks a shrink unit takes together */
#define COLUMN_VECTORS 8  /* vectors of columns an expand unit takes together */
#define COLUMNS (COLUMN_VECTORS * LANES)
#define ROWS 32           /* rows of a segment that a unit takes together */

typedef struct {
    const bf16 *a;      /* [rank, in] */
    const bf16 *b;      /* [rank, out] */
    const float *gain;  /* [out], or null */
    const float *bias;  /* [out], or null */
    const float *input_gain; /* [in], or null */
    int64_t rank;       /* 0: no low-rank update */
} Module;

typedef struct {
    int64_t row_start, row_end;
    int64_t first, last; /* its components */
} Segment;

typedef struct {
    const Module *modules; /* of one adapter: [layers * modules of a layer] */
    int64_t scratch;       /* where its rank activations start: [rows, slices, max_rank] */
    int64_t max_rank;
    double weight;
} Component;

typedef struct {
    const Segment *segments;
    const Component *components;
    float *scratch;
    int64_t num_segments;
    int64_t num_threads;
} Step;

typedef struct {
    const bf16 *x;
    bf16 *y;
    const bf16 *bias; /* the base's, [sum of widths], or null */
    int64_t x_stride, y_stride;
    const int64_t *widths;
    int64_t in_features, num_slices;
    int64_t module; /* index of the first slice's module */
} Projection;

/* Four dot products; brings the next four ranks of A into the cache meanwhile. */
KERNEL static void dot4(const bf16 *x, const bf16 *a, int64_t n, float *out) {
    f32x16 s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
    const bf16 *a1 = a + n, *a2 = a + 2 * n, *a3 = a + 3 * n;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        f32x16 v = load_bf16(x + i);
        if (i % (2 * LANES) == 0)
            for (int q = RANKS; q < 2 * RANKS; q++) __builtin_prefetch(a + q * n + i);
        s0 += v * load_bf16(a + i);
        s1 += v * load_bf16(a1 + i);
        s2 += v * load_bf16(a2 + i);
        s3 += v * load_bf16(a3 + i);
    }
    float t0 = 0, t1 = 0, t2 = 0, t3 = 0;
    for (; i < n; i++) {
        float v = to_f32(x[i]);
        t0 += v * to_f32(a[i]);
        t1 += v * to_f32(a1[i]);
        t2 += v * to_f32(a2[i]);
        t3 += v * to_f32(a3[i]);
    }
    out[0] = sum_lanes(s0) + t0;
    out[1] = sum_lanes(s1) + t1;
    out[2] = sum_lanes(s2) + t2;
    out[3] = sum_lanes(s3) + t3;
}

KERNEL static void dot1(const bf16 *x, const bf16 *a, int64_t n, float *out) {
    f32x16 s = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) s += load_bf16(x + i) * load_bf16(a + i);
    float t = 0;
    for (; i < n; i++) t += to_f32(x[i]) * to_f32(a[i]);
    out[0] = sum_lanes(s) + t;
}

/* acc[0:COLUMNS] += w * v B, whole vectors; brings the next COLUMNS of B into the cache. */
INLINE void add_block(float *acc, const float *v, float w, const bf16 *b, int64_t rank,
                             int64_t stride) {
    f32x16 s[COLUMN_VECTORS];
    for (int j = 0; j < COLUMN_VECTORS; j++) s[j] = load_f32(acc + j * LANES);
    for (int64_t r = 0; r < rank; r++, b += stride) {
        float c = w * v[r];
        for (int j = 0; j < COLUMN_VECTORS; j += 2) __builtin_prefetch(b + COLUMNS + j * LANES);
        for (int j = 0; j < COLUMN_VECTORS; j++) s[j] += c * load_bf16(b + j * LANES);
    }
    for (int j = 0; j < COLUMN_VECTORS; j++) store_f32(acc + j * LANES, s[j]);
}

/* The same for the columns at a slice's end that do not fill a block. */
INLINE void add_rest(float *acc, const float *v, float w, const bf16 *b, int64_t rank,
                     int64_t stride, int64_t columns) {
    for (int64_t r = 0; r < rank; r++, b += stride) {
        float c = w * v[r];
        for (int64_t o = 0; o < columns; o++) acc[o] += c * to_f32(b[o]);
    }
}

static void shrink(const Step *step, const Projection *p, int64_t part, int64_t parts) {
    int64_t total = 0;
    for (int pass = 0; pass < 2; pass++) { /* count the units, then do this thread's share */
        int64_t low = total * part / parts, high = total * (part + 1) / parts, unit = 0;
        for (int64_t s = 0; s < step->num_segments; s++) {
            const Segment *seg = &step->segments[s];
            for (int64_t row = seg->row_start; row < seg->row_end; row += ROWS) {
                int64_t stop = row + ROWS < seg->row_end ? row + ROWS : seg->row_end;
                for (int64_t k = seg->first; k < seg->last; k++) {
                    const Component *c = &step->components[k];
                    for (int64_t j = 0; j < p->num_slices; j++) {
                        const Module *m = &c->modules[p->module + j];
                        int64_t units = (m->rank + RANKS - 1) / RANKS;
                        if (pass == 0 || unit + units <= low || unit >= high) {
                            unit += units;
                            continue;
                        }
                        for (int64_t r = 0; r < m->rank; r += RANKS, unit++) {
                            if (unit < low || unit >= high) continue;
                            const bf16 *a = m->a + r * p->in_features;
                            for (int64_t i = row; i < stop; i++) {
                                const bf16 *x = p->x + i * p->x_stride;
                                float *v = step->scratch + c->scratch + r +
                                           ((i - seg->row_start) * p->num_slices + j) * c->max_rank;
                                if (r + RANKS <= m->rank) {
                                    dot4(x, a, p->in_features, v);
                                } else {
                                    for (int64_t q = 0; q < m->rank - r; q++)
                                        dot1(x, a + q * p->in_features, p->in_features, v + q);
                                }
                            }
                        }
                    }
                }
            }
        }
        total = unit;
    }
}

/* One row, columns [low, low + count) of slice j, which starts at column `first` of y. */
KERNEL static void expand_columns(const Step *step, const Projection *p, const Segment *seg, int64_t row,
                           int64_t j, int64_t first, int64_t low, int64_t count) {
    float acc[COLUMNS] __attribute__((aligned(64)));
    float gain[COLUMNS];
    bf16 *y = p->y + row * p->y_stride + first + low;
    for (int64_t o = 0; o < count; o++) acc[o] = to_f32(y[o]);
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
        for (int64_t o = 0; o < count; o++) acc[o] *= gain[o];
    if (p->bias)
        for (int64_t o = 0; o < count; o++) acc[o] += to_f32(p->bias[first + low + o]);
    for (int64_t k = seg->first; k < seg->last; k++) {
        const Component *c = &step->components[k];
        const Module *m = &c->modules[p->module + j];
        float w = (float)c->weight;
        if (m->bias)
            for (int64_t o = 0; o < count; o++) acc[o] += w * m->bias[low + o];
        if (!m->rank) continue;
        const float *v = step->scratch + c->scratch +
                         ((row - seg->row_start) * p->num_slices + j) * c->max_rank;
        int64_t width = p->widths[j];
        if (count == COLUMNS)
            add_block(acc, v, w, m->b + low, m->rank, width);
        else
            add_rest(acc, v, w, m->b + low, m->rank, width, count);
    }
    for (int64_t o = 0; o < count; o++) y[o] = to_bf16(acc[o]);
}

static void expand(const Step *step, const Projection *p, int64_t part, int64_t parts) {
    int64_t total = 0;
    for (int pass = 0; pass < 2; pass++) {
        int64_t low = total * part / parts, high = total * (part + 1) / parts, unit = 0;
        for (int64_t s = 0; s < step->num_segments; s++) {
            const Segment *seg = &step->segments[s];
            for (int64_t row = seg->row_start; row < seg->row_end; row += ROWS) {
                int64_t stop = row + ROWS < seg->row_end ? row + ROWS : seg->row_end;
                int64_t first = 0;
                for (int64_t j = 0; j < p->num_slices; first += p->widths[j++]) {
                    int64_t width = p->widths[j];
                    int64_t units = (width + COLUMNS - 1) / COLUMNS;
                    if (pass == 0 || unit + units <= low || unit >= high) {
                        unit += units;
                        continue;
                    }
                    for (int64_t o = 0; o < width; o += COLUMNS, unit++) {
                        if (unit < low || unit >= high) continue;
                        int64_t count = width - o < COLUMNS ? width - o : COLUMNS;
                        for (int64_t i = row; i < stop; i++)
                            expand_columns(step, p, seg, i, j, first, o, count);
                    }
                }
            }
        }
        total = unit;
    }
}

EXPORT void turret_adapt(const Step *step, const int64_t *shape, const bf16 *x, int64_t x_stride,
                         bf16 *y, int64_t y_stride, const bf16 *bias) {
    Projection p = {x, y, bias, x_stride, y_stride, shape + 3, shape[0], shape[1], shape[2]};
#pragma omp parallel num_threads(step->num_threads)
    {
        int64_t part = omp_get_thread_num(), parts = omp_get_num_threads();
        shrink(step, &p, part, parts);
#pragma omp barrier
        expand(step, &p, part, parts);
    }
}

/* out = x * sum_k w_k (l_k - 1) for the listed rows, [count, in]; module: of the slice. */
EXPORT void turret_input_gain(const Step *step, int64_t module, int64_t in_features, const bf16 *x,
                              int64_t x_stride, const int64_t *rows, const int64_t *segments,
                              int64_t count, bf16 *out) {
    for (int64_t n = 0; n < count; n++) {
        const Segment *seg = &step->segments[segments[n]];
        const bf16 *row = x + rows[n] * x_stride;
        for (int64_t i = 0; i < in_features; i++) {
            float g = 0;
            for (int64_t k = seg->first; k < seg->last; k++) {
                const Component *c = &step->components[k];
                const float *l = c->modules[module].input_gain;
                if (l) g += (float)c->weight * (l[i] - 1.0f);
            }
            out[n * in_features + i] = to_bf16(to_f32(row[i]) * g);
        }
    }
}
