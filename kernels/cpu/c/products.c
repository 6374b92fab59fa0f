/* Products of fp32 rows with fp32, bf16 or fp16 weights, in which every sum has a fixed order.
 *
 *     dots:     y[b, r, o]  = sum_k x[b, r, k] w[b, o, k]    16 sums, by k modulo 16, added by sum_each
 *     columns:  y[b, r, o]  = sum_k x[b, r, k] w[b, k, o]    one sum, in the order of k; may begin at y
 *
 * The bits of a result do not depend on how many rows, columns or batches are computed together,
 * nor on the thread. Zeros appended to the inner dimension (for columns: zeros anywhere in it) do
 * not change them either. Libraries do not guarantee this, so these kernels replace them
 * (kernels/rows.py).
 */
#include "team.h"
#include "vec.h"

#define TILE 4 /* rows that are computed together; in dots, outputs, too: 16 sums are reduced at once */
#define SIDE (WIDTH == 16 ? 4 : 2) /* outputs of a tile, or vectors of columns, whose sums are in registers at once */
#define ROW_BLOCK 64    /* rows that stay in the cache while a thread goes through the outputs */
#define COLUMN_BLOCK 64 /* outputs of one piece of work */
#define INNER_BLOCK 1024 /* rows of a weight, in columns, that stay in the cache for ROW_BLOCK rows */

enum Kind { F32, BF16, F16 };

typedef struct {
    const float *x;
    const void *w;
    void *y; /* fp32, or bf16 if `narrows` */
    int64_t batches, rows, columns, inner;
    int64_t x_batch, x_row, w_batch, w_row, y_batch, y_row; /* strides, in elements */
    int64_t kind;    /* type of w */
    int64_t adds;    /* columns only: whether to add to the values in y */
    int64_t threads;
    int64_t narrows; /* dots only: whether to round the results to bf16 */
    int64_t x_inner; /* columns only: the distance of the terms of x in a sum; dots: 1 */
} Product;

typedef struct {
    int64_t batch, row, row_end, column, column_end;
} Part;

/* Converts fp16 to fp32 exactly; infinities and NaN stay. */
INLINE fvec fvec_f16(const uint16_t *p) {
    uvec bits = widened(p), sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
    uvec found = (uvec)((fvec)(rest << 13) * 0x1p112f);
    uvec special = (uvec)(rest >= 0x7c00u) & 0x7f800000u;
    return (fvec)(found | special | sign);
}

INLINE int64_t result_size(const Product *p) { return p->narrows ? sizeof(bf16) : sizeof(float); }

/* Stores at most TILE rows by TILE outputs. */
INLINE void store_dots(const Product *p, f32x16 sums, char *y, int64_t rows, int64_t columns) {
    float found[LANES];
    int64_t size = result_size(p);
    if (p->narrows) store_bf16((bf16 *)found, sums);
    else store_f32(found, sums);
    for (int r = 0; r < rows; r++)
        memcpy(y + r * p->y_row * size, (char *)found + r * TILE * size, columns * size);
}

#define ELEMENT float
#define LOAD fvec_f32
#define NAME(name) name##_of_f32
#include "products.h"

#define ELEMENT bf16
#define LOAD fvec_bf16
#define NAME(name) name##_of_bf16
#include "products.h"

#define ELEMENT uint16_t
#define LOAD fvec_f16
#define NAME(name) name##_of_f16
#include "products.h"

typedef void Kernel(const Product *, const Part *);

typedef struct {
    const Product *product;
    Kernel *kernel;
    int64_t row_blocks, column_blocks;
} Job;

static void compute_part(const void *job, int64_t thread, int64_t i) {
    const Job *j = job;
    const Product *p = j->product;
    int64_t row = i % j->row_blocks * ROW_BLOCK;
    int64_t column = i / j->row_blocks % j->column_blocks * COLUMN_BLOCK;
    Part part = {i / j->row_blocks / j->column_blocks, row, least(row + ROW_BLOCK, p->rows), column,
                 least(column + COLUMN_BLOCK, p->columns)};
    (void)thread;
    j->kernel(p, &part);
}

static Kernel *const KERNELS[2][3] = {
    {dots_of_f32, dots_of_bf16, dots_of_f16},
    {columns_of_f32, columns_of_bf16, columns_of_f16},
};

static Job job_of(const Product *p, int64_t by_columns) {
    return (Job){p, KERNELS[by_columns][p->kind], (p->rows + ROW_BLOCK - 1) / ROW_BLOCK,
                 (p->columns + COLUMN_BLOCK - 1) / COLUMN_BLOCK};
}

static void in_parts(const Product *p, int64_t by_columns) {
    Job job = job_of(p, by_columns);
    int64_t work = p->batches * p->rows * p->columns * p->inner;
    in_pieces(compute_part, &job, p->batches * job.row_blocks * job.column_blocks,
              work > SMALL ? p->threads : 1);
}

/* w: [batches, columns, inner]. */
EXPORT void turret_dots(const Product *p) { in_parts(p, 0); }

/* w: [batches, inner, columns]. */
EXPORT void turret_columns(const Product *p) { in_parts(p, 1); }

#define TOGETHER 96 /* low-rank updates of one batch; each takes two products at a time */

/* Independent products. `ends` has the number of parts of each product and of those before it. */
typedef struct {
    const Product *products;
    int64_t by_columns;
    const int64_t *ends;
} Batch;

static void compute_part_of_batch(const void *job, int64_t thread, int64_t i) {
    const Batch *b = job;
    int64_t n = 0;
    while (b->ends[n] <= i) n++;
    Job one = job_of(b->products + n, b->by_columns);
    compute_part(&one, thread, i - (n ? b->ends[n - 1] : 0));
}

static void multiply_batch(const Product *products, int64_t count, int64_t by_columns, int64_t threads) {
    int64_t ends[2 * TOGETHER], parts = 0;
    Batch batch = {products, by_columns, ends};
    for (int64_t n = 0; n < count; n++) {
        Job job = job_of(products + n, by_columns);
        ends[n] = parts += job.row_blocks * job.column_blocks;
    }
    in_pieces(compute_part_of_batch, &batch, parts, threads);
}

/* A low-rank update y = b^T (a x) of some rows, and the gradients that follow from that of y. */
typedef struct {
    const void *x;     /* [rows, in] */
    const float *a, *b; /* [rank, in], [rank, out] */
    const float *grad; /* [rows, out] */
    float *of_a, *of_b; /* like a and b */
    float *of_x;       /* [rows, in]; the gradient is added */
    float *z, *of_z;   /* room for [rank, rows] each */
    int64_t rows, rank, in, out, x_row, grad_row, kind;
    int64_t turn; /* updates of one turn have disjoint rows; those of turn 0 are added to of_x first */
} Update;

static void find_gradients(const Update *updates, int64_t count, int64_t threads) {
    Product products[2 * TOGETHER];
    for (int64_t n = 0; n < count; n++) {
        const Update *u = updates + n;
        products[2 * n] = (Product){.x = u->a, .w = u->x, .y = u->z, .rows = u->rank, .columns = u->rows,
                                    .inner = u->in, .x_row = u->in, .w_row = u->x_row, .kind = u->kind};
        products[2 * n + 1] = (Product){.x = u->b, .w = u->grad, .y = u->of_z, .rows = u->rank, .columns = u->rows,
                                        .inner = u->out, .x_row = u->out, .w_row = u->grad_row, .kind = F32};
        for (int i = 0; i < 2; i++) products[2 * n + i].batches = 1, products[2 * n + i].y_row = u->rows;
    }
    multiply_batch(products, 2 * count, 0, threads);
    for (int64_t n = 0; n < count; n++) {
        const Update *u = updates + n;
        products[2 * n] = (Product){.x = u->of_z, .w = u->x, .y = u->of_a, .columns = u->in, .w_row = u->x_row,
                                    .y_row = u->in, .kind = u->kind};
        products[2 * n + 1] = (Product){.x = u->z, .w = u->grad, .y = u->of_b, .columns = u->out,
                                        .w_row = u->grad_row, .y_row = u->out, .kind = F32};
        for (int i = 0; i < 2; i++) {
            Product *p = products + 2 * n + i;
            p->batches = p->x_inner = 1, p->rows = u->rank, p->inner = p->x_row = u->rows;
        }
    }
    multiply_batch(products, 2 * count, 1, threads);
    for (int64_t turn = 0, left = count; left; turn++) {
        int64_t some = 0;
        for (int64_t n = 0; n < count; n++) {
            const Update *u = updates + n;
            if (u->turn != turn) continue;
            products[some++] = (Product){.x = u->of_z, .w = u->a, .y = u->of_x, .batches = 1, .rows = u->rows,
                                         .columns = u->in, .inner = u->rank, .x_row = 1, .x_inner = u->rows,
                                         .w_row = u->in, .y_row = u->in, .kind = F32, .adds = 1};
        }
        multiply_batch(products, some, 1, threads);
        left -= some;
    }
}

EXPORT void turret_low_rank_gradients(const Update *updates, int64_t count, int64_t threads) {
    for (int64_t n = 0; n < count; n += TOGETHER) find_gradients(updates + n, least(count - n, TOGETHER), threads);
}

#if !HAS_AVX512_BF16
typedef struct {
    const bf16 *x;
    float *wide;
    int64_t x_stride, width;
} Rows;

static void widen_row(const void *job, int64_t thread, int64_t row) {
    const Rows *rows = job;
    const bf16 *x = rows->x + row * rows->x_stride;
    float *wide = rows->wide + row * rows->width;
    (void)thread;
    for (int64_t i = 0; i < rows->width; i++) wide[i] = to_f32(x[i]);
}

/* See dense_product.c. */
EXPORT void turret_dense_product(const bf16 *x, int64_t x_stride, int64_t rows, const bf16 *w, bf16 *y,
                                 int64_t y_stride, int64_t out_features, int64_t in_features,
                                 int64_t num_threads, float *scratch) {
    Rows all = {x, scratch, x_stride, in_features};
    Product p = {.x = scratch, .w = w, .y = y, .batches = 1, .rows = rows, .columns = out_features,
                 .inner = in_features, .x_row = in_features, .w_row = in_features, .y_row = y_stride,
                 .kind = BF16, .threads = num_threads, .narrows = 1, .x_inner = 1};
    in_pieces(widen_row, &all, rows, rows * in_features > SMALL ? num_threads : 1);
    turret_dots(&p);
}
#endif
