/* The two products of products.c for one type of weight. The including file defines ELEMENT, the type, and
 * LOAD, which converts LANES elements to floats. */

INLINE f32x16 NAME(load_some)(const ELEMENT *p, int64_t count) {
    ELEMENT some[LANES] = {0};
    memcpy(some, p, count * sizeof(ELEMENT));
    return LOAD(some);
}

/* Sums, lane by lane, of SIDE rows and SIDE outputs. */
INLINE void NAME(add_dots)(const float *const *x, const ELEMENT *const *w, int64_t n,
                           f32x16 s[SIDE][SIDE]) {
    for (int r = 0; r < SIDE; r++)
        for (int c = 0; c < SIDE; c++) s[r][c] = (f32x16){0};
    int64_t k = 0;
    for (; k + LANES <= n; k += LANES) {
        f32x16 column[SIDE];
        for (int c = 0; c < SIDE; c++) column[c] = LOAD(w[c] + k);
        for (int r = 0; r < SIDE; r++) {
            f32x16 v = load_f32(x[r] + k);
            for (int c = 0; c < SIDE; c++) s[r][c] += v * column[c];
        }
    }
    if (k == n) return;
    f32x16 column[SIDE];
    for (int c = 0; c < SIDE; c++) column[c] = NAME(load_some)(w[c] + k, n - k);
    for (int r = 0; r < SIDE; r++) {
        f32x16 v = load_some_f32(x[r] + k, n - k);
        for (int c = 0; c < SIDE; c++) s[r][c] += v * column[c];
    }
}

/* Computes TILE rows by at most TILE outputs. Missing outputs repeat the last one and are not stored. */
INLINE void NAME(dot_tile)(const Product *p, const float *x, const ELEMENT *w, float *y, int64_t rows,
                           int64_t columns) {
    f32x16 sums[TILE * TILE];
    const float *xs[TILE];
    const ELEMENT *ws[TILE];
    for (int i = 0; i < TILE; i++) {
        xs[i] = x + (i < rows ? i : rows - 1) * p->x_row;
        ws[i] = w + (i < columns ? i : columns - 1) * p->w_row;
    }
    for (int r = 0; r < TILE; r += SIDE)
        for (int c = 0; c < TILE; c += SIDE) {
            f32x16 s[SIDE][SIDE];
            if (r < rows && c < columns) NAME(add_dots)(xs + r, ws + c, p->inner, s);
            else memset(s, 0, sizeof s);
            for (int i = 0; i < SIDE; i++)
                for (int j = 0; j < SIDE; j++) sums[(r + i) * TILE + c + j] = s[i][j];
        }
    float found[LANES];
    store_f32(found, sum_each(sums));
    for (int r = 0; r < rows; r++) memcpy(y + r * p->y_row, found + r * TILE, columns * sizeof(float));
}

/* Computes one row by TILE outputs, with sums in the same order. */
INLINE void NAME(dot_row)(const Product *p, const float *x, const ELEMENT *w, float *y,
                          int64_t columns) {
    f32x16 s[LANES];
    const ELEMENT *ws[TILE];
    int64_t k = 0, n = p->inner;
    for (int c = 0; c < TILE; c++) ws[c] = w + (c < columns ? c : columns - 1) * p->w_row;
    for (int i = 0; i < LANES; i++) s[i] = (f32x16){0};
    for (; k + LANES <= n; k += LANES) {
        f32x16 v = load_f32(x + k);
        for (int c = 0; c < TILE; c++) {
            __builtin_prefetch(ws[c] + k + TILE * p->w_row, 0, 2);
            s[c] += v * LOAD(ws[c] + k);
        }
    }
    if (k < n) {
        f32x16 v = load_some_f32(x + k, n - k);
        for (int c = 0; c < TILE; c++) s[c] += v * NAME(load_some)(ws[c] + k, n - k);
    }
    float found[LANES];
    store_f32(found, sum_each(s));
    memcpy(y, found, columns * sizeof(float));
}

KERNEL static void NAME(dots)(const Product *p, const Part *part) {
    const float *x = p->x + part->batch * p->x_batch;
    const ELEMENT *w = (const ELEMENT *)p->w + part->batch * p->w_batch;
    float *y = p->y + part->batch * p->y_batch;
    for (int64_t o = part->column; o < part->column_end; o += TILE) {
        int64_t columns = least(part->column_end - o, TILE);
        for (int64_t r = part->row; r < part->row_end; r += TILE) {
            int64_t rows = least(part->row_end - r, TILE);
            const float *xr = x + r * p->x_row;
            float *yr = y + r * p->y_row + o;
            if (rows == 1)
                NAME(dot_row)(p, xr, w + o * p->w_row, yr, columns);
            else
                NAME(dot_tile)(p, xr, w + o * p->w_row, yr, rows, columns);
        }
    }
}

/* The numbers of rows and of vectors of columns are constants, so that the sums stay in registers. The
 * last vector has `some` columns. */
INLINE void NAME(add_columns)(const Product *p, const float *x, const ELEMENT *w, float *y,
                              const int rows, const int vectors, int64_t some) {
    f32x16 s[WIDE][WIDE];
    const int whole = some == LANES;
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < vectors; c++) {
            const float *from = y + r * p->y_row + c * LANES;
            s[r][c] = !p->adds ? (f32x16){0} : whole ? load_f32(from) : load_some_f32(from, some);
        }
    for (int64_t k = 0; k < p->inner; k++, w += p->w_row)
        for (int c = 0; c < vectors; c++) {
            f32x16 column = whole ? LOAD(w + c * LANES) : NAME(load_some)(w, some);
            for (int r = 0; r < rows; r++) s[r][c] += x[r * p->x_row + k] * column;
        }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < vectors; c++) {
            float *to = y + r * p->y_row + c * LANES;
            if (whole) store_f32(to, s[r][c]);
            else memcpy(to, &s[r][c], some * sizeof(float));
        }
}

INLINE void NAME(columns_of_rows)(const Product *p, const Part *part, const float *x,
                                  const ELEMENT *w, float *y, const int rows) {
    int64_t o = part->column, end = part->column_end;
    for (; o + WIDE * LANES <= end; o += WIDE * LANES)
        NAME(add_columns)(p, x, w + o, y + o, rows, WIDE, LANES);
    for (; o + LANES <= end; o += LANES) NAME(add_columns)(p, x, w + o, y + o, rows, 1, LANES);
    if (o < end) NAME(add_columns)(p, x, w + o, y + o, rows, 1, end - o);
}

KERNEL static void NAME(columns)(const Product *p, const Part *part) {
    const float *x = p->x + part->batch * p->x_batch;
    const ELEMENT *w = (const ELEMENT *)p->w + part->batch * p->w_batch;
    float *y = p->y + part->batch * p->y_batch;
    int64_t r = part->row;
    for (; r + WIDE <= part->row_end; r += WIDE)
        NAME(columns_of_rows)(p, part, x + r * p->x_row, w, y + r * p->y_row, WIDE);
    for (; r < part->row_end; r++)
        NAME(columns_of_rows)(p, part, x + r * p->x_row, w, y + r * p->y_row, 1);
}

#undef ELEMENT
#undef LOAD
#undef NAME
