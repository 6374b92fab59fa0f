/* dX = dY W for bf16 weights in their own layout, [out, in]. */
#include "transposed.h"

struct Source {
    const bf16 *w;
};

#define AHEAD 16 /* outputs whose weights are prefetched: a panel reads one line of each */

static void write_weights(const Transposed *t, int64_t panel, int64_t first, int64_t count, Numbers *to) {
    const bf16 *w = t->source->w + first * t->in_features + panel * PANEL;
    for (int64_t o = 0; o < count; o += OUTPUTS, w += OUTPUTS * t->in_features, to++) {
#if HAS_AVX512_BF16
        int64_t left = t->out_features - first - o;
        __builtin_prefetch(w + AHEAD * t->in_features);
        __builtin_prefetch(w + (AHEAD + 1) * t->in_features);
        __m512i a = left > 0 ? _mm512_loadu_si512(w) : _mm512_setzero_si512();
        join_outputs(a, left > 1 ? _mm512_loadu_si512(w + t->in_features) : _mm512_setzero_si512(), *to);
#else
        __builtin_prefetch(w + AHEAD * t->in_features);
        for (int i = 0; i < PANEL; i += WIDTH) *(fvec_at *)(*to + i) = fvec_bf16(w + i);
#endif
    }
}

EXPORT void turret_transposed_product(const float *grad, int64_t rows, const bf16 *w, float *dx, int64_t out_features,
                                      int64_t in_features, int64_t num_threads, void *scratch) {
    Source source = {w};
    multiply_transposed(&source, grad, rows, dx, out_features, in_features, num_threads, scratch);
}
