/* The threads that share a kernel's work.
 *
 * Work comes in pieces, and each thread claims them: its own share first, so that a thread reads the
 * same weights in every call, then what others have not begun. A thread that the system has put aside
 * holds up no more than the piece it was in. Which thread computes a piece changes no bit.
 */
#ifndef TURRET_TEAM_H
#define TURRET_TEAM_H

#include <stdint.h>

#define MOST_THREADS 256
/* Pieces of work for each thread: few enough to be worth claiming, enough to be shared out again. */
#define PIECES_EACH 4
/* Number of elements, or products, below which one thread is faster than two. */
#define SMALL 16384

/* `thread` is below the number of threads; no two calls with the same number run at once. */
typedef void Work(const void *job, int64_t thread, int64_t piece);

/* work(job, thread, piece) for every piece below `pieces`; returns when all are done. What the caller
 * wrote before is seen by all threads, and what they wrote by the caller after. */
void in_pieces(Work *work, const void *job, int64_t pieces, int64_t threads);

#endif
