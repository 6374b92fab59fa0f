/* Quantises numbers to NF4 codes, and packs codes into the layout that nf4_product.c reads. */
#include "team.h"
#include "vec.h"

#define BLOCK 64 /* numbers that share an absmax */
#define MIDPOINTS 15
#define TILE_OUT 32 /* outputs of a tile of codes */
#define AT_ONCE 128 /* pairs of inputs of a tile whose bytes stay in the cache while they are written */

typedef struct {
    const uint8_t *codes; /* [out, in / 2], the earlier input in the high bits */
    uint8_t *packed;      /* [out / 32, in / 2, 32] */
    int64_t pairs;
} Codes;

/* Outputs i and i + 16 share bytes 2 i and 2 i + 1 of each pair of inputs: one for each input. */
static void pack_tile(const void *job, int64_t thread, int64_t tile) {
    const Codes *c = job;
    const uint8_t *codes = c->codes + tile * TILE_OUT * c->pairs;
    uint8_t *packed = c->packed + tile * TILE_OUT * c->pairs;
    (void)thread;
    for (int64_t start = 0; start < c->pairs; start += AT_ONCE) {
        int64_t end = start + AT_ONCE < c->pairs ? start + AT_ONCE : c->pairs;
        for (int64_t row = 0; row < TILE_OUT / 2; row++) {
            const uint8_t *low = codes + row * c->pairs, *high = low + TILE_OUT / 2 * c->pairs;
            uint8_t *to = packed + 2 * row;
            for (int64_t k = start; k < end; k++) {
                to[k * TILE_OUT] = (uint8_t)((high[k] & 0xf0) | low[k] >> 4);
                to[k * TILE_OUT + 1] = (uint8_t)(high[k] << 4 | (low[k] & 0x0f));
            }
        }
    }
}

EXPORT void turret_nf4_pack(const uint8_t *codes, uint8_t *packed, int64_t out_features,
                            int64_t in_features, int64_t num_threads) {
    Codes job = {codes, packed, in_features / 2};
    in_pieces(pack_tile, &job, out_features / TILE_OUT, num_threads);
}

typedef struct {
    const float *x;
    const float *midpoints; /* between neighbouring values of NF4 */
    uint8_t *codes;         /* two a byte, the earlier number in the high bits */
    float *absmax;
    int64_t blocks, pieces;
} Numbers;

/* The code of a number relative to its block's absmax is the number of midpoints below it. NaN gets the last code,
 * and a block with NaN has the absmax NaN. */
KERNEL static void quantize_piece(const void *job, int64_t thread, int64_t piece) {
    const Numbers *n = job;
    (void)thread;
    for (int64_t b = n->blocks * piece / n->pieces; b < n->blocks * (piece + 1) / n->pieces; b++) {
        const float *x = n->x + b * BLOCK;
        uint32_t magnitudes[BLOCK], top = 0; /* the bits of magnitudes are ordered like the numbers */
        memcpy(magnitudes, x, sizeof magnitudes);
        for (int i = 0; i < BLOCK; i++) {
            uint32_t magnitude = magnitudes[i] & 0x7fffffffu;
            top = magnitude > top ? magnitude : top;
        }
        memcpy(n->absmax + b, &top, sizeof top);
        float absmax = n->absmax[b], scale = 1.0f / (absmax < 1e-38f ? 1e-38f : absmax);
        for (int i = 0; i < BLOCK; i += LANES) {
            f32x16 scaled = load_f32(x + i) * scale;
            i32x16 found = (i32x16){0} + MIDPOINTS;
            for (int m = 0; m < MIDPOINTS; m++) found += are_at_most(scaled, splat(n->midpoints[m]));
            uint8_t *codes = n->codes + (b * BLOCK + i) / 2;
            for (int k = 0; k < LANES / 2; k++) codes[k] = (uint8_t)(found[2 * k] << 4 | found[2 * k + 1]);
        }
    }
}

/* Computes the same codes and maxima as bitsandbytes. */
EXPORT void turret_nf4_quantize(const float *x, const float *midpoints, uint8_t *codes, float *absmax,
                                int64_t blocks, int64_t num_threads) {
    Numbers job = {x, midpoints, codes, absmax, blocks, least(blocks, num_threads * PIECES_EACH)};
    in_pieces(quantize_piece, &job, job.pieces, num_threads);
}
