/* Changes inputs as the adapters require: x * start + sum_k w_k ((l_k - 1) * x + D_k x), for the rows that the
 * caller lists. D_k is block-diagonal (server/adapters/operators/input_blocks.py).
 */
#include "entries.h"
#include "team.h"

/* total[:, j : j + vectors * LANES] += w * x D for `count` blocks D of [size, size], which are `step` apart. The
 * blocks are computed side by side, because the additions of a single sum would wait for each other. */
INLINE void add_products(const bf16 *x, const bf16 *blocks, int64_t size, int64_t step, int64_t j,
                         float w, const int count, const int vectors, float *total) {
    f32x16 sums[count][vectors];
    for (int n = 0; n < count; n++)
        for (int v = 0; v < vectors; v++) sums[n][v] = (f32x16){0};
    for (int64_t i = 0; i < size; i++)
        for (int n = 0; n < count; n++) {
            const bf16 *row = blocks + n * step + i * size + j;
            for (int v = 0; v < vectors; v++)
                sums[n][v] += to_f32(x[n * size + i]) * load_bf16(row + v * LANES);
        }
    for (int n = 0; n < count; n++)
        for (int v = 0; v < vectors; v++) {
            float *to = total + n * size + j + v * LANES;
            store_f32(to, load_f32(to) + w * sums[n][v]);
        }
}

INLINE void add_block(const bf16 *x, const bf16 *block, int64_t size, float w, float *total) {
    int64_t j = 0;
    for (; j + 4 * LANES <= size; j += 4 * LANES) add_products(x, block, size, 0, j, w, 1, 4, total);
    for (; j + LANES <= size; j += LANES) add_products(x, block, size, 0, j, w, 1, 1, total);
    for (; j < size; j++) {
        float sum = 0;
        for (int64_t i = 0; i < size; i++) sum += to_f32(x[i]) * to_f32(block[i * size + j]);
        total[j] += w * sum;
    }
}

INLINE void add_blocks(const InputBlocks *d, float w, const bf16 *x, int64_t in_features,
                       float *total) {
    int64_t size = d->size, step = d->count > 1 ? size * size : 0, low = 0;
    const bf16 *block = d->blocks;
    if (size == 2 * LANES)
        for (; low + 4 * size <= in_features; low += 4 * size, block += 4 * step)
            add_products(x + low, block, size, step, 0, w, 4, 2, total + low);
    for (; low < in_features; low += size, block += step)
        add_block(x + low, block, size, w, total + low);
}

KERNEL static void change_row(const Step *step, int64_t module, int64_t in_features, const bf16 *x,
                              int64_t first, int64_t last, float start, bf16 *out) {
    float total[in_features];
    for (int64_t i = 0; i < in_features; i++) total[i] = start * to_f32(x[i]);
    for (int64_t k = first; k < last; k++) {
        const Module *m = &step->components[k].modules[module];
        float w = (float)step->components[k].weight;
        if (m->input_gain)
            for (int64_t i = 0; i < in_features; i++)
                total[i] += w * (m->input_gain[i] - 1.0f) * to_f32(x[i]);
        if (m->input_blocks) add_blocks(m->input_blocks, w, x, in_features, total);
    }
    for (int64_t i = 0; i < in_features; i++) out[i] = to_bf16(total[i]);
}

typedef struct {
    const Step *step;
    const bf16 *x;
    const int64_t *rows, *members;
    bf16 *out;
    int64_t module, in_features, x_stride;
    float start;
} Job;

static void change_piece(const void *job, int64_t thread, int64_t n) {
    const Job *j = job;
    (void)thread;
    change_row(j->step, j->module, j->in_features, j->x + j->rows[n] * j->x_stride,
               j->members[2 * n], j->members[2 * n + 1], j->start, j->out + n * j->in_features);
}

/* out: [count, in]; members: [first, last) of the components of each listed row. */
EXPORT void turret_input_change(const Step *step, int64_t module, int64_t in_features,
                                const bf16 *x, int64_t x_stride, const int64_t *rows,
                                const int64_t *members, int64_t count, double start, bf16 *out) {
    Job job = {step, x, rows, members, out, module, in_features, x_stride, (float)start};
    in_repeatable_pieces(change_piece, &job, count, step->num_threads);
}

typedef struct {
    const Step *step;
    const Inputs *inputs;
    const bf16 *x;
    bf16 *out;
    int64_t module, in_features, rows;
} Changes;

static void change_or_copy(const void *job, int64_t thread, int64_t n) {
    const Changes *j = job;
    int64_t row = n % j->rows, slice = n / j->rows;
    const int64_t *change = j->inputs->changes + 3 * row;
    const bf16 *x = j->x + row * j->in_features;
    bf16 *out = j->out + n * j->in_features;
    (void)thread;
    if (change[0] < change[1])
        change_row(j->step, j->module + (change[2] ? slice : 0), j->in_features, x, change[0],
                   change[1], 1.0f, out);
    else
        memcpy(out, x, j->in_features * sizeof *out);
}

EXPORT void turret_change_inputs(const Step *step, int64_t module, const Inputs *inputs, const bf16 *x,
                          int64_t rows, int64_t in_features, bf16 *out) {
    Changes job = {step, inputs, x, out, module, in_features, rows};
    in_repeatable_pieces(change_or_copy, &job, inputs->count * rows, step->num_threads);
}
