/* The threads that share a kernel's work.
 *
 * Work is divided into pieces, which the threads claim. A thread claims its own share first, so that it
 * reads the same weights in every call, and then pieces that others have not begun. If the system suspends
 * a thread, only the piece that it was computing is delayed, or computed again by the caller if it is repeatable.
 * Results do not depend on which thread computes a piece.
 */
#ifndef TURRET_TEAM_H
#define TURRET_TEAM_H

#include <stdint.h>

#define MOST_THREADS 256
/* Pieces of work per thread: few enough that claiming costs little, but enough that other threads can take
 * over a part of a share. */
#define PIECES_EACH 4
/* Number of elements, or of multiplications, below which one thread is faster than two. */
#define SMALL 16384

/* `thread` is below the number of threads; no two calls of a job with the same `thread` run at once. */
typedef void Work(const void *job, int64_t thread, int64_t piece);

/* Calls work(job, thread, piece) for every piece below `pieces`, and returns when all are done. All threads
 * see the caller's earlier writes, and the caller sees their writes afterwards. */
void in_pieces(Work *work, const void *job, int64_t pieces, int64_t threads);

/* The same for pieces that may be stopped anywhere and computed again by another thread. Such a piece changes nothing
 * that affects its result, keeps nothing in variables of its thread, and calls nothing that is unsafe to abandon
 * halfway, such as a lock or malloc. */
void in_repeatable_pieces(Work *work, const void *job, int64_t pieces, int64_t threads);

#endif
