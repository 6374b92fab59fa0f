/* The two products of products.c for one type of weight. The including file defines ELEMENT, the type; LOAD,
 * which loads WIDTH elements as floats; and NAME, which adds a suffix to the names of functions:
 * with bf16 weights, NAME(dots) is dots_of_bf16. */

/* Loads the q-th WIDTH of the LANES elements at p, of which only the first `count` exist. The others are 0. */
INLINE fvec NAME(load_some)(const ELEMENT *p, int64_t count, int q) {
    ELEMENT some[LANES] = {0};
    memcpy(some, p, count * sizeof(ELEMENT));
    return LOAD(some + q * WIDTH);
}

/* Multiplies TILE rows by SIDE outputs. Each result has LANES sums, and this computes the p-th WIDTH of them. */
INLINE void NAME(add_dots)(const float *const *x, const ELEMENT *const *w, int64_t n, int p,
                           f32x16 (*sums)[TILE]) {
    fvec s[TILE][SIDE];
    for (int r = 0; r < TILE; r++)
        for (int c = 0; c < SIDE; c++) s[r][c] = (fvec){0};
    int64_t k = 0;
    for (; k + LANES <= n; k += LANES) {
        fvec column[SIDE];
        for (int c = 0; c < SIDE; c++) column[c] = LOAD(w[c] + k + p * WIDTH);
        for (int r = 0; r < TILE; r++) {
            fvec v = fvec_f32(x[r] + k + p * WIDTH);
            for (int c = 0; c < SIDE; c++) s[r][c] = add_product(s[r][c], v, column[c]);
        }
    }
    if (k < n) {
        fvec column[SIDE];
        for (int c = 0; c < SIDE; c++) column[c] = NAME(load_some)(w[c] + k, n - k, p);
        for (int r = 0; r < TILE; r++) {
            fvec v = load_some_of_f32(x[r] + k, n - k, p);
            for (int c = 0; c < SIDE; c++) s[r][c] = add_product(s[r][c], v, column[c]);
        }
    }
    for (int r = 0; r < TILE; r++)
        for (int c = 0; c < SIDE; c++) ((fvec_at *)&sums[r][c])[p] = s[r][c];
}

/* Multiplies up to TILE rows by up to TILE outputs. If there are fewer, the last row or output is repeated, and
 * the repeated results are not stored. */
INLINE void NAME(dot_tile)(const Product *p, const float *x, const ELEMENT *w, char *y, int64_t rows,
                           int64_t columns) {
    f32x16 sums[TILE][TILE];
    const float *xs[TILE];
    const ELEMENT *ws[TILE];
    for (int i = 0; i < TILE; i++) {
        xs[i] = x + (i < rows ? i : rows - 1) * p->x_row;
        ws[i] = w + (i < columns ? i : columns - 1) * p->w_row;
    }
    for (int part = 0; part < PARTS; part++)
        for (int c = 0; c < TILE; c += SIDE)
            NAME(add_dots)(xs, ws + c, p->inner, part, (f32x16(*)[TILE])&sums[0][c]);
    store_dots(p, sum_each(sums[0]), y, rows, columns);
}

/* Multiplies one row by TILE outputs. Its sums have the same order as those of dot_tile. */
INLINE void NAME(dot_row)(const Product *p, const float *x, const ELEMENT *w, char *y, int64_t columns) {
    fvec s[TILE][PARTS];
    const ELEMENT *ws[TILE];
    int64_t k = 0, n = p->inner;
    for (int c = 0; c < TILE; c++) {
        ws[c] = w + (c < columns ? c : columns - 1) * p->w_row;
        for (int q = 0; q < PARTS; q++) s[c][q] = (fvec){0};
    }
    for (; k + LANES <= n; k += LANES)
        for (int c = 0; c < TILE; c++) {
            __builtin_prefetch(ws[c] + k + TILE * p->w_row, 0, 2);
            for (int q = 0; q < PARTS; q++)
                s[c][q] = add_product(s[c][q], fvec_f32(x + k + q * WIDTH),
                                      LOAD(ws[c] + k + q * WIDTH));
        }
    for (int q = 0; q < PARTS && k < n; q++) {
        fvec v = load_some_of_f32(x + k, n - k, q);
        for (int c = 0; c < TILE; c++)
            s[c][q] = add_product(s[c][q], v, NAME(load_some)(ws[c] + k, n - k, q));
    }
    f32x16 sums[LANES] = {{0}};
    for (int c = 0; c < TILE; c++)
        for (int q = 0; q < PARTS; q++) ((fvec_at *)&sums[c])[q] = s[c][q];
    store_dots(p, sum_each(sums), y, 1, columns);
}

KERNEL static void NAME(dots)(const Product *p, const Part *part) {
    const float *x = p->x + part->batch * p->x_batch;
    const ELEMENT *w = (const ELEMENT *)p->w + part->batch * p->w_batch;
    int64_t size = result_size(p);
    char *y = (char *)p->y + part->batch * p->y_batch * size;
    for (int64_t o = part->column; o < part->column_end; o += TILE) {
        int64_t columns = least(part->column_end - o, TILE);
        for (int64_t r = part->row; r < part->row_end; r += TILE) {
            int64_t rows = least(part->row_end - r, TILE);
            const float *xr = x + r * p->x_row;
            char *yr = y + (r * p->y_row + o) * size;
            if (rows == 1)
                NAME(dot_row)(p, xr, w + o * p->w_row, yr, columns);
            else
                NAME(dot_tile)(p, xr, w + o * p->w_row, yr, rows, columns);
        }
    }
}

/* Multiplies `rows` rows by `vectors` vectors of columns. Both are compile-time constants, so the sums stay in
 * registers. A vector has `some` columns: WIDTH, or fewer if there is one vector only. */
INLINE void NAME(add_columns)(const Product *p, const float *x, const ELEMENT *w, float *y,
                              const int rows, const int vectors, int64_t some) {
    fvec s[TILE][SIDE];
    const int whole = some == WIDTH;
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < vectors; c++) {
            const float *from = y + r * p->y_row + c * WIDTH;
            s[r][c] = !p->adds ? (fvec){0} : whole ? fvec_f32(from) : load_some_of_f32(from, some, 0);
        }
    for (int64_t k = 0; k < p->inner; k++, w += p->w_row)
        for (int c = 0; c < vectors; c++) {
            fvec column = whole ? LOAD(w + c * WIDTH) : NAME(load_some)(w, some, 0);
            for (int r = 0; r < rows; r++) s[r][c] = add_product(s[r][c], x[r * p->x_row + k * p->x_inner] - (fvec){0}, column);
        }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < vectors; c++) {
            float *to = y + r * p->y_row + c * WIDTH;
            memcpy(to, &s[r][c], (whole ? WIDTH : some) * sizeof(float));
        }
}

INLINE void NAME(columns_of_rows)(const Product *p, const Part *part, const float *x,
                                  const ELEMENT *w, float *y, const int rows) {
    int64_t o = part->column, end = part->column_end;
    for (; o + SIDE * WIDTH <= end; o += SIDE * WIDTH)
        NAME(add_columns)(p, x, w + o, y + o, rows, SIDE, WIDTH);
    for (; o + WIDTH <= end; o += WIDTH) NAME(add_columns)(p, x, w + o, y + o, rows, 1, WIDTH);
    if (o < end) NAME(add_columns)(p, x, w + o, y + o, rows, 1, end - o);
}

KERNEL static void NAME(columns)(const Product *whole, const Part *part) {
    Product piece = *whole, *p = &piece;
    p->x += part->batch * p->x_batch;
    const ELEMENT *w = (const ELEMENT *)p->w + part->batch * p->w_batch;
    float *y = (float *)p->y + part->batch * p->y_batch;
    int64_t k = 0;
    do { /* Each block of w stays in the cache. All blocks after the first add to y. */
        p->inner = least(whole->inner - k, INNER_BLOCK);
        int64_t r = part->row;
        for (; r + TILE <= part->row_end; r += TILE)
            NAME(columns_of_rows)(p, part, p->x + r * p->x_row, w, y + r * p->y_row, TILE);
        for (; r < part->row_end; r++)
            NAME(columns_of_rows)(p, part, p->x + r * p->x_row, w, y + r * p->y_row, 1);
        p->adds = 1;
        p->x += INNER_BLOCK * p->x_inner;
        w += INNER_BLOCK * p->w_row;
    } while ((k += INNER_BLOCK) < whole->inner);
}

#undef ELEMENT
#undef LOAD
#undef NAME
