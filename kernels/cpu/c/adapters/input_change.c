/* Inputs as adapters change them: x * start + sum_k w_k ((l_k - 1) * x + D_k x), for the rows that
 * the caller lists. D_k is block-diagonal (kernels/adapters/input_blocks.py).
 */
#include "adapters.h"
#include "team.h"

/* sums[0:size] = x D of one block, D being [size, size]. */
INLINE void multiply_block(const bf16 *x, const bf16 *block, int64_t size, float *sums) {
    int64_t whole = size / LANES * LANES;
    for (int64_t j = 0; j < whole; j += LANES) {
        f32x16 sum = {0};
        for (int64_t i = 0; i < size; i++) sum += to_f32(x[i]) * load_bf16(block + i * size + j);
        store_f32(sums + j, sum);
    }
    for (int64_t j = whole; j < size; j++) {
        float sum = 0;
        for (int64_t i = 0; i < size; i++) sum += to_f32(x[i]) * to_f32(block[i * size + j]);
        sums[j] = sum;
    }
}

INLINE void add_blocks(const InputBlocks *d, float w, const bf16 *x, int64_t in_features,
                       float *total) {
    float sums[d->size + LANES];
    int64_t step = d->count > 1 ? d->size * d->size : 0;
    const bf16 *block = d->blocks;
    for (int64_t low = 0; low < in_features; low += d->size, block += step) {
        multiply_block(x + low, block, d->size, sums);
        for (int64_t j = 0; j < d->size; j++) total[low + j] += w * sums[j];
    }
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

/* out: [count, in]; members: of each listed row, first and last of its components. */
EXPORT void turret_input_change(const Step *step, int64_t module, int64_t in_features,
                                const bf16 *x, int64_t x_stride, const int64_t *rows,
                                const int64_t *members, int64_t count, double start, bf16 *out) {
    Job job = {step, x, rows, members, out, module, in_features, x_stride, (float)start};
    in_pieces(change_piece, &job, count, step->num_threads);
}
