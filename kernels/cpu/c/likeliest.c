/* Finds the likeliest token of each row of logits, among all tokens or those of a mask; see
 * kernels/likeliest.py.
 *
 * A logit is rarely larger than all logits before it. So most logits are only compared with the
 * best so far, many at once.
 */
#include "vec.h"

#include <math.h>

/* Number of values that are compared before the code branches on the result. */
#define BLOCK (8 * LANES)

typedef struct {
    float value;
    int64_t token;
} Best;

/* Whether any of `count` vectors has a value that is not at most `best`: a larger one, or a NaN. */
INLINE int has_more(const float *values, int64_t count, float best) {
    i32x16 more = {0};
    for (int64_t v = 0; v < count; v++) more |= ~are_at_most(load_f32(values + v * LANES), splat(best));
    uint64_t parts[8];
    memcpy(parts, &more, sizeof parts);
    return ((parts[0] | parts[1] | parts[2] | parts[3]) | (parts[4] | parts[5] | parts[6] | parts[7])) != 0;
}

/* Keeps the first of equal values, and the first NaN, as torch's argmax does. */
INLINE void look(Best *best, float value, int64_t token) {
    int is_more = value > best->value || (value != value && best->value == best->value);
    if (is_more) best->value = value, best->token = token;
}

static int64_t of_all(const float *row, int64_t vocab) {
    Best best = {-INFINITY, 0};
    int64_t t = 0;
    for (; t + BLOCK <= vocab; t += BLOCK)
        if (has_more(row + t, BLOCK / LANES, best.value))
            for (int64_t i = t; i < t + BLOCK; i++) look(&best, row[i], i);
    for (; t < vocab; t++) look(&best, row[t], t);
    return best.token;
}

static int64_t of_some(const float *row, int64_t vocab, const uint32_t *words, int64_t num_words) {
    Best best = {-INFINITY, 0};
    for (int64_t w = 0; w < num_words && w * 32 < vocab; w++) {
        int64_t t = w * 32;
        if (!words[w] || (t + 32 <= vocab && !has_more(row + t, 32 / LANES, best.value))) continue;
        for (int64_t i = 0; i < least(32, vocab - t); i++)
            if (words[w] >> i & 1) look(&best, row[t + i], t + i);
    }
    return best.token;
}

/* rows: indices of rows of `logits`, which have `vocab` floats each and are `stride` apart. words: as in
 * token_mask.c, or null if every token is allowed. tokens: receives the likeliest token of each row. */
EXPORT KERNEL void turret_likeliest(const float *logits, int64_t stride, int64_t vocab, const int64_t *rows,
                                    int64_t num_rows, const uint32_t *words, int64_t num_words,
                                    int64_t *tokens) {
    for (int64_t i = 0; i < num_rows; i++) {
        const float *row = logits + rows[i] * stride;
        tokens[i] = words ? of_some(row, vocab, words + i * num_words, num_words) : of_all(row, vocab);
    }
}
