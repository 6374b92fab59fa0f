/* Block-circulant updates (C3A). Transforms are products with constant matrices; see
 * server/adapters/operators/circulant.py. The shrink pass computes everything, a row at a time. The scratch memory holds
 * the blocks' transforms, one sum of them, and the result.
 *
 * If LANES divides the size, the matrix is factored (Cooley and Tukey). With s parts and n = j + s q,
 *
 *     X_f = sum_j e^(-2 pi i j f / size) Y_j,f mod LANES      Y_j,g = sum_q x_(j + s q) e^(-2 pi i g q / LANES)
 *
 * where Y_j consists of two vectors that are used for every vector of f. The inverse works likewise. Transforming
 * 192 values and back takes 23,000 products instead of 86,000, and the constants stay in the nearest cache.
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

/* sum = sum over n of X_n conj(K_n): first the real parts, then the imaginary ones. */
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

/* Computes Y_j of parts [j, j + count), [parts, 2, LANES]. */
INLINE void transform_parts(const Circulant *c, const float *values, int64_t j, const int count,
                            float *found) {
    f32x16 real[count], imaginary[count];
    for (int p = 0; p < count; p++) real[p] = imaginary[p] = (f32x16){0};
    for (int64_t q = 0; q < LANES; q++) {
        f32x16 cosines = load_f32(c->forward + q * 2 * LANES);
        f32x16 sines = load_f32(c->forward + q * 2 * LANES + LANES);
        for (int p = 0; p < count; p++) {
            float value = values[q * c->parts + j + p];
            real[p] += value * cosines;
            imaginary[p] += value * sines;
        }
    }
    for (int p = 0; p < count; p++) {
        store_f32(found + (j + p) * 2 * LANES, real[p]);
        store_f32(found + (j + p) * 2 * LANES + LANES, imaginary[p]);
    }
}

/* Computes vectors [f, f + count) of frequencies: multiplies the parts' transforms by `turns` and adds them up. */
INLINE void turn_parts(const Circulant *c, const float *found, int64_t f, const int count, float *out) {
    int64_t width = c->width;
    f32x16 real[count], imaginary[count];
    for (int v = 0; v < count; v++) real[v] = imaginary[v] = (f32x16){0};
    for (int64_t j = 0; j < c->parts; j++) {
        f32x16 yr = load_f32(found + j * 2 * LANES), yi = load_f32(found + j * 2 * LANES + LANES);
        const float *turns = c->turns + j * 2 * width + f;
        for (int v = 0; v < count; v++) {
            f32x16 cosine = load_f32(turns + v * LANES), sine = load_f32(turns + width + v * LANES);
            real[v] += cosine * yr - sine * yi;
            imaginary[v] += cosine * yi + sine * yr;
        }
    }
    for (int v = 0; v < count; v++) {
        store_f32(out + f + v * LANES, real[v]);
        store_f32(out + width + f + v * LANES, imaginary[v]);
    }
}

INLINE void transform(const Circulant *c, const float *values, float *out) {
    float found[c->parts * 2 * LANES];
    int64_t j = 0, f = 0;
    for (; j + 4 <= c->parts; j += 4) transform_parts(c, values, j, 4, found);
    for (; j < c->parts; j++) transform_parts(c, values, j, 1, found);
    for (; f + 4 * LANES <= c->width; f += 4 * LANES) turn_parts(c, found, f, 4, out);
    for (; f < c->width; f += LANES) turn_parts(c, found, f, 1, out);
}

/* Computes values j, j + parts, .. of the block whose transform is `sum`, for parts [j, j + count). */
INLINE void values_of_parts(const Circulant *c, const float *sum, int64_t j, const int count,
                            float *block) {
    int64_t width = c->width;
    f32x16 real[count], imaginary[count], out[count];
    for (int p = 0; p < count; p++) real[p] = imaginary[p] = out[p] = (f32x16){0};
    for (int64_t f = 0; f < width; f += LANES) {
        f32x16 xr = load_f32(sum + f), xi = load_f32(sum + width + f);
        for (int p = 0; p < count; p++) {
            const float *back = c->back + (j + p) * 2 * width + f;
            f32x16 cosine = load_f32(back), sine = load_f32(back + width);
            real[p] += cosine * xr - sine * xi;
            imaginary[p] += cosine * xi + sine * xr;
        }
    }
    for (int64_t g = 0; g < LANES; g++) {
        f32x16 cosines = load_f32(c->inverse + g * LANES);
        f32x16 sines = load_f32(c->inverse + (LANES + g) * LANES);
        for (int p = 0; p < count; p++) out[p] += real[p][g] * cosines + imaginary[p][g] * sines;
    }
    for (int p = 0; p < count; p++)
        for (int64_t q = 0; q < LANES; q++) block[q * c->parts + j + p] = out[p][q];
}

INLINE void transform_back(const Circulant *c, const float *sum, float *block) {
    int64_t j = 0;
    for (; j + 4 <= c->parts; j += 4) values_of_parts(c, sum, j, 4, block);
    for (; j < c->parts; j++) values_of_parts(c, sum, j, 1, block);
}

KERNEL void circulant_shrink(const Circulant *c, const bf16 *x, float *z) {
    int64_t size = c->size, step = 2 * c->width, padded = PADDED(size);
    float *sum = z + c->columns * step, *result = sum + step;
    float values[size], block[padded];
    for (int64_t n = 0; n < c->columns; n++) {
        for (int64_t i = 0; i < size; i++) values[i] = to_f32(x[n * size + i]);
        if (c->parts)
            transform(c, values, z + n * step);
        else
            multiply(values, size, c->forward, step, z + n * step);
    }
    for (int64_t m = 0; m < c->rows; m++) {
        correlate(c, z, c->spectra + m * c->columns * step, sum);
        if (c->parts) {
            transform_back(c, sum, result + m * size);
            continue;
        }
        multiply(sum, step, c->inverse, padded, block);
        memcpy(result + m * size, block, size * sizeof(float));
    }
}

KERNEL void circulant_expand(const Circulant *c, const float *z, float w, int64_t low, int64_t count,
                             float *acc) {
    const float *result = z + (c->columns + 1) * 2 * c->width + low;
    for (int64_t o = 0; o < count; o++) acc[o] += w * result[o];
}
