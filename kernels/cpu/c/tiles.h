/* AMX: eight tiles of at most 16 rows of 64 bytes, and products of tiles in bf16.
 *
 * A product adds 32 terms to each element of C, which is 16 by 16 in fp32: the sum of the 16 terms of even
 * inputs, one after the other from zero, plus that of odd inputs. So the result for one element never depends
 * on the other elements, nor on how many there are. Subnormal numbers count as zero.
 *
 * With TILES_EMULATED, plain C computes the same, for tests on other processors.
 */
#ifndef TURRET_TILES_H
#define TURRET_TILES_H

#include "vec.h"

#if defined(__AMX_BF16__) || defined(TILES_EMULATED)
#define HAS_TILES 1
#define TILE_ROWS 16
#define TILE_BYTES 64
#define TILE_INPUTS 32 /* bf16 inputs in a row of a tile */

/* The configuration that LDTILECFG reads. */
typedef struct {
    uint8_t palette, start, zero[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileShapes;

/* All tiles have the full shape, except that the first `few` have only `rows` rows. */
INLINE TileShapes tile_shapes(int few, int64_t rows) {
    TileShapes shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shapes.row_bytes[i] = TILE_BYTES;
        shapes.rows[i] = (uint8_t)(i < few ? rows : TILE_ROWS);
    }
    return shapes;
}

#ifdef TILES_EMULATED
#include "emulated_tiles.h"
#else
/* Macros, because the number of a tile is part of the instruction. */
#define tiles_begin(shapes) _tile_loadconfig(shapes)
#define tiles_end() _tile_release()
#define tile_zero(c) _tile_zero(c)
#define tile_load(tile, from, stride) _tile_loadd(tile, from, stride)
#define tile_store(tile, to, stride) _tile_stored(tile, to, stride)
#define tile_add_product(c, a, b) _tile_dpbf16ps(c, a, b)
#endif

#else
#define HAS_TILES 0
#endif
#endif
