/* Log probabilities of a vocabulary, and the gradient of one log probability of each row. A row's bits depend on the
 * row alone.
 */
#include "team.h"
#include "vec.h"

#include <math.h>

#define SUMS 4 /* vectors of sums, so that no sum has many terms */

/* The logits of each row are either `wide` or `narrow`. */
typedef struct {
    const float *wide;
    const bf16 *narrow;
    float *sums; /* [rows, 2]: the largest logit, and the logarithm of the sum of e^(logit - largest) */
    float *out;  /* log probabilities, or null */
    bf16 *grads; /* in the memory of `narrow` */
    const int64_t *targets;
    const float *slopes;
    int64_t width;
} Logits;

INLINE f32x16 logits_at(const Logits *l, int64_t at) {
    if (l->wide) return load_f32(l->wide + at);
    return load_bf16(l->narrow + at);
}

/* The last logits of a row, of which only `count` exist; the others are -inf. */
INLINE f32x16 some_logits(const Logits *l, int64_t at, int64_t count) {
    float some[LANES];
    for (int i = 0; i < LANES; i++)
        some[i] = i >= count ? -INFINITY : l->wide ? l->wide[at + i] : to_f32(l->narrow[at + i]);
    return load_f32(some);
}

KERNEL static void sum_row(const void *job, int64_t thread, int64_t row) {
    const Logits *l = job;
    int64_t first = row * l->width, whole = l->width / LANES * LANES;
    f32x16 largest = some_logits(l, first + whole, l->width - whole), sums[SUMS] = {{0}};
    float most = -INFINITY;
    (void)thread;
    for (int64_t i = 0; i < whole; i += LANES) largest = max_vec(largest, logits_at(l, first + i));
    for (int i = 0; i < LANES; i++) most = fmaxf(most, largest[i]);
    sums[0] = exp_vec(some_logits(l, first + whole, l->width - whole) - most);
    for (int64_t i = 0; i < whole; i += LANES) sums[i / LANES % SUMS] += exp_vec(logits_at(l, first + i) - most);
    float sum = sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])), rest = (float)log(sum);
    l->sums[2 * row] = most, l->sums[2 * row + 1] = rest;
    if (!l->out) return;
    for (int64_t i = 0; i < whole; i += LANES)
        store_f32(l->out + first + i, (logits_at(l, first + i) - most) - rest);
    for (int64_t i = first + whole; i < first + l->width; i++) l->out[i] = (l->wide[i] - most) - rest;
}

/* x, out: [rows, width]; sums: room for [rows, 2]. */
EXPORT void turret_log_softmax(const float *x, float *out, float *sums, int64_t rows, int64_t width, int64_t threads) {
    Logits job = {.wide = x, .out = out, .sums = sums, .width = width};
    in_pieces(sum_row, &job, rows, rows * width > SMALL ? threads : 1);
}

/* Computes `sums` of Logits. */
EXPORT void turret_log_sums(const bf16 *x, float *sums, int64_t rows, int64_t width, int64_t threads) {
    Logits job = {.narrow = x, .sums = sums, .width = width};
    in_pieces(sum_row, &job, rows, rows * width > SMALL ? threads : 1);
}

KERNEL static void gradient_row(const void *job, int64_t thread, int64_t row) {
    const Logits *l = job;
    int64_t first = row * l->width, target = first + l->targets[row], i = first, end = first + l->width;
    float most = l->sums[2 * row], rest = l->sums[2 * row + 1], slope = l->slopes[row];
    float share = exp_vec(splat((to_f32(l->narrow[target]) - most) - rest))[0];
    (void)thread;
    for (; i + LANES <= end; i += LANES)
        store_bf16(l->grads + i, exp_vec((logits_at(l, i) - most) - rest) * -slope);
    if (i < end) {
        bf16 some[LANES];
        store_bf16(some, exp_vec((some_logits(l, i, end - i) - most) - rest) * -slope);
        memcpy(l->grads + i, some, (end - i) * sizeof(bf16));
    }
    l->grads[target] = to_bf16(slope - share * slope);
}

/* Replaces logits by the gradient of the sum of the rows' slopes times their targets' log probabilities. For a row,
 * that is its slope times the difference between the target's one-hot vector and the probabilities. */
EXPORT void turret_logit_gradients(bf16 *x, float *sums, const int64_t *targets, const float *slopes,
                                   int64_t rows, int64_t width, int64_t threads) {
    Logits job = {.narrow = x, .grads = x, .sums = sums, .targets = targets, .slopes = slopes, .width = width};
    in_pieces(gradient_row, &job, rows, rows * width > SMALL ? threads : 1);
}
