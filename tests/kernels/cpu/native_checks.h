/* Helpers of the checks in native_checks.c: random numbers, comparisons, declarations of the kernels. */
#ifndef NATIVE_CHECKS_H
#define NATIVE_CHECKS_H

#include "adapters/adapters.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#define MAX_ROWS 11
#define PRODUCT_ROWS 35 /* rows of the wide products: two tiles of 16, and three more */
static int failures, threads;

static uint64_t state = 1;
static float noise(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (float)((double)(state >> 40) / (1 << 24) * 2 - 1);
}
/* Allocates n random numbers from -1 to 1, aligned for vectors. */
static float *floats(int64_t n) {
    float *p = aligned_alloc(64, (n * sizeof(float) / 64 + 2) * 64);
    for (int64_t i = 0; i < n; i++) p[i] = noise();
    return p;
}
/* The same in bf16. */
static bf16 *halves(int64_t n) {
    bf16 *p = aligned_alloc(64, (n * sizeof(bf16) / 64 + 2) * 64);
    for (int64_t i = 0; i < n; i++) p[i] = to_bf16(noise());
    return p;
}
static void fail(const char *name, const char *what, int64_t at, double found, double expected) {
    failures++;
    if (failures < 20) printf("FAILED %s: %s at %ld: %.9g, not %.9g\n", name, what, (long)at, found, expected);
}
/* Checks that each result is off by at most `error` times the largest expected value. */
static void near(const char *name, const float *y, const double *expected, int64_t n, double error) {
    double most = 0;
    for (int64_t i = 0; i < n; i++) most = fmax(most, fabs(expected[i]));
    for (int64_t i = 0; i < n; i++)
        if (!(fabs(y[i] - expected[i]) <= error * most)) fail(name, "value", i, y[i], expected[i]);
}
static void near_bf16(const char *name, const bf16 *y, const double *expected, int64_t n) {
    float *wide = floats(n);
    for (int64_t i = 0; i < n; i++) wide[i] = to_f32(y[i]);
    near(name, wide, expected, n, 8e-3);
    free(wide);
}
/* A hash of all results of the wide products, for comparison with another build. */
static uint64_t sum_of_bits;
static void add_bits(const bf16 *y, int64_t n) {
    for (int64_t i = 0; i < n; i++) sum_of_bits = (sum_of_bits ^ y[i]) * 1099511628211u;
}
/* Checks that a row computed alone has the bits that it has in a batch. */
static void same(const char *name, const void *a, const void *b, int64_t bytes) {
    if (memcmp(a, b, bytes)) fail(name, "a row alone has other bits", bytes, 0, 0);
}

typedef struct {
    const float *x;
    const void *w;
    void *y;
    int64_t batches, rows, columns, inner, x_batch, x_row, w_batch, w_row, y_batch, y_row, kind, adds,
        threads, narrows, x_inner;
} Product;
void turret_dots(const Product *);
void turret_columns(const Product *);
void turret_dense_product(const bf16 *, int64_t, int64_t, const bf16 *, bf16 *, int64_t, int64_t, int64_t,
                          int64_t, float *);
void turret_nf4_slices(const bf16 *, int64_t, const uint8_t *, const bf16 *, bf16 *, int64_t, int64_t, int64_t,
                       const Step *, const int64_t *);
void turret_change_inputs(const Step *, int64_t, const Inputs *, const bf16 *, int64_t, int64_t, bf16 *);
void turret_adapt_experts(const void *, const void *);
void turret_screen_codes(const bf16 *, int64_t, int64_t, int8_t *, float *, double *, int64_t);
int64_t turret_screen(const void *, const bf16 *, int64_t, int64_t, double, char *, int64_t *, int64_t, int64_t);
int64_t turret_screen_bytes(int64_t, int64_t, int64_t);
void turret_own_threads(int64_t are_wanted);
void turret_add_rms_norm(bf16 *, const bf16 *, const float *, double, bf16 *, int64_t, int64_t, int64_t);
void turret_add_rms_norm_f32(float *, const float *, const float *, double, float *, int64_t, int64_t,
                             int64_t);
void turret_silu_mul(const bf16 *, bf16 *, int64_t, int64_t, int64_t);
void turret_silu_mul_f32(const float *, float *, int64_t, int64_t, int64_t);
void turret_gelu_mul(const bf16 *, bf16 *, int64_t, int64_t, int64_t);
void turret_gelu_mul_f32(const float *, float *, int64_t, int64_t, int64_t);
void turret_clamped_swiglu(const bf16 *, bf16 *, int64_t, int64_t, double, double, int64_t);
void turret_clamped_swiglu_f32(const float *, float *, int64_t, int64_t, double, double, int64_t);
void turret_exp_f32(float *, int64_t);
void turret_rope_kv_write_f32(const float *, const float *, const float *, const int64_t *, float *, float *,
                              float *, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
void turret_attend(const void *, const void *);
void turret_attend_f32(const void *, const void *);
void turret_adapt(const Step *, const int64_t *, const bf16 *, int64_t, bf16 *, int64_t, const bf16 *);
void turret_input_change(const Step *, int64_t, int64_t, const bf16 *, int64_t, const int64_t *,
                         const int64_t *, int64_t, double, bf16 *);

#endif
