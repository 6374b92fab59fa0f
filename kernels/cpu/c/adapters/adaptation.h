/* A fused projection's adapters at work: shrink, then expand. Shrink reads the input alone, unless outputs
 * are added to their partners (pairs.c), so that it may be computed beside the base's product.
 */
#ifndef TURRET_ADAPTATION_H
#define TURRET_ADAPTATION_H

#include "adapters.h"

typedef struct {
    const bf16 *x;
    bf16 *y;
    const bf16 *bias; /* the base's, [sum of widths], or null */
    int64_t x_stride, y_stride;
    const int64_t *widths;
    int64_t in_features, num_slices;
    int64_t module; /* index of the first slice's module */
} Projection;

/* A thread's share of a pass: units that begin in [low, high) on the axis of summed costs. The first
 * walk over the units, with high 0, finds the sum. */
typedef struct {
    int64_t low, high, at;
} Share;

typedef struct {
    const Step *step;
    Projection projection;
    Share shrinking, expanding; /* whole passes */
    int64_t pieces;             /* of either; may be set to another number */
} Adaptation;

/* `shape` is that of turret_adapt. */
Adaptation begin_adaptation(const Step *step, const int64_t *shape, const bf16 *x, int64_t x_stride,
                            bf16 *y, int64_t y_stride, const bf16 *bias);
int shrinks_before_product(const Adaptation *a);
/* Work of an Adaptation's pieces (team.h). */
void shrink_piece(const void *job, int64_t thread, int64_t piece);
/* Once y holds the base's product and all is shrunk. */
void expand_all(const Adaptation *a);

#endif
