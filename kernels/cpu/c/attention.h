/* The input of a step's attention. kernels/cpu/layers.py fills in these structures; layers.c makes Heads too. */
#ifndef TURRET_ATTENTION_H
#define TURRET_ATTENTION_H

#include <stdint.h>

/* The new rows of one sequence. They see its positions from num_padding on. */
typedef struct {
    int64_t first_row, num_new, num_context, num_padding;
    const int64_t *blocks; /* numbers of the sequence's KV blocks */
} Span;

typedef struct {
    const Span *spans;
    float *scratch; /* [threads, scratch_stride]: queries, results and scores that are computed together */
    int64_t num_spans, scratch_stride, num_threads;
    int64_t window; /* 0: none */
} Plan;

/* For one layer. Keys, values and results are bf16, or fp32 for turret_attend_f32. */
typedef struct {
    const float *q;    /* [rows, heads, head_dim], rotated */
    const void *k, *v; /* [blocks, block_size, kv_heads, head_dim] */
    void *out;         /* [rows, heads, head_dim] */
    int64_t heads, kv_heads, head_dim, block_size;
    double scale;
    double softcap;     /* cap of the scores; 0: none */
    const float *sinks; /* [heads]: an extra term of each head's softmax, without a value; null: none */
} Heads;

#endif
