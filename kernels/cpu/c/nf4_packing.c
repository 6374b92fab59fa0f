/* Packs NF4 codes into the layout that nf4_product.c reads. */
#include "team.h"
#include "vec.h"

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
