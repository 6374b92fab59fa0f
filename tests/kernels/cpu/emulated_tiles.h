/* tiles.h in plain C, in the order of Intel's manual (TDPBF16PS): within a product the 16 terms of even
 * inputs, one after the other from zero, plus those of odd inputs. Subnormal numbers are not made zero,
 * of which the checks' numbers have none. What was not loaded since tiles_begin is NaN.
 */
#include <math.h>

static __thread float emulated[8][TILE_ROWS * LANES];
static __thread TileShapes emulated_shapes;

INLINE void tiles_begin(const TileShapes *shapes) {
    emulated_shapes = *shapes;
    for (int i = 0; i < 8 * TILE_ROWS * LANES; i++) emulated[0][i] = NAN;
}
INLINE void tiles_end(void) { memset(&emulated_shapes, 0, sizeof emulated_shapes); }

INLINE void tile_zero(int tile) { memset(emulated[tile], 0, sizeof emulated[tile]); }

INLINE void tile_load(int tile, const void *from, int64_t stride) {
    for (int64_t r = 0; r < emulated_shapes.rows[tile]; r++)
        memcpy(emulated[tile] + r * LANES, (const char *)from + r * stride, TILE_BYTES);
}

INLINE void tile_store(int tile, void *to, int64_t stride) {
    for (int64_t r = 0; r < emulated_shapes.rows[tile]; r++)
        memcpy((char *)to + r * stride, emulated[tile] + r * LANES, TILE_BYTES);
}

INLINE void tile_add_product(int sum, int left, int right) {
    const bf16 *a = (const bf16 *)emulated[left], *b = (const bf16 *)emulated[right];
    for (int64_t m = 0; m < emulated_shapes.rows[sum]; m++)
        for (int64_t n = 0; n < LANES; n++) {
            float even = 0, odd = 0;
            for (int64_t k = 0; k < TILE_ROWS; k++) {
                const bf16 *x = a + m * TILE_INPUTS + 2 * k, *w = b + k * TILE_INPUTS + 2 * n;
                even = fmaf(to_f32(x[0]), to_f32(w[0]), even);
                odd = fmaf(to_f32(x[1]), to_f32(w[1]), odd);
            }
            emulated[sum][m * LANES + n] += even + odd;
        }
}
