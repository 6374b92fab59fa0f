/* dX = dY W for bf16 weights in their own layout, [out, in]. */
#include "transposed.h"

struct Source {
    const bf16 *w;
};

#define AHEAD 128 /* distance of the prefetch, in outputs: a panel reads one cache line of each output */

static void write_weights(const Transposed *t, int64_t panel, int64_t first, int64_t count, Numbers *to) {
    const bf16 *w = t->source->w + first * t->in_features + panel * PANEL;
    for (int64_t o = 0; o < count; o += OUTPUTS, w += OUTPUTS * t->in_features, to++) {
        int64_t left = t->out_features - first - o;
        for (int i = 0; i < OUTPUTS; i++) __builtin_prefetch(w + (AHEAD + i) * t->in_features);
#if HAS_AVX512_BF16
        __m512i a = left > 0 ? _mm512_loadu_si512(w) : _mm512_setzero_si512();
        join_outputs(a, left > 1 ? _mm512_loadu_si512(w + t->in_features) : _mm512_setzero_si512(), *to);
#else
        for (int i = 0; i < PANEL; i += WIDTH) *(fvec_at *)(*to + i) = left > 0 ? fvec_bf16(w + i) : (fvec){0};
#endif
    }
}

EXPORT void turret_transposed_product(const void *grad, int64_t is_rounded, int64_t rows, const bf16 *w, float *dx, int64_t out_features,
                                      int64_t in_features, int64_t num_threads, bf16 *scratch) {
    Source source = {w};
    multiply_transposed(&source, grad, is_rounded, rows, dx, out_features, in_features, num_threads, scratch);
}
