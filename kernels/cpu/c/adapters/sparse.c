/* Updates of a few entries of a weight. An entry is a product by itself, and a row of a weight has too few
 * for a vector; so LANES outputs are computed at once, each by a lane that takes its entries one
 * after another. The outputs of a unit are dealt to lanes by how many entries they have, so that few
 * lanes wait for another. From TILE rows on it is the other way round: an entry meets LANES rows at
 * once. An output's sum has the same order in both, and so the same bits.
 */
#include "adapters.h"

#define AHEAD 64         /* steps: the memory's latency, at what a thread reads in it */
#define MOST_SKIPPED 255 /* inputs, by one step */
#define MAX_TURNED 16384 /* inputs: 1 MB of a thread's stack */
#define CHAINS 4         /* sums at once, since each waits for its last product */

/* Steps of a lane for entries [first, last) of an output; -1 if its columns do not ascend. */
INLINE int64_t lane_steps(const uint16_t *columns, int64_t first, int64_t last, int skips) {
    if (!skips) return last - first;
    int64_t steps = 0, column = 0;
    for (int64_t e = first; e < last; column = columns[e++]) {
        int64_t skipped = columns[e] - column;
        if (skipped < 0) return -1;
        steps += skipped > MOST_SKIPPED ? 1 + (skipped - 1) / MOST_SKIPPED : 1;
    }
    return steps;
}

/* Orders the outputs [low, low + count) by their steps, most first; returns whether it can be done. By
 * digits of the steps, the lowest first: an adapter has thousands of such units, and its first
 * request waits for them. */
static int deal(const uint16_t *columns, const int32_t *row_starts, int64_t low, int64_t count,
                int skips, int64_t *steps, uint8_t *outputs) {
    int64_t found[COLUMNS], most = 0;
    uint8_t before[COLUMNS];
    for (int64_t i = 0; i < count; i++) {
        found[i] = lane_steps(columns, row_starts[low + i], row_starts[low + i + 1], skips);
        if (found[i] < 0) return 0;
        most = found[i] > most ? found[i] : most;
        outputs[i] = (uint8_t)i;
    }
    for (int shift = 0; shift == 0 || most >> shift; shift += 8) {
        int64_t ends[256] = {0}, end = 0;
        memcpy(before, outputs, count);
        for (int64_t i = 0; i < count; i++) ends[found[i] >> shift & 255]++;
        for (int digit = 255; digit >= 0; digit--) {
            int64_t start = end;
            end += ends[digit];
            ends[digit] = start;
        }
        for (int64_t i = 0; i < count; i++) outputs[ends[found[before[i]] >> shift & 255]++] = before[i];
    }
    for (int64_t i = 0; i < count; i++) steps[i] = found[outputs[i]];
    return 1;
}

/* Steps of all groups of lanes, with skips or with columns; -1 where skips cannot tell the columns. */
EXPORT int64_t turret_sparse_steps(const uint16_t *columns, const int32_t *row_starts, int64_t out,
                                   int64_t skips) {
    int64_t steps[COLUMNS], total = 0;
    uint8_t outputs[COLUMNS];
    for (int64_t low = 0; low < out; low += COLUMNS) {
        int64_t count = least(out - low, COLUMNS);
        if (!deal(columns, row_starts, low, count, skips != 0, steps, outputs)) return -1;
        for (int64_t i = 0; i < count; i += LANES) total += steps[i];
    }
    return total;
}

/* Fills what `Sparse` points to; `lanes` has room for the steps that turret_sparse_steps counted,
 * `starts` for one of each LANES outputs and one more, `outputs` for `out`. */
EXPORT void turret_sparse_lanes(const bf16 *values, const uint16_t *columns, const int32_t *row_starts,
                                int64_t out, int64_t skips, bf16 *lanes, void *places, int32_t *starts,
                                uint8_t *outputs) {
    int64_t steps[COLUMNS], at = 0, group = 0;
    uint8_t *skipped = places;
    uint16_t *named = places;
    for (int64_t low = 0; low < out; low += COLUMNS) {
        int64_t count = least(out - low, COLUMNS);
        deal(columns, row_starts, low, count, skips != 0, steps, outputs + low);
        for (int64_t i = 0; i < count; at += steps[i], i += LANES) {
            starts[group++] = (int32_t)at;
            for (int64_t lane = 0; lane < LANES; lane++) {
                int64_t place = at * LANES + lane, end = (at + steps[i]) * LANES + lane, column = 0;
                int64_t o = i + lane < count ? low + outputs[low + i + lane] : -1;
                for (int64_t e = o < 0 ? 0 : row_starts[o]; o >= 0 && e < row_starts[o + 1]; e++) {
                    for (; skips && columns[e] - column > MOST_SKIPPED; place += LANES) {
                        lanes[place] = 0;
                        skipped[place] = MOST_SKIPPED;
                        column += MOST_SKIPPED;
                    }
                    lanes[place] = values[e];
                    if (skips) skipped[place] = (uint8_t)(columns[e] - column);
                    else named[place] = columns[e];
                    column = columns[e];
                    place += LANES;
                }
                for (; place < end; place += LANES) {
                    lanes[place] = 0;
                    if (skips) skipped[place] = 0;
                    else named[place] = (uint16_t)column;
                }
            }
        }
    }
    starts[group] = (int32_t)at;
}

INLINE i32x16 widen_bytes(const uint8_t *p) {
#ifdef __AVX512F__ /* GCC 12 widens one by one */
    return (i32x16)_mm512_cvtepu8_epi32(*(const __m128i_u *)p);
#else
    return __builtin_convertvector(*(const u8x16 *)p, i32x16);
#endif
}

INLINE i32x16 widen_halves(const uint16_t *p) {
#ifdef __AVX512F__
    return (i32x16)_mm512_cvtepu16_epi32(*(const __m256i_u *)p);
#else
    return __builtin_convertvector(*(const u16x16 *)p, i32x16);
#endif
}

INLINE f32x16 gather(const float *x, i32x16 places) {
#ifdef __AVX512F__
    return (f32x16)_mm512_i32gather_ps((__m512i)places, x, sizeof *x);
#else
    f32x16 found;
    for (int lane = 0; lane < LANES; lane++) found[lane] = x[places[lane]];
    return found;
#endif
}

/* Of one row: the sums of a group's lanes. */
INLINE f32x16 sum_group(const Sparse *s, const float *x, int64_t group, const int skips) {
    f32x16 sums = {0};
    i32x16 places = {0};
    for (int64_t t = s->starts[group]; t < s->starts[group + 1]; t++) {
        __builtin_prefetch(s->values + (t + AHEAD) * LANES, 0, 2);
        if (skips) {
            __builtin_prefetch(s->skips + (t + AHEAD) * LANES, 0, 2);
            places += widen_bytes(s->skips + t * LANES);
        } else {
            __builtin_prefetch(s->columns + (t + AHEAD) * LANES, 0, 2);
            places = widen_halves(s->columns + t * LANES);
        }
        sums += gather(x, places) * load_bf16(s->values + t * LANES);
    }
    return sums;
}

INLINE void add_row(const Sparse *s, const bf16 *row, float w, int64_t in_features, int64_t low,
                    int64_t count, float *acc, const int skips) {
    float x[in_features], sums[LANES];
    int64_t c = 0;
    for (; c + LANES <= in_features; c += LANES) store_f32(x + c, load_bf16(row + c));
    for (; c < in_features; c++) x[c] = to_f32(row[c]);
    for (int64_t i = 0; i < count; i += LANES) {
        store_f32(sums, sum_group(s, x, (low + i) / LANES, skips));
        for (int64_t lane = 0; lane < least(count - i, LANES); lane++)
            acc[s->outputs[low + i + lane]] += w * sums[lane];
    }
}

/* Inputs of LANES rows or fewer as [in, LANES]; of rows that are not there it reads the last. */
INLINE void turn(const Rows *rows, int64_t first, int64_t in_features, float *x) {
    const bf16 *from[LANES];
    int64_t c = 0;
    for (int64_t r = 0; r < LANES; r++)
        from[r] = rows->x + least(first + r, rows->count - 1) * rows->x_stride;
    for (; c + LANES <= in_features; c += LANES) {
        f32x16 square[LANES];
        for (int r = 0; r < LANES; r++) square[r] = load_bf16(from[r] + c);
        transpose(square);
        for (int r = 0; r < LANES; r++) store_f32(x + (c + r) * LANES, square[r]);
    }
    for (; c < in_features; c++)
        for (int64_t r = 0; r < LANES; r++) x[c * LANES + r] = to_f32(from[r][c]);
}

/* Of LANES rows: the sums of CHAINS lanes of a group, from `lane` on. */
INLINE void sum_lanes_of(const Sparse *s, const float *x, int64_t group, int64_t lane,
                         f32x16 sums[CHAINS], const int skips) {
    int64_t column[CHAINS] = {0};
    for (int64_t t = s->starts[group]; t < s->starts[group + 1]; t++)
        for (int n = 0; n < CHAINS; n++) {
            int64_t place = t * LANES + lane + n;
            column[n] = skips ? column[n] + s->skips[place] : s->columns[place];
            sums[n] += load_f32(x + column[n] * LANES) * to_f32(s->values[place]);
        }
}

/* At most LANES rows from `first` on. */
INLINE void add_rows(const Sparse *s, const Rows *rows, int64_t first, float w, int64_t in_features,
                     int64_t low, int64_t count, const int skips) {
    float x[in_features * LANES] __attribute__((aligned(64)));
    int64_t here = least(rows->count - first, LANES);
    turn(rows, first, in_features, x);
    for (int64_t i = 0; i < count; i += CHAINS) {
        f32x16 sums[CHAINS] = {{0}};
        sum_lanes_of(s, x, (low + i) / LANES, i % LANES, sums, skips);
        for (int64_t n = 0; n < least(count - i, CHAINS); n++)
            for (int64_t r = 0; r < here; r++)
                rows->acc[(first + r) * COLUMNS + s->outputs[low + i + n]] += w * sums[n][r];
    }
}

INLINE void add(const Sparse *s, const Rows *rows, float w, int64_t in_features, int64_t low,
                int64_t count, const int skips) {
    int64_t i = 0;
    if (in_features <= MAX_TURNED)
        for (; rows->count - i >= TILE; i += least(rows->count - i, LANES))
            add_rows(s, rows, i, w, in_features, low, count, skips);
    for (; i < rows->count; i++)
        add_row(s, rows->x + i * rows->x_stride, w, in_features, low, count, rows->acc + i * COLUMNS, skips);
}

KERNEL void sparse_expand(const Sparse *s, const Rows *rows, float w, int64_t in_features, int64_t low,
                          int64_t count) {
    if (s->skips) add(s, rows, w, in_features, low, count, 1);
    else add(s, rows, w, in_features, low, count, 0);
}
