/* What a decoder layer does between its matrix products, one pass each. */
#include "elements.h"

#include <math.h>
#include <omp.h>

/* hidden += delta (rounded to its type), then out = rms_norm(hidden) * weight, for [rows, width].
 * delta may be null. RMSNorm: arXiv 1910.07467. */
KERNEL static void norm_row(element *hidden, const element *delta, const element *weight, float eps,
                            element *out, int64_t width) {
    f32x16 squares = {0};
    float rest = 0;
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
        f32x16 x = load_element(hidden + i);
        if (delta) {
            store_element(hidden + i, x + load_element(delta + i));
            x = load_element(hidden + i);
        }
        squares += x * x;
    }
    for (; i < width; i++) {
        if (delta) hidden[i] = to_element(from_element(hidden[i]) + from_element(delta[i]));
        rest += from_element(hidden[i]) * from_element(hidden[i]);
    }
    float scale = 1.0f / sqrtf((sum_lanes(squares) + rest) / (float)width + eps);
    for (i = 0; i + LANES <= width; i += LANES)
        store_element(out + i, load_element(hidden + i) * scale * load_element(weight + i));
    for (; i < width; i++) out[i] = to_element(from_element(hidden[i]) * scale * from_element(weight[i]));
}

EXPORT void EXPORTED(turret_add_rms_norm)(element *hidden, const element *delta, const element *weight, double eps,
                                element *out, int64_t rows, int64_t width, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > 1)
    for (int64_t r = 0; r < rows; r++)
        norm_row(hidden + r * width, delta ? delta + r * width : 0, weight, (float)eps,
                 out + r * width, width);
}

/* out = silu(gate) * up, for gate_up [rows, 2 * width]. */
KERNEL static void silu_row(const element *gate, const element *up, element *out, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        f32x16 x = load_element(gate + i);
        store_element(out + i, x / (1.0f + exp_vec(-x)) * load_element(up + i));
    }
    if (i < count) {
        element g[LANES] = {0}, u[LANES] = {0}, o[LANES];
        memcpy(g, gate + i, (count - i) * sizeof(element));
        memcpy(u, up + i, (count - i) * sizeof(element));
        f32x16 x = load_element(g);
        store_element(o, x / (1.0f + exp_vec(-x)) * load_element(u));
        memcpy(out + i, o, (count - i) * sizeof(element));
    }
}

EXPORT void EXPORTED(turret_silu_mul)(const element *gate_up, element *out, int64_t rows, int64_t width,
                            int64_t threads) {
    int64_t half = (width / 2 + LANES - 1) / LANES * LANES;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t part = 0; part < 2 * rows; part++) {
        const element *gate = gate_up + part / 2 * 2 * width;
        int64_t low = part % 2 ? half : 0, high = part % 2 ? width : half < width ? half : width;
        if (low < high)
            silu_row(gate + low, gate + width + low, out + part / 2 * width + low, high - low);
    }
}

/* Rotary positions (arXiv 2104.09864), pairs (i, i + dim / 2). */
INLINE void rotate(const element *x, const float *cos, const float *sin, float *first, float *second,
                   int64_t half) {
    for (int64_t i = 0; i < half; i += LANES) {
        f32x16 a = load_element(x + i), b = load_element(x + half + i);
        f32x16 c = load_f32(cos + i), s = load_f32(sin + i);
        store_f32(first + i, a * c - b * s);
        store_f32(second + i, b * c + a * s);
    }
}

/* Queries come out in fp32; keys and values go to their slots of the cache. */
KERNEL static void rope_row(const element *qkv, const float *cos, const float *sin, float *q, element *k,
                            element *v, int64_t heads, int64_t kv_heads, int64_t dim) {
    int64_t half = dim / 2;
    for (int64_t h = 0; h < heads; h++)
        rotate(qkv + h * dim, cos, sin, q + h * dim, q + h * dim + half, half);
    for (int64_t h = 0; h < kv_heads; h++) {
        float key[512];
        rotate(qkv + (heads + h) * dim, cos, sin, key, key + half, half);
        for (int64_t i = 0; i < dim; i += LANES) store_element(k + h * dim + i, load_f32(key + i));
    }
    memcpy(v, qkv + (heads + kv_heads) * dim, kv_heads * dim * sizeof(element));
}

EXPORT void EXPORTED(turret_rope_kv_write)(const element *qkv, const float *cos, const float *sin,
                                 const int64_t *slots, float *q, element *k_cache, element *v_cache,
                                 int64_t rows, int64_t heads, int64_t kv_heads, int64_t dim,
                                 int64_t threads) {
    int64_t width = kv_heads * dim;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > 1)
    for (int64_t r = 0; r < rows; r++)
        rope_row(qkv + r * (heads + 2 * kv_heads) * dim, cos + r * (dim / 2), sin + r * (dim / 2),
                 q + r * heads * dim, k_cache + slots[r] * width, v_cache + slots[r] * width, heads,
                 kv_heads, dim);
}

#ifdef ELEMENT_F32
/* In place. */
EXPORT KERNEL void turret_exp_f32(float *x, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store_f32(x + i, exp_vec(load_f32(x + i)));
    if (i < count) {
        float some[LANES] = {0};
        memcpy(some, x + i, (count - i) * sizeof(float));
        store_f32(some, exp_vec(load_f32(some)));
        memcpy(x + i, some, (count - i) * sizeof(float));
    }
}
#endif
