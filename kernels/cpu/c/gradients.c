/* Gradients of the operations between a layer's matrix products, in fp32 from the gradients of their results.
 *
 * Every sum has a fixed order. A row's bits depend only on its own sequence, and in a norm or a gate only on the
 * row.
 */
#include "elements.h"
#include "team.h"

#include <math.h>

/* The inputs of an operation on [rows, width], the gradient of its results, and that of its inputs. */
typedef struct {
    const element *x;
    const float *weight, *grad;
    float *out;
    int64_t width;
    double eps;
    int64_t is_gelu;
} Rows;

/* Adds the gradient of x in rms_norm(x) * weight to `out`. */
KERNEL static void norm_gradient_row(const void *job, int64_t thread, int64_t row) {
    const Rows *j = job;
    int64_t width = j->width, i = 0;
    const element *x = j->x + row * width;
    const float *w = j->weight, *grad = j->grad + row * width;
    float *out = j->out + row * width, square = 0, dot = 0;
    f32x16 squares = {0}, dots = {0};
    (void)thread;
    for (; i + LANES <= width; i += LANES) {
        f32x16 v = load_element(x + i);
        squares += v * v;
        dots += v * (load_f32(w + i) * load_f32(grad + i));
    }
    for (; i < width; i++) {
        float v = from_element(x[i]);
        square += v * v;
        dot += v * (w[i] * grad[i]);
    }
    square += sum_lanes(squares), dot += sum_lanes(dots);
    float scale = 1.0f / sqrtf(square / (float)width + (float)j->eps);
    float share = dot * scale * scale * scale / (float)width;
    for (i = 0; i + LANES <= width; i += LANES)
        store_f32(out + i, load_f32(out + i) +
                               (load_f32(w + i) * load_f32(grad + i) * scale - load_element(x + i) * share));
    for (; i < width; i++) out[i] += w[i] * grad[i] * scale - from_element(x[i]) * share;
}

EXPORT void EXPORTED(turret_norm_gradient)(const element *x, const float *weight, const float *grad, double eps,
                                           float *out, int64_t rows, int64_t width, int64_t threads) {
    Rows job = {x, weight, grad, out, width, eps, 0};
    in_pieces(norm_gradient_row, &job, rows, rows * width > SMALL ? threads : 1);
}

/* The gradients of gate and up in activation(gate) * up; see elementwise.c. */
INLINE void gate_gradient(f32x16 gate, f32x16 up, f32x16 grad, int64_t is_gelu, float *of_gate, float *of_up) {
    f32x16 y = gate, slope = splat(1.0f);
    if (is_gelu) {
        y = 1.5957691216f * (gate + 0.044715f * gate * gate * gate);
        slope = 1.5957691216f * (1.0f + 0.134145f * gate * gate);
    }
    f32x16 share = 1.0f / (1.0f + exp_vec(-y));
    store_f32(of_up, grad * (gate * share));
    store_f32(of_gate, grad * up * (share + gate * share * (1.0f - share) * slope));
}

KERNEL static void gate_gradient_row(const void *job, int64_t thread, int64_t row) {
    const Rows *j = job;
    int64_t width = j->width, i = 0;
    const element *gate = j->x + 2 * row * width, *up = gate + width;
    const float *grad = j->grad + row * width;
    float *of_gate = j->out + 2 * row * width, *of_up = of_gate + width;
    (void)thread;
    for (; i + LANES <= width; i += LANES)
        gate_gradient(load_element(gate + i), load_element(up + i), load_f32(grad + i), j->is_gelu, of_gate + i,
                      of_up + i);
    if (i < width) {
        element g[LANES] = {0}, u[LANES] = {0};
        float d[LANES] = {0}, found[2][LANES];
        memcpy(g, gate + i, (width - i) * sizeof *g);
        memcpy(u, up + i, (width - i) * sizeof *u);
        memcpy(d, grad + i, (width - i) * sizeof *d);
        gate_gradient(load_element(g), load_element(u), load_f32(d), j->is_gelu, found[0], found[1]);
        memcpy(of_gate + i, found[0], (width - i) * sizeof(float));
        memcpy(of_up + i, found[1], (width - i) * sizeof(float));
    }
}

/* gate_up and out: [rows, 2 * width]. */
EXPORT void EXPORTED(turret_gate_gradient)(const element *gate_up, const float *grad, float *out, int64_t rows,
                                           int64_t width, int64_t is_gelu, int64_t threads) {
    Rows job = {gate_up, 0, grad, out, width, 0, is_gelu};
    in_pieces(gate_gradient_row, &job, rows, rows * width > SMALL ? threads : 1);
}

/* Attention of whole sequences; kernels/cpu/gradients.py fills in this structure. */
typedef struct {
    const element *qkv;       /* [rows, heads + 2 * kv_heads, dim]: before rotary positions */
    const float *cos, *sin;   /* [rows, pairs], or null */
    const float *growth;      /* [rows]: factors of the queries, or null */
    const float *sinks;       /* [heads], or null; see attention.h */
    const float *grad;        /* [rows, heads, dim] */
    float *out;               /* like qkv */
    float *scratch;           /* [threads, stride] */
    const int64_t *starts;    /* [sequences + 1]: first rows */
    int64_t sequences, heads, kv_heads, dim, pairs, is_interleaved;
    int64_t window; /* 0: none */
    int64_t stride, threads;
    double scale, softcap; /* softcap 0: none */
} Attention;

#define QUERIES 32 /* positions of queries whose scores are in memory at once */
#define TILE 4     /* rows of a product whose sums stay in registers */
#define SIDE (WIDTH == 16 ? 4 : 2) /* vectors of each of these rows */
#define MAX_HEAD_DIM 256

/* A matrix: its element (i, j) is at i * row + j * column. */
typedef struct {
    const float *at;
    int64_t row, column;
} Matrix;

INLINE void add_columns(Matrix x, const float *w, int64_t w_row, int64_t inner, float *y, int64_t y_row,
                        const int rows, const int vectors) {
    fvec s[TILE][SIDE];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < vectors; c++) s[r][c] = fvec_f32(y + r * y_row + c * WIDTH);
    for (int64_t k = 0; k < inner; k++, w += w_row)
        for (int c = 0; c < vectors; c++) {
            fvec column = fvec_f32(w + c * WIDTH);
            for (int r = 0; r < rows; r++)
                s[r][c] = add_product(s[r][c], x.at[r * x.row + k * x.column] - (fvec){0}, column);
        }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < vectors; c++) *(fvec_at *)(y + r * y_row + c * WIDTH) = s[r][c];
}

/* y += x w, where w is [inner, columns]. The number of columns is a multiple of LANES. */
KERNEL static void add_matrix_product(Matrix x, const float *w, int64_t w_row, int64_t inner, float *y, int64_t y_row,
                              int64_t rows, int64_t columns) {
    for (int64_t o = 0, step; o < columns; o += step * WIDTH) {
        step = columns - o >= SIDE * WIDTH ? SIDE : 1;
        int64_t r = 0;
        Matrix from = x;
        for (; r + TILE <= rows; r += TILE, from.at += TILE * x.row) {
            if (step == SIDE) add_columns(from, w + o, w_row, inner, y + r * y_row + o, y_row, TILE, SIDE);
            else add_columns(from, w + o, w_row, inner, y + r * y_row + o, y_row, TILE, 1);
        }
        for (; r < rows; r++, from.at += x.row) {
            if (step == SIDE) add_columns(from, w + o, w_row, inner, y + r * y_row + o, y_row, 1, SIDE);
            else add_columns(from, w + o, w_row, inner, y + r * y_row + o, y_row, 1, 1);
        }
    }
}

/* Applies a row's rotary positions to a head (see `rotate` in elementwise.c), or undoes them (sign -1). */
INLINE void rotate_head(const Attention *a, int64_t row, float sign, float *x) {
    if (!a->cos) return;
    const float *cos = a->cos + row * a->pairs, *sin = a->sin + row * a->pairs;
    int64_t second = a->is_interleaved ? 1 : a->pairs, step = a->is_interleaved ? 2 : 1, i = 0;
    for (; !a->is_interleaved && i + LANES <= a->pairs; i += LANES) {
        f32x16 u = load_f32(x + i), v = load_f32(x + second + i);
        f32x16 c = load_f32(cos + i), s = load_f32(sin + i) * sign;
        store_f32(x + i, u * c - v * s);
        store_f32(x + second + i, v * c + u * s);
    }
    for (; i < a->pairs; i++) {
        float u = x[step * i], v = x[step * i + second], s = sin[i] * sign;
        x[step * i] = u * cos[i] - v * s;
        x[step * i + second] = v * cos[i] + u * s;
    }
}

INLINE void widen_head(const Attention *a, int64_t row, int64_t head, float *x) {
    const element *from = a->qkv + (row * (a->heads + 2 * a->kv_heads) + head) * a->dim;
    for (int64_t i = 0; i < a->dim; i += LANES) store_f32(x + i, load_element(from + i));
}

INLINE float *out_head(const Attention *a, int64_t row, int64_t head) {
    return a->out + (row * (a->heads + 2 * a->kv_heads) + head) * a->dim;
}

/* Turns a query's scores for the positions [first, end) into its shares (attention weights), and the gradient of
 * the shares into that of the scores before the cap. Both become 0 elsewhere in [low, high). `slopes` is scratch
 * memory of the same length. */
INLINE void softmax_gradient(const Attention *a, int64_t head, float *scores, float *grads, float *slopes, int64_t low,
                             int64_t high, int64_t first, int64_t end) {
    float cap = (float)a->softcap, most = a->sinks ? a->sinks[head] : -INFINITY, sum = 0;
    f32x16 largest = splat(-INFINITY), sums = {0}, dots = {0};
    for (int64_t s = low; a->softcap && s < high; s += LANES) {
        f32x16 bent = tanh_vec(load_f32(scores + s) / cap);
        store_f32(scores + s, bent * cap);
        store_f32(slopes + s, 1.0f - bent * bent);
    }
    for (int64_t s = low; s < first; s++) scores[s] = -INFINITY;
    for (int64_t s = end; s < high; s++) scores[s] = -INFINITY;
    for (int64_t s = low; s < high; s += LANES) largest = max_vec(largest, load_f32(scores + s));
    for (int i = 0; i < LANES; i++) most = fmaxf(most, largest[i]);
    if (a->sinks) sum = exp_vec(splat(a->sinks[head] - most))[0];
    for (int64_t s = low; s < high; s += LANES) {
        f32x16 share = exp_vec(load_f32(scores + s) - most);
        sums += share;
        dots += share * load_f32(grads + s);
        store_f32(scores + s, share);
    }
    float scale = 1.0f / (sum + sum_lanes(sums)), dot = sum_lanes(dots) * scale;
    for (int64_t s = low; s < high; s += LANES) {
        f32x16 share = load_f32(scores + s) * scale, grad = share * (load_f32(grads + s) - dot);
        store_f32(scores + s, share);
        if (a->softcap) grad *= load_f32(slopes + s);
        store_f32(grads + s, grad);
    }
}

/* One sequence's memory for one KV head. Positions are padded to whole vectors. `of_x` is the gradient of x. */
typedef struct {
    float *keys, *of_keys, *of_values;    /* [positions, dim] */
    float *transposed_keys, *transposed_values; /* [dim, positions] */
    float *queries, *of_queries, *grads;  /* [QUERIES * group, dim] */
    float *scores, *of_scores;            /* [QUERIES * group, positions] */
    float *slopes;                        /* [positions] */
} Memory;

/* Divides scratch memory into the arrays of `Memory`; kernels/cpu/gradients.py computes how many floats they need. */
INLINE Memory divide(float *at, int64_t positions, int64_t dim, int64_t queries) {
    Memory m;
    float **parts[] = {&m.keys, &m.of_keys, &m.of_values, &m.transposed_keys, &m.transposed_values};
    for (int i = 0; i < 5; i++, at += positions * dim) *parts[i] = at;
    float **heads[] = {&m.queries, &m.of_queries, &m.grads};
    for (int i = 0; i < 3; i++, at += queries * dim) *heads[i] = at;
    m.scores = at, at += queries * positions;
    m.of_scores = at, at += queries * positions;
    m.slopes = at;
    return m;
}

/* The gradients of QUERIES positions from `begin`, of one KV head of a sequence that starts at row `start`. */
static void attend_queries(const Attention *a, const Memory *m, int64_t start, int64_t length, int64_t kv_head,
                           int64_t begin) {
    int64_t group = a->heads / a->kv_heads, dim = a->dim, positions = (length + LANES - 1) / LANES * LANES;
    int64_t end = least(begin + QUERIES, length), count = (end - begin) * group, n = 0;
    int64_t low = a->window && begin + 1 > a->window ? (begin + 1 - a->window) / LANES * LANES : 0;
    int64_t high = (end + LANES - 1) / LANES * LANES;
    for (int64_t t = begin; t < end; t++)
        for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++, n++) {
            float *q = m->queries + n * dim, scale = (float)a->scale;
            if (a->growth) scale *= a->growth[start + t];
            widen_head(a, start + t, head, q);
            rotate_head(a, start + t, 1, q);
            for (int64_t i = 0; i < dim; i++) q[i] *= scale;
            memcpy(m->grads + n * dim, a->grad + ((start + t) * a->heads + head) * dim, dim * sizeof(float));
        }
    Matrix queries = {m->queries, dim, 1}, grads = {m->grads, dim, 1};
    memset(m->scores, 0, count * positions * sizeof(float));
    memset(m->of_scores, 0, count * positions * sizeof(float));
    memset(m->of_queries, 0, count * dim * sizeof(float));
    add_matrix_product(queries, m->transposed_keys + low, positions, dim, m->scores + low, positions, count,
                       high - low);
    add_matrix_product(grads, m->transposed_values + low, positions, dim, m->of_scores + low, positions, count,
                       high - low);
    for (n = 0; n < count; n++) {
        int64_t t = begin + n / group, first = a->window && t + 1 > a->window ? t + 1 - a->window : 0;
        softmax_gradient(a, kv_head * group + n % group, m->scores + n * positions, m->of_scores + n * positions,
                         m->slopes, low, high, first, t + 1);
    }
    Matrix of_scores = {m->of_scores + low, positions, 1}, transposed = {m->of_scores + low, 1, positions};
    Matrix shares = {m->scores + low, 1, positions};
    add_matrix_product(of_scores, m->keys + low * dim, dim, high - low, m->of_queries, dim, count, dim);
    add_matrix_product(transposed, m->queries, dim, count, m->of_keys + low * dim, dim, high - low, dim);
    add_matrix_product(shares, m->grads, dim, count, m->of_values + low * dim, dim, high - low, dim);
    for (n = 0; n < count; n++) {
        int64_t row = start + begin + n / group;
        float *q = m->of_queries + n * dim, scale = (float)a->scale;
        if (a->growth) scale *= a->growth[row];
        for (int64_t i = 0; i < dim; i++) q[i] *= scale;
        rotate_head(a, row, -1, q);
        memcpy(out_head(a, row, kv_head * group + n % group), q, dim * sizeof(float));
    }
}

/* A piece is one KV head of one sequence. */
static void attend_piece(const void *job, int64_t thread, int64_t piece) {
    const Attention *a = job;
    int64_t kv_head = piece % a->kv_heads, start = a->starts[piece / a->kv_heads], dim = a->dim;
    int64_t length = a->starts[piece / a->kv_heads + 1] - start;
    int64_t positions = (length + LANES - 1) / LANES * LANES, group = a->heads / a->kv_heads;
    Memory m = divide(a->scratch + thread * a->stride, positions, dim, QUERIES * group);
    memset(m.keys, 0, 5 * positions * dim * sizeof(float));
    for (int64_t t = 0; t < length; t++) {
        float *key = m.keys + t * dim, value[MAX_HEAD_DIM];
        widen_head(a, start + t, a->heads + kv_head, key);
        rotate_head(a, start + t, 1, key);
        widen_head(a, start + t, a->heads + a->kv_heads + kv_head, value);
        for (int64_t i = 0; i < dim; i++) {
            m.transposed_keys[i * positions + t] = key[i];
            m.transposed_values[i * positions + t] = value[i];
        }
    }
    for (int64_t begin = 0; begin < length; begin += QUERIES) attend_queries(a, &m, start, length, kv_head, begin);
    for (int64_t t = 0; t < length; t++) {
        rotate_head(a, start + t, -1, m.of_keys + t * dim);
        memcpy(out_head(a, start + t, a->heads + kv_head), m.of_keys + t * dim, dim * sizeof(float));
        memcpy(out_head(a, start + t, a->heads + a->kv_heads + kv_head), m.of_values + t * dim, dim * sizeof(float));
    }
}

EXPORT void EXPORTED(turret_attention_gradient)(const Attention *a) {
    in_pieces(attend_piece, a, a->sequences * a->kv_heads, a->threads);
}
