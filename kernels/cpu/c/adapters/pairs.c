/* Adds outputs of the base to their partners (RoAd); see server/adapters/operators/pair_rotation.py. The scratch memory
 * keeps the base's result, because expand overwrites it. */
#include "adapters.h"

KERNEL void pairs_shrink(const bf16 *y, int64_t width, float *z) {
    for (int64_t o = 0; o < width; o++) z[o] = to_f32(y[o]);
}

KERNEL void pairs_expand(const PairRotation *p, const float *z, float w, int64_t low, int64_t count,
                         float *acc) {
    int64_t half = p->group / 2;
    for (int64_t o = 0; o < count;) {
        int64_t column = low + o, place = column % half;
        int64_t run = half - place < count - o ? half - place : count - o;
        const float *other = z + column + (column / half % 2 ? -half : half);
        for (int64_t i = 0; i < run; i++) acc[o + i] += w * (p->sine[column + i] * other[i]);
        o += run;
    }
}
