/* Sets the logits of tokens that a constraint forbids to minus infinity; see kernels/likeliest.py. Most
 * words of a mask are all ones or all zeros.
 */
#include "vec.h"

#include <math.h>

/* rows: indices of rows of `logits`, which have `vocab` floats each and are `stride` apart. words:
 * [num_rows, num_words]; token t is bit t % 32 of word t / 32. */
EXPORT KERNEL void turret_token_mask(float *logits, int64_t stride, int64_t vocab, const int64_t *rows,
                                     const uint32_t *words, int64_t num_rows, int64_t num_words) {
    for (int64_t i = 0; i < num_rows; i++, words += num_words) {
        float *row = logits + rows[i] * stride;
        for (int64_t w = 0; w * 32 < vocab; w++) {
            uint32_t bits = w < num_words ? words[w] : 0;
            float *at = row + w * 32;
            int64_t count = least(32, vocab - w * 32);
            if (bits == UINT32_MAX) continue;
            if (count == 32)
                for (int64_t t = 0; t < 32; t++) at[t] = bits >> t & 1 ? at[t] : -INFINITY;
            else
                for (int64_t t = 0; t < count; t++) at[t] = bits >> t & 1 ? at[t] : -INFINITY;
        }
    }
}
