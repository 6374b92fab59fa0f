/* What a decoder layer does between its matrix products, one pass each. */
#include "vec.h"

#include <math.h>
#include <omp.h>

/* hidden += delta (rounded to bf16), then out = rms_norm(hidden) * weight, for [rows, width].
 * delta may be null. RMSNorm: arXiv 1910.07467. */
KERNEL static void norm_row(bf16 *hidden, const bf16 *delta, const bf16 *weight, float eps,
                            bf16 *out, int64_t width) {
    f32x16 squares = {0};
    float rest = 0;
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
        f32x16 x = load_bf16(hidden + i);
        if (delta) {
            store_bf16(hidden + i, x + load_bf16(delta + i));
            x = load_bf16(hidden + i);
        }
        squares += x * x;
    }
    for (; i < width; i++) {
        if (delta) hidden[i] = to_bf16(to_f32(hidden[i]) + to_f32(delta[i]));
        rest += to_f32(hidden[i]) * to_f32(hidden[i]);
    }
    float scale = 1.0f / sqrtf((sum_lanes(squares) + rest) / (float)width + eps);
    for (i = 0; i + LANES <= width; i += LANES)
        store_bf16(out + i, load_bf16(hidden + i) * scale * load_bf16(weight + i));
    for (; i < width; i++) out[i] = to_bf16(to_f32(hidden[i]) * scale * to_f32(weight[i]));
}

EXPORT void turret_add_rms_norm(bf16 *hidden, const bf16 *delta, const bf16 *weight, double eps,
                                bf16 *out, int64_t rows, int64_t width, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > 1)
    for (int64_t r = 0; r < rows; r++)
        norm_row(hidden + r * width, delta ? delta + r * width : 0, weight, (float)eps,
                 out + r * width, width);
}

/* out = silu(gate) * up, for gate_up [rows, 2 * width]. */
KERNEL static void silu_row(const bf16 *gate, const bf16 *up, bf16 *out, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        f32x16 x = load_bf16(gate + i);
        store_bf16(out + i, x / (1.0f + exp_vec(-x)) * load_bf16(up + i));
    }
    if (i < count) {
        bf16 g[LANES] = {0}, u[LANES] = {0}, o[LANES];
        memcpy(g, gate + i, (count - i) * sizeof(bf16));
        memcpy(u, up + i, (count - i) * sizeof(bf16));
        f32x16 x = load_bf16(g);
        store_bf16(o, x / (1.0f + exp_vec(-x)) * load_bf16(u));
        memcpy(out + i, o, (count - i) * sizeof(bf16));
    }
}

EXPORT void turret_silu_mul(const bf16 *gate_up, bf16 *out, int64_t rows, int64_t width,
                            int64_t threads) {
    int64_t half = (width / 2 + LANES - 1) / LANES * LANES;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t part = 0; part < 2 * rows; part++) {
        const bf16 *gate = gate_up + part / 2 * 2 * width;
        int64_t low = part % 2 ? half : 0, high = part % 2 ? width : half < width ? half : width;
        if (low < high)
            silu_row(gate + low, gate + width + low, out + part / 2 * width + low, high - low);
    }
}

/* Rotary positions (arXiv 2104.09864), pairs (i, i + dim / 2). */
INLINE void rotate(const bf16 *x, const float *cos, const float *sin, float *first, float *second,
                   int64_t half) {
    for (int64_t i = 0; i < half; i += LANES) {
        f32x16 a = load_bf16(x + i), b = load_bf16(x + half + i);
        f32x16 c = load_f32(cos + i), s = load_f32(sin + i);
        store_f32(first + i, a * c - b * s);
        store_f32(second + i, b * c + a * s);
    }
}

/* Queries come out in fp32; keys and values go to their slots of the cache. */
KERNEL static void rope_row(const bf16 *qkv, const float *cos, const float *sin, float *q, bf16 *k,
                            bf16 *v, int64_t heads, int64_t kv_heads, int64_t dim) {
    int64_t half = dim / 2;
    for (int64_t h = 0; h < heads; h++)
        rotate(qkv + h * dim, cos, sin, q + h * dim, q + h * dim + half, half);
    for (int64_t h = 0; h < kv_heads; h++) {
        float key[512];
        rotate(qkv + (heads + h) * dim, cos, sin, key, key + half, half);
        for (int64_t i = 0; i < dim; i += LANES) store_bf16(k + h * dim + i, load_f32(key + i));
    }
    memcpy(v, qkv + (heads + kv_heads) * dim, kv_heads * dim * sizeof(bf16));
}

EXPORT void turret_rope_kv_write(const bf16 *qkv, const float *cos, const float *sin,
                                 const int64_t *slots, float *q, bf16 *k_cache, bf16 *v_cache,
                                 int64_t rows, int64_t heads, int64_t kv_heads, int64_t dim,
                                 int64_t threads) {
    int64_t width = kv_heads * dim;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > 1)
    for (int64_t r = 0; r < rows; r++)
        rope_row(qkv + r * (heads + 2 * kv_heads) * dim, cos + r * (dim / 2), sin + r * (dim / 2),
                 q + r * heads * dim, k_cache + slots[r] * width, v_cache + slots[r] * width, heads,
                 kv_heads, dim);
}
