/* Vectors of sixteen fp32 lanes, conversions from and to bf16, and a vectorised exp.
 *
 * GCC's vector types compile to the registers of the target (one of AVX-512, two of AVX2, four of SSE or
 * NEON), and the code fixes the order of every sum. Nothing here depends on how many rows a call has, so
 * a row has the same bits in any batch.
 */
#ifndef TURRET_VEC_H
#define TURRET_VEC_H

#include <stdint.h>
#include <string.h>

#define LANES 16
#define INLINE static inline __attribute__((always_inline))
/* A kernel is compiled once and not into each of its callers, whose copies might round differently (isas.py). */
#define KERNEL __attribute__((noinline))

/* The library is compiled once per instruction set (setup.py), and the best one that the processor
 * supports is loaded. Products of bf16 pairs use VDPBF16PS where the instruction set has it. */
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
#define HAS_AVX512_BF16 1
#else
#define HAS_AVX512_BF16 0
#endif
#define EXPORT __attribute__((visibility("default")))

/* There are vectors of two lengths. f32x16 and the types that follow it have LANES lanes on every processor. fvec
 * and the types that follow it have WIDTH lanes, which fill one register; PARTS of them have LANES lanes together.
 * If a register is shorter than LANES, GCC keeps an f32x16 in memory, so that each operation loads and stores it.
 * Loops that are limited by arithmetic therefore use fvec. */
typedef float f32x16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t u32x16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t i32x16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t u16x16 __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint8_t u8x16 __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint16_t bf16;

#if defined(__AVX512F__)
#include <immintrin.h>
#define WIDTH 16
#elif defined(__AVX2__)
#include <immintrin.h>
#define WIDTH 8
#else
#define WIDTH 4
#endif
#define PARTS (LANES / WIDTH)

typedef float fvec __attribute__((vector_size(4 * WIDTH), may_alias));
typedef float fvec_at __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias)); /* at the address of any float */
typedef int32_t ivec __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef uint32_t uvec __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef uint16_t hvec __attribute__((vector_size(2 * WIDTH), aligned(2), may_alias));

/* Comparisons by lanes: all bits of a lane are set, or none. GCC 12 compares a vector of several registers lane by
 * lane in scalar code. */
#define COMPARISON(name, OP)                                                                \
    INLINE i32x16 name(f32x16 a, f32x16 b) {                                                \
        i32x16 found;                                                                       \
        for (int p = 0; p < PARTS; p++)                                                     \
            ((ivec *)&found)[p] = (ivec)(((const fvec_at *)&a)[p] OP((const fvec_at *)&b)[p]);    \
        return found;                                                                       \
    }
COMPARISON(are_less, <)
COMPARISON(are_at_most, <=)
COMPARISON(differ, !=)

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE float to_f32(bf16 value) {
    uint32_t bits = (uint32_t)value << 16;
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}

/* Rounds to nearest, ties to even; NaN stays NaN, as in torch's own conversion. */
INLINE bf16 to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value) return 0x7fc0;
    return (bf16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

INLINE void store_bf16(bf16 *p, f32x16 value) {
#if HAS_AVX512_BF16
    /* This instruction replaces subnormal numbers by 0, and keeps the bits of a NaN. The code below handles both. */
    if (!_mm512_fpclass_ps_mask((__m512)value, 0xa1)) {
        *(__m256i_u *)p = (__m256i)_mm512_cvtneps_pbh((__m512)value);
        return;
    }
#endif
    u32x16 bits = (u32x16)value;
    u32x16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    u32x16 is_nan = (u32x16)differ(value, value);
    rounded = (is_nan & 0x7fc0u) | (~is_nan & rounded);
    *(u16x16 *)p = __builtin_convertvector(rounded, u16x16);
}

INLINE fvec fvec_f32(const float *p) { return *(const fvec_at *)p; }

/* s + a b, rounded only once where the instruction set has fused multiply-adds. */
INLINE fvec add_product(fvec s, fvec a, fvec b) {
#if WIDTH == 16
    return (fvec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)s);
#elif WIDTH == 8
    return (fvec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)s);
#else
    return s + a * b;
#endif
}

INLINE uvec widened(const uint16_t *p) {
#if WIDTH == 16 /* for __builtin_convertvector, GCC 12 generates two half-wide conversions */
    return (uvec)_mm512_cvtepu16_epi32(*(const __m256i_u *)p);
#elif WIDTH == 8
    return (uvec)_mm256_cvtepu16_epi32(*(const __m128i_u *)p);
#else
    return __builtin_convertvector(*(const hvec *)p, uvec);
#endif
}

INLINE fvec fvec_bf16(const bf16 *p) { return (fvec)(widened(p) << 16); }

INLINE f32x16 load_bf16(const bf16 *p) {
    f32x16 all;
    for (int i = 0; i < PARTS; i++) ((fvec_at *)&all)[i] = fvec_bf16(p + i * WIDTH);
    return all;
}

INLINE f32x16 load_f32(const float *p) { return *(const f32x16 *)p; }
INLINE void store_f32(float *p, f32x16 value) { *(f32x16 *)p = value; }
INLINE f32x16 splat(float value) { return value - (f32x16){0}; }

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define HALF(v, i0, i1, i2, i3, i4, i5, i6, i7) \
    __builtin_shufflevector(v, v, i0, i1, i2, i3, i4, i5, i6, i7, 0, 1, 2, 3, 4, 5, 6, 7)
#endif
#endif
#ifndef HALF
#define HALF(v, i0, i1, i2, i3, i4, i5, i6, i7) \
    __builtin_shuffle(v, (i32x16){i0, i1, i2, i3, i4, i5, i6, i7, 0, 1, 2, 3, 4, 5, 6, 7})
#endif

/* The sum of the lanes: adds the upper half to the lower half, four times. */
INLINE float sum_lanes(f32x16 v) {
    v += HALF(v, 8, 9, 10, 11, 12, 13, 14, 15);
    v += HALF(v, 4, 5, 6, 7, 4, 5, 6, 7);
    v += HALF(v, 2, 3, 2, 3, 2, 3, 2, 3);
    return v[0] + v[1];
}

#if defined(HALF) && defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#ifndef PICK
#define PICK(a, b, ...) __builtin_shuffle(a, b, (__typeof__(a < b)){__VA_ARGS__})
#endif

/* FIRST_* interleaves the first, third, .. groups of lanes of a and b, and SECOND_* the second, fourth, .. groups. A
 * group has one, two, four or eight lanes. */
#if WIDTH == 16
#define FIRST_LANES(a, b) PICK(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30)
#define SECOND_LANES(a, b) PICK(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31)
#define FIRST_PAIRS(a, b) PICK(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define SECOND_PAIRS(a, b) PICK(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#define FIRST_FOURS(a, b) PICK(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27)
#define SECOND_FOURS(a, b) PICK(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31)
#define FIRST_EIGHTS(a, b) PICK(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
#define SECOND_EIGHTS(a, b) PICK(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31)
#elif WIDTH == 8
#define FIRST_LANES(a, b) PICK(a, b, 0, 8, 2, 10, 4, 12, 6, 14)
#define SECOND_LANES(a, b) PICK(a, b, 1, 9, 3, 11, 5, 13, 7, 15)
#define FIRST_PAIRS(a, b) PICK(a, b, 0, 1, 8, 9, 4, 5, 12, 13)
#define SECOND_PAIRS(a, b) PICK(a, b, 2, 3, 10, 11, 6, 7, 14, 15)
#define FIRST_FOURS(a, b) PICK(a, b, 0, 1, 2, 3, 8, 9, 10, 11)
#define SECOND_FOURS(a, b) PICK(a, b, 4, 5, 6, 7, 12, 13, 14, 15)
#else
#define FIRST_LANES(a, b) PICK(a, b, 0, 4, 2, 6)
#define SECOND_LANES(a, b) PICK(a, b, 1, 5, 3, 7)
#define FIRST_PAIRS(a, b) PICK(a, b, 0, 1, 4, 5)
#define SECOND_PAIRS(a, b) PICK(a, b, 2, 3, 6, 7)
#endif

/* Lane i of the result is the sum of the lanes of v[i]: neighbours are added until one is left. Each addition
 * joins two registers into one. */
INLINE f32x16 sum_each(const f32x16 v[LANES]) {
    fvec s[PARTS][LANES];
    for (int p = 0; p < PARTS; p++)
        for (int i = 0; i < LANES; i++) s[p][i] = ((const fvec_at *)&v[i])[p];
#define JOIN(GROUPS, COUNT)             \
    for (int p = 0; p < PARTS; p++)     \
        for (int i = 0; i < COUNT; i++) \
            s[p][i] = FIRST_##GROUPS(s[p][2 * i], s[p][2 * i + 1]) + SECOND_##GROUPS(s[p][2 * i], s[p][2 * i + 1]);
    JOIN(LANES, 8)
    JOIN(PAIRS, 4)
#if WIDTH > 4
    JOIN(FOURS, 2)
#endif
#if WIDTH > 8
    JOIN(EIGHTS, 1)
#endif
#undef JOIN
    for (int n = PARTS / 2; n; n /= 2)
        for (int p = 0; p < n; p++)
            for (int i = 0; i < PARTS; i++) s[p][i] = s[2 * p][i] + s[2 * p + 1][i];
    f32x16 sums;
    for (int i = 0; i < PARTS; i++) ((fvec_at *)&sums)[i] = s[0][i];
    return sums;
}

/* Transposes: lane j of vector i becomes lane i of vector j. */
INLINE void transpose(fvec v[WIDTH]) {
#define EXCHANGE(GROUPS, SIZE)                    \
    for (int i = 0; i < WIDTH; i++)               \
        if (!(i & SIZE)) {                        \
            fvec a = v[i], b = v[i + SIZE];       \
            v[i] = FIRST_##GROUPS(a, b);          \
            v[i + SIZE] = SECOND_##GROUPS(a, b);  \
        }
#if WIDTH > 8
    EXCHANGE(EIGHTS, 8)
#endif
#if WIDTH > 4
    EXCHANGE(FOURS, 4)
#endif
    EXCHANGE(PAIRS, 2)
    EXCHANGE(LANES, 1)
#undef EXCHANGE
}

/* The larger of each pair of lanes; b if one is NaN. */
INLINE f32x16 max_vec(f32x16 a, f32x16 b) {
#if WIDTH == 16 /* GCC 12 does not find this instruction */
    return (f32x16)_mm512_max_ps((__m512)a, (__m512)b);
#else
    i32x16 larger = are_less(b, a);
    return (f32x16)((larger & (i32x16)a) | (~larger & (i32x16)b));
#endif
}

/* e^x with a relative error under 2 ulp for x in [-87, 88]; smaller x give 0, larger ones e^88, and NaN e^-87. Cody
 * and Waite's reduction to |r| <= ln(2)/2, then a polynomial of degree 6. */
INLINE f32x16 exp_vec(f32x16 x) {
    i32x16 tiny = are_less(x, splat(-87.0f));
    x = -max_vec(-max_vec(x, splat(-87.0f)), splat(-88.0f));
    f32x16 shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: rounds to an integer */
    f32x16 n = shifted - 12582912.0f;
    f32x16 r = x - n * 0.693359375f + n * 2.12194440e-4f;
    f32x16 p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    i32x16 power = (__builtin_convertvector(n, i32x16) + 127) << 23;
    i32x16 result = (i32x16)(p * (f32x16)power);
    return (f32x16)(result & ~tiny);
}

/* tanh with an absolute error under 2e-7. */
INLINE f32x16 tanh_vec(f32x16 x) { return 1.0f - 2.0f / (exp_vec(2.0f * x) + 1.0f); }

#endif
