/* Hadamard updates (LoHa) in rank space; see server/adapters/operators/hadamard.py.
 *
 *     u[j, i] = sum_x w2b[j, x] x w1b[i, x]      delta_o = sum_j w2a[j, o] sum_i u[j, i] w1a[i, o]
 */
#include "adapters.h"

KERNEL void hadamard_shrink(const Hadamard *h, const bf16 *x, int64_t in_features, int64_t tile,
                            float *u) {
    int64_t rank = h->rank, side = (rank + RANKS - 1) / RANKS;
    int64_t j = tile / side * RANKS, i = tile % side * RANKS;
    const bf16 *left[RANKS], *right[RANKS];
    for (int q = 0; q < RANKS; q++) { /* missing ranks repeat some row, whose result is not stored */
        left[q] = h->w2b + (j + q < rank ? j + q : j) * in_features;
        right[q] = h->w1b + (i + q < rank ? i + q : i) * in_features;
    }
    f32x16 sums[RANKS][RANKS] = {{{0}}};
    float rest[RANKS][RANKS] = {{0}};
    int64_t n = 0;
    for (; n + LANES <= in_features; n += LANES) {
        f32x16 value = load_bf16(x + n), column[RANKS];
        for (int c = 0; c < RANKS; c++) column[c] = load_bf16(right[c] + n);
        for (int r = 0; r < RANKS; r++) {
            f32x16 row = value * load_bf16(left[r] + n);
            for (int c = 0; c < RANKS; c++) sums[r][c] += row * column[c];
        }
    }
    for (; n < in_features; n++)
        for (int r = 0; r < RANKS; r++) {
            float row = to_f32(x[n]) * to_f32(left[r][n]);
            for (int c = 0; c < RANKS; c++) rest[r][c] += row * to_f32(right[c][n]);
        }
    for (int r = 0; r < RANKS && j + r < rank; r++)
        for (int c = 0; c < RANKS && i + c < rank; c++)
            u[(j + r) * rank + i + c] = sum_lanes(sums[r][c]) + rest[r][c];
}

/* The number of vectors is a constant, so that the sums stay in registers. */
INLINE void add_vectors(const Hadamard *h, const float *u, float w, int64_t width, int64_t low,
                        float *acc, const int vectors) {
    int64_t rank = h->rank;
    const bf16 *w1a = h->w1a + low, *w2a = h->w2a + low;
    f32x16 total[vectors];
    for (int v = 0; v < vectors; v++) total[v] = (f32x16){0};
    for (int64_t j = 0; j < rank; j += RANKS) {
        f32x16 inner[RANKS][vectors];
        for (int q = 0; q < RANKS; q++)
            for (int v = 0; v < vectors; v++) inner[q][v] = (f32x16){0};
        for (int64_t i = 0; i < rank; i++) {
            f32x16 column[vectors];
            for (int v = 0; v < vectors; v++) column[v] = load_bf16(w1a + i * width + v * LANES);
            /* Rows past the rank are still inside the scratch memory, and their sums are not used. */
            for (int q = 0; q < RANKS; q++)
                for (int v = 0; v < vectors; v++) inner[q][v] += u[(j + q) * rank + i] * column[v];
        }
        for (int q = 0; q < RANKS && j + q < rank; q++)
            for (int v = 0; v < vectors; v++)
                total[v] += inner[q][v] * load_bf16(w2a + (j + q) * width + v * LANES);
    }
    for (int v = 0; v < vectors; v++)
        store_f32(acc + v * LANES, load_f32(acc + v * LANES) + w * total[v]);
}

KERNEL void hadamard_expand(const Hadamard *h, const float *u, float w, int64_t width, int64_t low,
                            int64_t count, float *acc) {
    int64_t o = 0, rank = h->rank;
    for (; o + 4 * LANES <= count; o += 4 * LANES) add_vectors(h, u, w, width, low + o, acc + o, 4);
    for (; o + LANES <= count; o += LANES) add_vectors(h, u, w, width, low + o, acc + o, 1);
    for (; o < count; o++) {
        float total = 0;
        for (int64_t j = 0; j < rank; j++) {
            float inner = 0;
            for (int64_t i = 0; i < rank; i++)
                inner += u[j * rank + i] * to_f32(h->w1a[i * width + low + o]);
            total += inner * to_f32(h->w2a[j * width + low + o]);
        }
        acc[o] += w * total;
    }
}
