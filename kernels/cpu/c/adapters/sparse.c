/* Updates of a few entries of a weight.
 *
 * A row of a weight has too few entries to fill a vector. So LANES outputs are computed at once, for BLOCK inputs
 * at a time. These inputs fit into two registers, from which the entries select theirs without reading memory.
 * A step has two slots for each output. Memory holds only the slots that have an entry, side by side, and a mask
 * of these. The outputs of a unit are sorted by their number of entries before they are assigned to lanes, so
 * that few slots are empty. Each slot is summed in the order of the inputs, and then the two slots of an output
 * are added, for any number of rows.
 */
#include "adapters.h"

#define SLOTS (2 * LANES)
#define BLOCK 64       /* inputs */
#define MOST_BLOCKS 1024
#define AHEAD 4096     /* bytes to prefetch ahead: memory latency times a thread's reading rate */
#define TOGETHER 8     /* rows whose sums stay in registers */

/* Sorts the outputs [low, low + count) by their number of entries, largest first. This is a radix sort, because an
 * adapter has thousands of such units, and its first request waits for them. */
static void deal(const int32_t *row_starts, int64_t low, int64_t count, uint8_t *outputs) {
    int64_t found[COLUMNS], most = 0;
    uint8_t before[COLUMNS];
    for (int64_t i = 0; i < count; i++) {
        found[i] = row_starts[low + i + 1] - row_starts[low + i];
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
}

/* The entries of LANES outputs in compressed rows, by block of inputs. */
typedef struct {
    int64_t lanes, blocks;
    int64_t next[LANES]; /* the next entry of each output */
    int32_t counts[MOST_BLOCKS][LANES];
} Group;

/* Returns whether the blocks of every output ascend. */
static int count_group(const uint16_t *columns, const int32_t *row_starts, int64_t low,
                       const uint8_t *outputs, int64_t lanes, Group *g) {
    g->lanes = lanes;
    g->blocks = 0;
    for (int64_t lane = 0; lane < lanes; lane++) {
        int64_t o = low + outputs[lane], block = -1;
        g->next[lane] = row_starts[o];
        for (int64_t e = row_starts[o]; e < row_starts[o + 1]; e++) {
            int64_t of = columns[e] / BLOCK;
            if (of < block) return 0;
            for (block = of; g->blocks <= block; g->blocks++)
                memset(g->counts[g->blocks], 0, sizeof g->counts[0]);
            g->counts[of][lane]++;
        }
    }
    return 1;
}

static int64_t steps_of(const Group *g, int64_t block) {
    int64_t most = 0;
    for (int64_t lane = 0; lane < g->lanes; lane++)
        most = g->counts[block][lane] > most ? g->counts[block][lane] : most;
    return (most + 1) / 2;
}

/* The slots that have an entry in one step of a block. */
static uint32_t slots_of(const Group *g, int64_t block, int64_t step) {
    uint32_t slots = 0;
    for (int64_t lane = 0; lane < g->lanes; lane++) {
        int64_t left = g->counts[block][lane] - 2 * step;
        slots |= (uint32_t)(left > 0) << lane | (uint32_t)(left > 1) << (LANES + lane);
    }
    return slots;
}

/* Counts the steps of all groups, or returns -1 if the inputs of an output do not ascend by blocks. */
EXPORT int64_t turret_sparse_steps(const uint16_t *columns, const int32_t *row_starts, int64_t out) {
    int64_t total = 0;
    uint8_t outputs[COLUMNS];
    Group g;
    for (int64_t low = 0; low < out; low += COLUMNS) {
        int64_t count = least(out - low, COLUMNS);
        deal(row_starts, low, count, outputs);
        for (int64_t i = 0; i < count; i += LANES) {
            if (!count_group(columns, row_starts, low, outputs + i, least(count - i, LANES), &g)) return -1;
            for (int64_t block = 0; block < g.blocks; block++) total += steps_of(&g, block);
        }
    }
    return total;
}

/* Fills the arrays of `Sparse`. Every step has at least one entry. Returns the number of steps, or -1 as
 * turret_sparse_steps does. */
EXPORT int64_t turret_sparse_fill(const bf16 *values, const uint16_t *columns, const int32_t *row_starts,
                               int64_t out, bf16 *kept, uint8_t *places, uint32_t *masks,
                               uint16_t *skips, int32_t *starts, uint8_t *outputs) {
    int64_t at = 0, step = 0;
    Group g;
    for (int64_t low = 0; low < out; low += COLUMNS) {
        int64_t count = least(out - low, COLUMNS);
        deal(row_starts, low, count, outputs + low);
        for (int64_t i = 0; i < count; i += LANES) {
            int64_t last = 0;
            if (!count_group(columns, row_starts, low, outputs + low + i, least(count - i, LANES), &g)) return -1;
            *starts++ = (int32_t)step;
            *starts++ = (int32_t)at;
            for (int64_t block = 0; block < g.blocks; block++) {
                int64_t steps = steps_of(&g, block);
                for (int64_t n = 0; n < steps; n++, step++, last = block) {
                    masks[step] = slots_of(&g, block, n);
                    skips[step] = (uint16_t)(block - last);
                    for (uint32_t left = masks[step]; left; left &= left - 1, at++) {
                        int slot = __builtin_ctz(left);
                        int64_t e = g.next[slot % LANES] + 2 * n + slot / LANES;
                        kept[at] = values[e];
                        places[at] = columns[e] % BLOCK;
                    }
                }
                for (int64_t lane = 0; lane < g.lanes; lane++) g.next[lane] += g.counts[block][lane];
            }
        }
    }
    *starts++ = (int32_t)step;
    *starts = (int32_t)at;
    return step;
}

/* The next step of a group, and its entries. */
typedef struct {
    const bf16 *values;
    const uint8_t *places;
    int64_t step, end;
} Reader;

INLINE Reader read_group(const Sparse *s, int64_t group) {
    const int32_t *start = s->starts + 2 * group; /* start[2] is the first step of the next group */
    return (Reader){s->values + start[1], s->places + start[1], start[0], start[2]};
}

INLINE void ask_ahead(const Reader *r) {
    __builtin_prefetch((const char *)r->values + AHEAD, 0, 2);
    __builtin_prefetch(r->places + AHEAD / 2, 0, 2);
}

/* Computes the sums of a group's slots, [rows, SLOTS]. x: [rows, stride], padded to whole blocks. */
#ifdef __AVX512VBMI2__
INLINE void sum_slots(const Sparse *s, const bf16 *x, int64_t stride, const int rows, int64_t group,
                      float *sums) {
    const __m512i high = _mm512_set1_epi32((int)0xffff0000);
    __m512 even[TOGETHER], odd[TOGETHER];
    for (int n = 0; n < rows; n++) even[n] = odd[n] = _mm512_setzero_ps();
    for (Reader r = read_group(s, group); r.step < r.end; r.step++) {
        __mmask32 mask = s->masks[r.step];
        __m512i v = _mm512_loadu_si512(r.values);
        __m256i place = _mm256_loadu_si256((const __m256i *)r.places);
        x += s->skips[r.step] * BLOCK;
        ask_ahead(&r);
        __asm__("" : "+v"(v), "+v"(place)); /* keeps both in registers: expanding from memory is slow */
        v = _mm512_maskz_expand_epi16(mask, v);
        __m512i places = _mm512_cvtepu8_epi16(_mm256_maskz_expand_epi8(mask, place));
        __m512 v_even = (__m512)_mm512_slli_epi32(v, 16), v_odd = (__m512)_mm512_and_si512(v, high);
        for (int n = 0; n < rows; n++) {
            const bf16 *in = x + n * stride;
            /* Empty slots need 0 too, because their inputs must not count. */
            __m512i u = _mm512_maskz_permutex2var_epi16(mask, _mm512_loadu_si512(in), places,
                                                        _mm512_loadu_si512(in + BLOCK / 2));
            even[n] = _mm512_fmadd_ps((__m512)_mm512_slli_epi32(u, 16), v_even, even[n]);
            odd[n] = _mm512_fmadd_ps((__m512)_mm512_and_si512(u, high), v_odd, odd[n]);
        }
        r.values += __builtin_popcount(mask);
        r.places += __builtin_popcount(mask);
    }
    for (int n = 0; n < rows; n++, sums += SLOTS) {
        float evens[LANES], odds[LANES];
        _mm512_storeu_ps(evens, even[n]);
        _mm512_storeu_ps(odds, odd[n]);
        for (int i = 0; i < LANES; i++) sums[2 * i] = evens[i], sums[2 * i + 1] = odds[i];
    }
}
#elif defined(__AVX512BW__)
INLINE void sum_slots(const Sparse *s, const bf16 *x, int64_t stride, const int rows, int64_t group,
                      float *sums) {
    __m512 found[TOGETHER][2];
    for (int n = 0; n < rows; n++) found[n][0] = found[n][1] = _mm512_setzero_ps();
    for (Reader r = read_group(s, group); r.step < r.end; r.step++) {
        x += s->skips[r.step] * BLOCK;
        ask_ahead(&r);
        for (int half = 0; half < 2; half++) {
            __mmask16 mask = (__mmask16)(s->masks[r.step] >> half * LANES);
            __m512i v = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)r.values));
            __m512i places = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)r.places));
            places = _mm512_maskz_expand_epi32(mask, places);
            v = _mm512_slli_epi32(_mm512_maskz_expand_epi32(mask, v), 16);
            for (int n = 0; n < rows; n++) {
                const bf16 *in = x + n * stride;
                __m512i u = _mm512_permutex2var_epi16(_mm512_loadu_si512(in), places,
                                                      _mm512_loadu_si512(in + BLOCK / 2));
                /* Empty slots need 0 too, because their inputs must not count. */
                u = _mm512_maskz_slli_epi32(mask, u, 16);
                found[n][half] = _mm512_fmadd_ps((__m512)u, (__m512)v, found[n][half]);
            }
            r.values += __builtin_popcount(mask);
            r.places += __builtin_popcount(mask);
        }
    }
    for (int n = 0; n < rows; n++)
        for (int half = 0; half < 2; half++) _mm512_storeu_ps(sums + n * SLOTS + half * LANES, found[n][half]);
}
#else
INLINE void sum_slots(const Sparse *s, const bf16 *x, int64_t stride, const int rows, int64_t group,
                      float *sums) {
    memset(sums, 0, rows * SLOTS * sizeof *sums);
    for (Reader r = read_group(s, group); r.step < r.end; r.step++) {
        x += s->skips[r.step] * BLOCK;
        ask_ahead(&r);
        for (uint32_t left = s->masks[r.step]; left; left &= left - 1, r.values++, r.places++)
            for (int n = 0; n < rows; n++)
                sums[n * SLOTS + __builtin_ctz(left)] += to_f32(x[n * stride + *r.places]) * to_f32(*r.values);
    }
}
#endif

/* Adds w times the outputs [low, low + count) of some rows to acc. */
INLINE void add_rows(const Sparse *s, const bf16 *x, int64_t stride, const int rows, float w, int64_t low,
                     int64_t count, float *acc) {
    for (int64_t i = 0; i < count; i += LANES) {
        float sums[TOGETHER * SLOTS];
        sum_slots(s, x, stride, rows, (low + i) / LANES, sums);
        for (int n = 0; n < rows; n++)
            for (int64_t lane = 0; lane < least(count - i, LANES); lane++)
                acc[n * COLUMNS + s->outputs[low + i + lane]] +=
                    w * (sums[n * SLOTS + lane] + sums[n * SLOTS + LANES + lane]);
    }
}

/* Dispatches on the number of rows, which must be constant so that the sums stay in registers. */
#define CASE(rows) \
    case rows: add_rows(s, x, stride, rows, w, low, count, acc); break

KERNEL void sparse_expand(const Sparse *s, const Rows *rows, float w, int64_t in_features, int64_t low,
                          int64_t count) {
    int64_t stride = (in_features + BLOCK - 1) / BLOCK * BLOCK;
    bf16 x[least(rows->count, TOGETHER) * stride] __attribute__((aligned(64)));
    for (int64_t i = 0, here; i < rows->count; i += here) {
        float *acc = rows->acc + i * COLUMNS;
        here = least(rows->count - i, TOGETHER);
        for (int64_t n = 0; n < here; n++) {
            memcpy(x + n * stride, rows->x + (i + n) * rows->x_stride, in_features * sizeof *x);
            memset(x + n * stride + in_features, 0, (stride - in_features) * sizeof *x);
        }
        switch (here) { CASE(1); CASE(2); CASE(3); CASE(4); CASE(5); CASE(6); CASE(7); CASE(8); }
    }
}
