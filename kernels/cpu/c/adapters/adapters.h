/* The adapters of a step's rows, which kernels/cpu/row_adapters.py lays out, and the operators.
 *
 * Every operator has two halves. Shrink reads the input and writes activations to scratch memory. Expand
 * computes some columns of the update from these activations, and adds the columns to fp32 sums. The order of each
 * sum depends only on its own adapter.
 */
#ifndef TURRET_ADAPTERS_H
#define TURRET_ADAPTERS_H

#include "tiles.h"

#define COLUMN_VECTORS 8 /* vectors of columns of an expand unit */
#define COLUMNS (COLUMN_VECTORS * LANES)
#define PADDED(n) (((n) + LANES - 1) / LANES * LANES)
#define TILE 4 /* rows that share the weights in registers, if a segment has that many */
#define AT_ONCE 32 /* the most rows to which an expand unit adds at once */

/* ((w1a w1b) * (w2a w2b)) x; scratch: [padded rank, rank]. */
typedef struct {
    const bf16 *w1a, *w2a; /* [rank, out] */
    const bf16 *w1b, *w2b; /* [rank, in] */
    int64_t rank;
} Hadamard;

/* kron(w1, w2) x; scratch: [in_m, padded out_k], or [in_m, padded rank]. */
typedef struct {
    const bf16 *w1; /* [out_l, in_m] */
    const bf16 *w2; /* [in_n, out_k], or null if its factors a and b are used instead */
    const bf16 *a;  /* [rank, in_n] */
    const bf16 *b;  /* [rank, out_k] */
    int64_t out_l, in_m, out_k, in_n, rank;
} Kronecker;

/* Blocks that change the input; no scratch (input_change.c). */
typedef struct {
    const bf16 *blocks; /* [count, size, size] */
    int64_t count;      /* 1 if all blocks are the same */
    int64_t size;
} InputBlocks;

/* Outputs that are added to their partners; scratch: [padded out]. */
typedef struct {
    const float *sine; /* [out] */
    int64_t group;
} PairRotation;

/* Block-circulant update. width: the number of frequencies, padded; the matrices hold zeros in the padding.
 * scratch: [columns + 1, 2, width], then the result, [rows * size] padded. If parts = size / LANES, a transform
 * consists of one transform of LANES values per part and a sum over the parts (circulant.c). If parts is 0, a
 * transform is a product with the whole matrix. */
typedef struct {
    const float *spectra; /* [rows, columns, 2, width] */
    const float *forward; /* [LANES, 2, LANES]; without parts [size, 2, width] */
    const float *turns;   /* [parts, 2, width] */
    const float *back;    /* [parts, 2, width] */
    const float *inverse; /* [2, LANES, LANES]; without parts [2, width, padded size] */
    int64_t rows, columns, size, width, parts;
} Circulant;

/* S x, computed by groups of LANES outputs and blocks of 64 inputs; no scratch (sparse.c). A unit is COLUMNS
 * outputs. `outputs` lists each unit's outputs by group: the first LANES entries are the first group, and so on.
 * Slot s of a step belongs to output s % LANES of its group. Memory past the end of values and places must be
 * readable. */
typedef struct {
    const bf16 *values;     /* values of the slots that have an entry, step by step */
    const uint8_t *places;  /* position of an entry's input in its block */
    const uint32_t *masks;  /* [steps]: which of 2 LANES slots have an entry */
    const uint16_t *skips;  /* [steps]: number of blocks since the previous step, or since block 0 */
    const int32_t *starts;  /* [groups + 1, 2]: steps, entries */
    const uint8_t *outputs; /* [out]: position in the unit */
    int64_t mean;           /* average number of entries of an output */
} Sparse;

/* A whole matrix; no scratch (dense.c). */
typedef struct {
    const bf16 *weight; /* [out, in] */
    int64_t in_features;
} Dense;

typedef struct {
    const bf16 *a;      /* [rank, in]; if null and rank > 0, A adds up pieces of the input (pieces_shrink) */
    const bf16 *b;      /* [rank, out] */
    const float *gain;  /* [out], or null */
    const float *bias;  /* [out], or null */
    const float *input_gain; /* [in], or null */
    int64_t rank;       /* 0: no low-rank update */
    const Hadamard *hadamard;   /* or null */
    const Kronecker *kronecker; /* or null */
    const InputBlocks *input_blocks; /* or null */
    const PairRotation *pairs;       /* or null */
    const Circulant *circulant;      /* or null */
    const Sparse *sparse;            /* or null */
    const Dense *dense;              /* or null */
} Module;

typedef struct {
    int64_t row_start, row_end;
    int64_t first, last; /* its range of components */
} Segment;

typedef struct {
    const Module *modules; /* of one adapter: [layers * modules of a layer] */
    int64_t scratch;       /* where its activations start: [rows, slices, width] */
    int64_t width;
    double weight;
} Component;

typedef struct {
    int64_t in_features, out_features;
} ModuleSize;

/* How far a thread has prefetched factors (ahead.h). */
typedef struct {
    int64_t module, segment, component; /* component: counted from the segment's first */
    int64_t factor;                     /* 0 is A, 1 is B */
    int64_t done;                       /* lines of the factor that were prefetched */
    int64_t ranks;                      /* ranks of the module's components before this one */
    int64_t all_ranks;                  /* ranks of all of them, or 0: not counted yet */
} Mark;

typedef struct {
    const Segment *segments;
    const Component *components;
    float *scratch;
    int64_t num_segments;
    int64_t num_threads;
    const ModuleSize *sizes; /* of a layer's modules */
    int64_t modules_per_layer, num_modules;
    int64_t reach; /* number of modules ahead whose factors are prefetched */
    Mark *marks;   /* one per thread */
} Step;

/* Which inputs of one projection adapters change, for a step's rows. */
typedef struct {
    const int64_t *changes; /* [rows, 3]: first and end of the range of components that change the row's
                             * input (equal if none does), and whether each slice has its own change;
                             * otherwise, the first slice's change holds for all slices */
    int64_t count; /* number of changed inputs: one, one per slice, or none */
} Inputs;

/* One adapter's update of the experts in one projection of a layer (experts.c). */
typedef struct {
    const bf16 *a; /* [experts, rank, in] */
    const bf16 *b; /* [experts, rank, out] */
    int64_t rank;  /* 0: no update */
} ExpertUpdate;

/* One adapter of a row's mix. */
typedef struct {
    const ExpertUpdate *updates; /* of one adapter, by layer and projection */
    double weight;
} ExpertMember;

typedef struct {
    const ExpertMember *members;
    const int64_t *first; /* [rows + 1]: where the members of each row begin; later rows have none */
    int64_t rows;
    float *scratch; /* [threads, width]: the rank activations of a pair's members */
    int64_t width;
    int64_t threads;
} ExpertStep;

typedef struct {
    const bf16 *x;
    bf16 *y; /* [pairs, out] */
    const int64_t *row, *expert;
    const int64_t *input; /* the row of x that each pair reads, or null: the pair's own */
    int64_t pairs, x_stride, in_features, out_features;
    int64_t update; /* number of the projection among an adapter's updates */
} ExpertPairs;

/* Offsets of the operators' activations in the scratch memory, in this order. */
INLINE int64_t hadamard_start(const Module *m) { return PADDED(m->rank); }

INLINE int64_t kronecker_start(const Module *m) {
    int64_t r = m->hadamard ? m->hadamard->rank : 0;
    return hadamard_start(m) + PADDED(PADDED(r) * r);
}

INLINE int64_t kronecker_width(const Kronecker *k) { return k->w2 ? k->out_k : k->rank; }

INLINE int64_t circulant_start(const Module *m) {
    const Kronecker *k = m->kronecker;
    return kronecker_start(m) + (k ? k->in_m * PADDED(kronecker_width(k)) : 0);
}

INLINE int64_t pairs_start(const Module *m) {
    const Circulant *c = m->circulant;
    return circulant_start(m) +
           (c ? (c->columns + 1) * 2 * c->width + PADDED(c->rows * c->size) : 0);
}

/* Rows of a segment: their inputs, the activations of one operator, and the sums of some columns
 * ([count, COLUMNS]). */
typedef struct {
    const bf16 *x;
    float *v, *acc;
    int64_t count, x_stride, v_stride;
    const bf16 *next; /* low-rank only: weights that are read after this factor's, or null */
    int64_t next_stride;
} Rows;

#define RANKS 4
/* Whether low-rank updates use tiles (low_rank_tiles.h), 16 ranks at a time. */
INLINE int low_rank_takes_tiles(const ModuleSize *size) {
    return HAS_TILES && size->in_features % (2 * LANES) == 0 && size->out_features % LANES == 0;
}
INLINE int64_t low_rank_step(const ModuleSize *size) { return low_rank_takes_tiles(size) ? LANES : RANKS; }
/* Computes ranks [r, r + low_rank_step) of w A x, for any number of rows. On tiles, the results are pairs of
 * bf16. */
void low_rank_shrink(const Module *m, const Rows *rows, const ModuleSize *size, float w, int64_t r);
/* The same for one row and all ranks, if A adds up pieces of `rank` inputs. */
void pieces_shrink(const bf16 *x, const ModuleSize *size, int64_t rank, float w, float *v);
/* acc[:, 0:count] += (B v)[low:low + count], for at most AT_ONCE rows and COLUMNS columns. The other operators'
 * expand functions add w times their result. */
void low_rank_expand(const Module *m, const Rows *rows, const ModuleSize *size, int64_t low, int64_t count);
/* low_rank_begin must be called before a piece's first low-rank shrink or expand, and low_rank_end, which releases
 * the tiles, after the last one. */
void low_rank_begin(void);
void low_rank_end(void);

/* hadamard_shrink computes tile number `tile` of U = w2b diag(x) w1b^T. */
INLINE int64_t hadamard_tiles(const Hadamard *h) {
    int64_t side = (h->rank + RANKS - 1) / RANKS;
    return side * side;
}
void hadamard_shrink(const Hadamard *h, const bf16 *x, int64_t in_features, int64_t tile, float *u);
void hadamard_expand(const Hadamard *h, const float *u, float w, int64_t width, int64_t low,
                     int64_t count, float *acc);

/* Computes rows [low, high) of X w2^T, or of X a^T, where X is x as a matrix [in_m, in_n]. */
void kronecker_shrink(const Kronecker *k, const bf16 *x, int64_t low, int64_t high, float *z);
void kronecker_expand(const Kronecker *k, const float *z, float w, int64_t low, int64_t count,
                      float *acc);


/* For one row: shrink computes the whole result, and expand adds some of its columns, times w. */
void circulant_shrink(const Circulant *c, const bf16 *x, float *z);
void circulant_expand(const Circulant *c, const float *z, float w, int64_t low, int64_t count,
                      float *acc);

/* For one row: shrink stores the base's result, and expand adds the partners of some columns, times w. */
void pairs_shrink(const bf16 *y, int64_t width, float *z);
void pairs_expand(const PairRotation *p, const float *z, float w, int64_t low, int64_t count,
                  float *acc);

/* The number of steps of `Sparse` for compressed rows, or -1 if the inputs of an output do not ascend by
 * blocks. */
int64_t turret_sparse_steps(const uint16_t *columns, const int32_t *row_starts, int64_t out);
/* Fills the arrays of `Sparse`. Returns the number of steps, or -1. */
int64_t turret_sparse_fill(const bf16 *values, const uint16_t *columns, const int32_t *row_starts,
                           int64_t out, bf16 *kept, uint8_t *places, uint32_t *masks,
                           uint16_t *skips, int32_t *starts, uint8_t *outputs);
/* acc[:, 0:count] += w * (S x)[low:low + count], for any number of rows. */
void sparse_expand(const Sparse *s, const Rows *rows, float w, int64_t in_features, int64_t low,
                   int64_t count);

/* acc[:, 0:count] += w * (D x)[low:low + count], for any number of rows. */
void dense_expand(const Dense *d, const Rows *rows, float w, int64_t low, int64_t count);

#endif
