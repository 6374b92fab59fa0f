/* Kronecker updates (LoKr): vec(w1 X w2^T), where X is x as a matrix [in_m, in_n].
 *
 * If a row does not divide into whole vectors, its last vector begins earlier. Some columns are then computed
 * twice, with the same result.
 */
#include "adapters.h"
#include "dots.h"

#define ROWS 4

INLINE int64_t clamp(int64_t value, int64_t most) { return value < most ? value : most; }

/* Computes rows of X w2^T, four rows by two vectors at a time. */
INLINE void multiply_rows(const Kronecker *k, const bf16 *x, int64_t low, int64_t high, float *z) {
    int64_t width = k->out_k, stride = PADDED(width);
    if (width < LANES) {
        for (int64_t m = low; m < high; m++)
            for (int64_t c = 0; c < width; c++) {
                float sum = 0;
                for (int64_t n = 0; n < k->in_n; n++)
                    sum += to_f32(x[m * k->in_n + n]) * to_f32(k->w2[n * width + c]);
                z[m * stride + c] = sum;
            }
        return;
    }
    for (int64_t m = low; m < high; m += ROWS)
        for (int64_t c = 0; c < width; c += 2 * LANES) {
            int64_t first = clamp(c, width - LANES), second = clamp(c + LANES, width - LANES);
            const bf16 *rows[ROWS];
            for (int q = 0; q < ROWS; q++) rows[q] = x + clamp(m + q, high - 1) * k->in_n;
            f32x16 sums[ROWS][2] = {{{0}}};
            const bf16 *w2 = k->w2;
            for (int64_t n = 0; n < k->in_n; n++, w2 += width) {
                f32x16 left = load_bf16(w2 + first), right = load_bf16(w2 + second);
                for (int q = 0; q < ROWS; q++) {
                    float value = to_f32(rows[q][n]);
                    sums[q][0] += value * left;
                    sums[q][1] += value * right;
                }
            }
            for (int q = 0; q < ROWS; q++) {
                float *row = z + clamp(m + q, high - 1) * stride;
                store_f32(row + first, sums[q][0]);
                store_f32(row + second, sums[q][1]);
            }
        }
}

KERNEL void kronecker_shrink(const Kronecker *k, const bf16 *x, int64_t low, int64_t high,
                             float *z) {
    if (k->w2) {
        multiply_rows(k, x, low, high, z);
        return;
    }
    int64_t stride = PADDED(k->rank);
    for (int64_t m = low; m < high; m++) {
        const bf16 *row = x + m * k->in_n;
        int64_t r = 0;
        for (; r + 4 <= k->rank; r += 4) dot4(row, k->a + r * k->in_n, k->in_n, z + m * stride + r);
        for (; r < k->rank; r++) dot1(row, k->a + r * k->in_n, k->in_n, z + m * stride + r);
    }
}

/* t[0:padded rank] = (w1 V)[l], where z holds V = X a^T. Values past the rank are undefined. */
INLINE void mix_ranks(const Kronecker *k, const float *z, int64_t l, float *t) {
    int64_t stride = PADDED(k->rank);
    for (int64_t r = 0; r < stride; r += LANES) {
        f32x16 sum = {0};
        for (int64_t m = 0; m < k->in_m; m++)
            sum += to_f32(k->w1[l * k->in_m + m]) * load_f32(z + m * stride + r);
        store_f32(t + r, sum);
    }
}

/* Writes columns [low, high) of row l of the result to out, before which there is room for a vector. */
INLINE void make_row(const Kronecker *k, const float *z, const float *t, int64_t l, int64_t low,
                     int64_t high, float *out) {
    int64_t width = k->out_k, stride = PADDED(width);
    const bf16 *w1 = k->w1 + l * k->in_m;
    if (width < LANES) {
        for (int64_t c = low; c < high; c++) {
            float sum = 0;
            if (k->w2)
                for (int64_t m = 0; m < k->in_m; m++) sum += to_f32(w1[m]) * z[m * stride + c];
            else
                for (int64_t r = 0; r < k->rank; r++) sum += t[r] * to_f32(k->b[r * width + c]);
            out[c - low] = sum;
        }
        return;
    }
    for (int64_t c = low; c < high; c += LANES) {
        int64_t first = clamp(c, width - LANES);
        f32x16 sum = {0};
        if (k->w2)
            for (int64_t m = 0; m < k->in_m; m++)
                sum += to_f32(w1[m]) * load_f32(z + m * stride + first);
        else
            for (int64_t r = 0; r < k->rank; r++)
                sum += t[r] * load_bf16(k->b + r * width + first);
        store_f32(out + first - low, sum);
    }
}

KERNEL void kronecker_expand(const Kronecker *k, const float *z, float w, int64_t low, int64_t count,
                             float *acc) {
    float padded[COLUMNS + 2 * LANES], *out = padded + LANES;
    float t[PADDED(k->rank) + LANES];
    for (int64_t o = 0; o < count;) {
        int64_t l = (low + o) / k->out_k, start = (low + o) % k->out_k;
        int64_t end = clamp(k->out_k, start + count - o);
        if (!k->w2) mix_ranks(k, z, l, t);
        make_row(k, z, t, l, start, end, out);
        for (int64_t c = start; c < end; c++) acc[o + c - start] += w * out[c - start];
        o += end - start;
    }
}
