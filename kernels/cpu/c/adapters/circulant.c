/* Block-circulant updates (C3A): transforms as products with constant matrices, see
 * kernels/adapters/circulant.py. Everything is computed in the shrink pass, a row at a time; scratch holds the
 * blocks' transforms, one sum of them, and the result.
 */
#include "adapters.h"

#define WIDE (4 * LANES)

/* out[0:columns] = sum over count of values[i] * matrix[i]; columns is a multiple of LANES. */
INLINE void multiply(const float *values, int64_t count, const float *matrix, int64_t columns,
                     float *out) {
    int64_t c = 0;
    for (; c + WIDE <= columns; c += WIDE) {
        f32x16 s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
        for (int64_t i = 0; i < count; i++) {
            const float *row = matrix + i * columns + c;
            s0 += values[i] * load_f32(row);
            s1 += values[i] * load_f32(row + LANES);
            s2 += values[i] * load_f32(row + 2 * LANES);
            s3 += values[i] * load_f32(row + 3 * LANES);
        }
        store_f32(out + c, s0);
        store_f32(out + c + LANES, s1);
        store_f32(out + c + 2 * LANES, s2);
        store_f32(out + c + 3 * LANES, s3);
    }
    for (; c < columns; c += LANES) {
        f32x16 sum = {0};
        for (int64_t i = 0; i < count; i++) sum += values[i] * load_f32(matrix + i * columns + c);
        store_f32(out + c, sum);
    }
}

/* sum = sum over n of X_n conj(K_n), real parts and then imaginary ones. */
INLINE void correlate(const Circulant *c, const float *found, const float *kernels, float *sum) {
    int64_t width = c->width, step = 2 * width;
    for (int64_t f = 0; f < width; f += LANES) {
        f32x16 real = {0}, imaginary = {0};
        for (int64_t n = 0; n < c->columns; n++) {
            f32x16 xr = load_f32(found + n * step + f), xi = load_f32(found + n * step + width + f);
            f32x16 kr = load_f32(kernels + n * step + f);
            f32x16 ki = load_f32(kernels + n * step + width + f);
            real += xr * kr + xi * ki;
            imaginary += xi * kr - xr * ki;
        }
        store_f32(sum + f, real);
        store_f32(sum + width + f, imaginary);
    }
}

KERNEL void circulant_shrink(const Circulant *c, const bf16 *x, float *z) {
    int64_t size = c->size, step = 2 * c->width, padded = PADDED(size);
    float *sum = z + c->columns * step, *result = sum + step;
    float values[size], block[padded];
    for (int64_t n = 0; n < c->columns; n++) {
        for (int64_t i = 0; i < size; i++) values[i] = to_f32(x[n * size + i]);
        multiply(values, size, c->forward, step, z + n * step);
    }
    for (int64_t m = 0; m < c->rows; m++) {
        correlate(c, z, c->spectra + m * c->columns * step, sum);
        multiply(sum, step, c->inverse, padded, block);
        memcpy(result + m * size, block, size * sizeof(float));
    }
}

KERNEL void circulant_expand(const Circulant *c, const float *z, float w, int64_t low, int64_t count,
                             float *acc) {
    const float *result = z + (c->columns + 1) * 2 * c->width + low;
    for (int64_t o = 0; o < count; o++) acc[o] += w * result[o];
}
