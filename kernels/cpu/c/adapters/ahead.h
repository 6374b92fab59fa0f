/* Finds the memory that a step's adapters read next, so that a kernel that leaves the memory idle can prefetch it.
 *
 * The low-rank factors are prefetched in the order in which the layers read them: by module, segment and
 * component, A before B. Every thread has its own mark, and prefetches the ranks that it will read itself,
 * because data in another core's cache is of little use. (turret_adapt divides its work in the same order.) A
 * thread goes at most `reach` modules ahead, because data that arrives too early leaves the cache before it is
 * used. With tiles `reach` is 0: the base's product then keeps the memory busy, as it does with few rows.
 */
#ifndef TURRET_AHEAD_H
#define TURRET_AHEAD_H

#include "adapters.h"

#define LINE 64
#define LEAST_ROWS 6 /* products with fewer rows keep the memory busy */

typedef struct {
    const char *start;
    int64_t count;
} Lines;

typedef struct {
    const Step *step; /* null: nothing to prefetch */
    Mark mark;
    int64_t end; /* first module out of reach */
    int64_t part, parts;
    Lines left;  /* of the factor */
    int is_done; /* whether nothing within reach is left */
} Walk;

INLINE Walk begin_ahead(const Step *step, int64_t module, int64_t part, int64_t parts) {
    Walk walk = {0};
    if (!step || !step->num_segments || part >= step->num_threads) return walk;
    walk.step = step;
    walk.mark = step->marks[part];
    walk.part = part;
    walk.parts = parts;
    walk.end = module + step->reach < step->num_modules ? module + step->reach : step->num_modules;
    if (walk.mark.module < module) walk.mark = (Mark){.module = module};
    return walk;
}

INLINE void end_ahead(const Walk *walk) {
    if (walk->step) walk->step->marks[walk->part] = walk->mark;
}

INLINE const Module *module_at(const Step *step, const Mark *mark) {
    const Segment *seg = &step->segments[mark->segment];
    int64_t component = seg->first + mark->component;
    return component < seg->last ? &step->components[component].modules[mark->module] : 0;
}

/* Moves to the next factor. */
INLINE void move_on(const Step *step, Mark *mark) {
    const Module *m = module_at(step, mark);
    const Segment *seg = &step->segments[mark->segment];
    mark->done = 0;
    if (m && m->rank && ++mark->factor < 2) return;
    mark->factor = 0;
    if (m) mark->ranks += m->rank;
    if (++mark->component < seg->last - seg->first) return;
    mark->component = 0;
    if (++mark->segment < step->num_segments) return;
    *mark = (Mark){.module = mark->module + 1};
}

INLINE int64_t all_ranks(const Step *step, int64_t module) {
    int64_t ranks = 0;
    for (int64_t s = 0; s < step->num_segments; s++)
        for (int64_t k = step->segments[s].first; k < step->segments[s].last; k++)
            ranks += step->components[k].modules[module].rank;
    return ranks;
}

/* Prefetches the fields that find_lines will read of an adapter's next module, because the product would wait for
 * them. */
INLINE void ask_for_entry(const Module *m) {
    __builtin_prefetch(&m->a);
    __builtin_prefetch(&m->rank);
}

/* Finds the next factor of which lines are left. A thread prefetches only its own share of the ranks. If the ranks
 * of all of the module's components are numbered from 0 to R - 1, the share of thread `part` of `parts` is
 *
 *     [R part / parts, R (part + 1) / parts)
 *
 * R is mark->all_ranks, and the ranks of this component begin at number mark->ranks. */
__attribute__((unused, noinline)) static void find_lines(Walk *walk) {
    const Step *step = walk->step;
    for (Mark *mark = &walk->mark; mark->module < walk->end; move_on(step, mark)) {
        const Module *m = module_at(step, mark);
        if (m && !mark->factor) ask_for_entry(m + 1);
        if (!m || !m->rank || !(mark->factor ? m->b : m->a)) continue;
        if (!mark->all_ranks) mark->all_ranks = all_ranks(step, mark->module);
        int64_t low = mark->all_ranks * walk->part / walk->parts - mark->ranks;
        int64_t high = mark->all_ranks * (walk->part + 1) / walk->parts - mark->ranks;
        low = low < 0 ? 0 : low;
        high = high < m->rank ? high : m->rank;
        const ModuleSize *size = &step->sizes[mark->module % step->modules_per_layer];
        int64_t width = mark->factor ? size->out_features : size->in_features;
        int64_t left = ((high - low) * width * (int64_t)sizeof(bf16) + LINE - 1) / LINE - mark->done;
        if (high <= low || left <= 0) continue;
        const char *start = (const char *)((mark->factor ? m->b : m->a) + low * width);
        walk->left = (Lines){start + LINE * mark->done, left};
        return;
    }
    walk->is_done = 1;
}

/* Returns the next lines to prefetch, at most `most`. */
INLINE Lines next_lines(Walk *walk, int64_t rows, int64_t most) {
    if (!walk->step || rows < LEAST_ROWS) return (Lines){0};
    if (!walk->left.count && !walk->is_done) find_lines(walk);
    Lines lines = {walk->left.start, least(walk->left.count, most)};
    walk->left.start += LINE * lines.count;
    walk->left.count -= lines.count;
    walk->mark.done += lines.count;
    return lines;
}

#endif
