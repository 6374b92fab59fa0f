/* Exported kernels that layers.c calls too. The files that define them describe them. */
#ifndef TURRET_ENTRIES_H
#define TURRET_ENTRIES_H

#include "adapters/adapters.h"
#include "attention.h"

void turret_nf4_product(const bf16 *x, int64_t x_stride, int64_t rows, const uint8_t *packed,
                        const bf16 *absmax, bf16 *y, int64_t out_features, int64_t in_features,
                        int64_t num_threads, const Step *step, int64_t module);
void turret_nf4_slices(const bf16 *x, int64_t rows, const uint8_t *packed, const bf16 *absmax, bf16 *y,
                       int64_t out_features, int64_t in_features, int64_t num_threads,
                       const Step *step, const int64_t *shape);
void turret_dense_product(const bf16 *x, int64_t x_stride, int64_t rows, const bf16 *w, bf16 *y,
                          int64_t y_stride, int64_t out_features, int64_t in_features,
                          int64_t num_threads, float *scratch);
void turret_adapt(const Step *step, const int64_t *shape, const bf16 *x, int64_t x_stride, bf16 *y,
                  int64_t y_stride, const bf16 *bias);
/* out: [inputs->count, rows, in], from x [rows, in]; `module` is the projection's first module. */
void turret_change_inputs(const Step *step, int64_t module, const Inputs *inputs, const bf16 *x,
                          int64_t rows, int64_t in_features, bf16 *out);
void turret_add_rms_norm(bf16 *hidden, const bf16 *delta, const float *weight, double eps, bf16 *out,
                         int64_t rows, int64_t width, int64_t threads);
void turret_silu_mul(const bf16 *gate_up, bf16 *out, int64_t rows, int64_t width, int64_t threads);
void turret_gelu_mul(const bf16 *gate_up, bf16 *out, int64_t rows, int64_t width, int64_t threads);
void turret_clamped_swiglu(const bf16 *gate_up, bf16 *out, int64_t rows, int64_t width, double alpha,
                           double limit, int64_t threads);
void turret_exp_f32(float *x, int64_t count);
void turret_nf4_experts(const bf16 *x, int64_t x_stride, const int64_t *ends, int64_t num_experts,
                        const void *const *weights, bf16 *y, int64_t out_features, int64_t in_features,
                        int64_t num_threads);
void turret_mxfp4_experts(const bf16 *x, int64_t x_stride, const int64_t *ends, int64_t num_experts,
                          const void *const *weights, bf16 *y, int64_t out_features, int64_t in_features,
                          int64_t num_threads);
void turret_adapt_experts(const ExpertStep *step, const ExpertPairs *pairs);
void turret_rope_kv_write(const bf16 *qkv, const float *cos, const float *sin, const int64_t *slots,
                          float *q, bf16 *k_cache, bf16 *v_cache, int64_t rows, int64_t heads,
                          int64_t kv_heads, int64_t dim, int64_t pairs, int64_t is_interleaved,
                          int64_t threads);
void turret_attend(const Plan *plan, const Heads *heads);

#endif
