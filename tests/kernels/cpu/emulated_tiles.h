/* The operations of tiles.h in plain C, in the order of Intel's manual (TDPBF16PS): a product is the sum of the
 * 16 terms of even inputs, one after the other from zero, plus that of odd inputs. Subnormal numbers count as
 * zero. A tile that has not been loaded since tiles_begin is NaN.
 */
#include <math.h>

static __thread float emulated[8][TILE_ROWS * LANES];
static __thread TileShapes emulated_shapes;

INLINE void tiles_begin(const TileShapes *shapes) {
    emulated_shapes = *shapes;
    for (int i = 0; i < 8 * TILE_ROWS * LANES; i++) emulated[i / (TILE_ROWS * LANES)][i % (TILE_ROWS * LANES)] = NAN;
}
INLINE void tiles_end(void) { memset(&emulated_shapes, 0, sizeof emulated_shapes); }

INLINE void tile_zero(int tile) { memset(emulated[tile], 0, sizeof emulated[tile]); }

INLINE void tile_load(int tile, const void *from, int64_t stride) {
    for (int64_t r = 0; r < emulated_shapes.rows[tile]; r++)
        memcpy(emulated[tile] + r * LANES, (const char *)from + r * stride, emulated_shapes.row_bytes[tile]);
}

INLINE void tile_store(int tile, void *to, int64_t stride) {
    for (int64_t r = 0; r < emulated_shapes.rows[tile]; r++)
        memcpy((char *)to + r * stride, emulated[tile] + r * LANES, emulated_shapes.row_bytes[tile]);
}

/* This is a separate function, so that the compiler does not move its computations to where subnormal
 * numbers are not zero. */
KERNEL static void emulate_product(int sum, int left, int right) {
    const bf16 *a = (const bf16 *)emulated[left], *b = (const bf16 *)emulated[right];
    for (int64_t m = 0; m < emulated_shapes.rows[sum]; m++)
        for (int64_t n = 0; n < emulated_shapes.row_bytes[sum] / (int64_t)sizeof(float); n++) {
            float even = 0, odd = 0;
            for (int64_t k = 0; k < emulated_shapes.rows[right]; k++) {
                const bf16 *x = a + m * TILE_INPUTS + 2 * k, *w = b + k * TILE_INPUTS + 2 * n;
                even = fmaf(to_f32(x[0]), to_f32(w[0]), even);
                odd = fmaf(to_f32(x[1]), to_f32(w[1]), odd);
            }
            emulated[sum][m * LANES + n] += even + odd;
        }
}

INLINE void tile_add_product(int sum, int left, int right) {
    unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
    emulate_product(sum, left, right);
    _mm_setcsr(before);
}
