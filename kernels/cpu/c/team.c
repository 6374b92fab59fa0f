/* Runs kernels on the library's own threads, or on OpenMP's, which torch uses too.
 *
 * OpenMP divides the work once and waits at a barrier for every thread. A decode step has some 250 barriers.
 * If another process takes one of the processors, each barrier waits for the missing thread, for
 * milliseconds each time. The library's own threads avoid this, because others claim the missing thread's pieces.
 * They must not be used while another library's threads are working: two teams that spin while they wait take
 * the processors from each other.
 */
#define _GNU_SOURCE
#include "team.h"

#include "vec.h"

#include <omp.h>
#include <stdatomic.h>

/* A thread's share of the pieces, [next, end). `next` combines the numbers of the job and of the next piece, so that
 * a late thread cannot claim pieces of a job that it does not know. */
typedef struct {
    _Alignas(64) _Atomic uint64_t next;
    _Atomic uint64_t end;
} Share;

#define PIECE_BITS 32
#define PIECE(next) ((next) & ((1ull << PIECE_BITS) - 1))

static void deal(Share *shares, uint64_t number, int64_t pieces, int64_t threads) {
    for (int64_t t = 0; t < threads; t++) {
        uint64_t start = number << PIECE_BITS, end = (uint64_t)(pieces * (t + 1) / threads);
        /* Empty the share before changing its end. Otherwise, a thread that is still in an earlier job could
         * find its old `next` below the new end, and claim a piece. */
        atomic_store_explicit(&shares[t].next, PIECE(start - 1) | start, memory_order_relaxed);
        atomic_store_explicit(&shares[t].end, end, memory_order_release);
        atomic_store_explicit(&shares[t].next, start | (uint64_t)(pieces * t / threads),
                              memory_order_release);
    }
}

/* Claims the next piece of a share; returns -1 if there is none. */
static int64_t claim(Share *share, uint64_t number) {
    uint64_t next = atomic_load_explicit(&share->next, memory_order_acquire);
    uint64_t end = atomic_load_explicit(&share->end, memory_order_acquire);
    while (next >> PIECE_BITS == number && PIECE(next) < end)
        if (atomic_compare_exchange_weak_explicit(&share->next, &next, next + 1,
                                                  memory_order_acq_rel, memory_order_acquire))
            return (int64_t)PIECE(next);
    return -1;
}

/* Computes pieces until none is left, beginning with the thread's own share. Returns their number. */
static int64_t compute(Share *shares, uint64_t number, int64_t threads, Work *work, const void *job,
                       int64_t thread) {
    int64_t done = 0;
    for (int64_t i = 0; i < threads; i++) {
        Share *share = &shares[(thread + i) % threads];
        for (int64_t piece; (piece = claim(share, number)) >= 0; done++) work(job, thread, piece);
    }
    return done;
}

static void in_pieces_openmp(Work *work, const void *job, int64_t pieces, int64_t threads) {
    Share shares[MOST_THREADS];
    deal(shares, 0, pieces, threads);
#pragma omp parallel num_threads((int)threads)
    compute(shares, 0, threads, work, job, omp_get_thread_num());
}

#ifdef __linux__
#include <linux/futex.h>
#include <linux/membarrier.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* Nanoseconds for which a thread spins before it sleeps: alone, and alongside another process. A step's kernels
 * follow each other within some 30 microseconds. If another process wants the processor, a thread that spins
 * longer loses it for longer. */
#define SPIN_ALONE 300000
#define SPIN_BESIDE 30000
/* A pause of this many nanoseconds in a loop that never waits means that the system suspended the thread. */
#define PUT_ASIDE 400000
/* Nanoseconds for which the processors count as shared after such a pause. */
#define STAYS_SHARED 200000000
/* Nanoseconds for which the caller spins while the last pieces are computed, before it takes over a piece or
 * sleeps. */
#define SPIN_END 50000
/* The longest sleep, in nanoseconds, if the caller may take over a piece later. */
#define SLEEP_END 500000

/* A worker, and the repeatable piece that it is computing.
 *
 * The caller takes a piece from a worker that the system has suspended, and computes it again. The worker must
 * not go on with the piece when it runs again: the memory that it would write may have another use by then. So
 * the caller sends the worker a signal, whose handler abandons the piece. When a suspended thread runs again, it
 * handles its signals before it does anything else. If the worker is already running again, the system call
 * membarrier interrupts it, so that it handles the signal before the caller begins the piece. */
typedef struct {
    _Alignas(64) _Atomic uint64_t held; /* the piece and its job, as in Share.next; or NOTHING; or TAKEN */
    _Atomic int64_t done; /* pieces of this job that are finished but not reported */
    volatile sig_atomic_t can_leave;
    sigjmp_buf before;
    pid_t id;
    clockid_t clock; /* shows the processor time that the worker has used */
} Worker;

#define NOTHING 0
#define TAKEN UINT64_MAX

static struct {
    Share shares[MOST_THREADS];
    _Atomic uint32_t number; /* number of the job; workers sleep on it */
    _Atomic uint32_t done;   /* pieces done; the caller sleeps on it */
    _Atomic uint32_t sleepers, is_caller_asleep;
    _Atomic int64_t pieces, threads;
    _Atomic(Work *) work;
    _Atomic(const void *) job;
    _Atomic int can_repeat;
    Worker worker[MOST_THREADS];
    int leave_signal; /* 0: pieces cannot be taken over */
    _Atomic int64_t shared_until;
    _Atomic int caller_cpu;
    int64_t workers; /* number of worker threads */
    pthread_mutex_t one; /* held during a job: only one runs at a time */
} team = {.one = PTHREAD_MUTEX_INITIALIZER};
static _Thread_local int has_own_threads;
static _Thread_local Worker *own; /* null on threads that are not workers */

/* `most`: nanoseconds; 0 for no limit. */
static void wait_while(_Atomic uint32_t *word, uint32_t value, int64_t most) {
    struct timespec limit = {0, most};
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, most ? &limit : 0, 0, 0);
}

static void wake(_Atomic uint32_t *word, int count) {
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, 0, 0, 0);
}

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000 + t.tv_nsec;
}

INLINE void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Spins while *word is `value`, for at most `most` nanoseconds. Returns whether the value has changed. */
static int spin(_Atomic uint32_t *word, uint32_t value, int64_t most) {
    int64_t start = now(), last = start;
    for (;;) {
        for (int i = 0; i < 32; i++) {
            if (atomic_load_explicit(word, memory_order_acquire) != value) return 1;
            relax();
        }
        int64_t at = now();
        if (at - last > PUT_ASIDE) {
            atomic_store_explicit(&team.shared_until, at + STAYS_SHARED, memory_order_relaxed);
            return 0;
        }
        if (at - start > most) return 0;
        last = at;
    }
}

static int is_shared(void) {
    int64_t until = atomic_load_explicit(&team.shared_until, memory_order_relaxed);
    return until && now() < until;
}

/* Moves this thread off the caller's processor. If the thread was woken there while the other processors were busy,
 * it would stay there: the system sees two threads with half a processor each, and no reason to move one. */
static void leave(int cpu) {
    cpu_set_t others;
    /* The process's first thread has the current set of allowed processors, even if that has changed. */
    if (sched_getaffinity(getpid(), sizeof others, &others)) return;
    CPU_CLR(cpu, &others);
    if (CPU_COUNT(&others)) sched_setaffinity(0, sizeof others, &others);
}

static void finish(uint32_t pieces) {
    uint32_t done = atomic_fetch_add(&team.done, pieces) + pieces;
    if (done == (uint32_t)atomic_load_explicit(&team.pieces, memory_order_relaxed) &&
        atomic_load(&team.is_caller_asleep))
        wake(&team.done, 1);
}

static void leave_piece(int number) {
    (void)number;
    if (!own || !own->can_leave || atomic_load(&own->held) != TAKEN) return;
    own->can_leave = 0;
    siglongjmp(own->before, 1);
}

/* Like compute, on a worker, for pieces that the caller may take over. */
static __attribute__((noinline)) int64_t compute_repeatable(uint64_t number, int64_t threads, Work *work,
                                                            const void *job, int64_t thread) {
    Worker *const worker = own;
    sigsetjmp(worker->before, 0); /* leave_piece jumps to this point */
    for (int64_t i = 0; i < threads; i++) {
        Share *share = &team.shares[(thread + i) % threads];
        for (int64_t piece; (piece = claim(share, number)) >= 0;) {
            uint64_t mine = number << PIECE_BITS | (uint64_t)piece;
            atomic_store_explicit(&worker->held, mine, memory_order_release);
            worker->can_leave = 1;
            atomic_signal_fence(memory_order_seq_cst);
            int is_mine = atomic_load_explicit(&worker->held, memory_order_acquire) == mine;
            if (is_mine) work(job, thread, piece);
            atomic_signal_fence(memory_order_seq_cst);
            worker->can_leave = 0;
            if (atomic_exchange(&worker->held, NOTHING) == TAKEN) continue;
            if (!is_mine) work(job, thread, piece); /* it was taken, and given back */
            int64_t done = atomic_load_explicit(&worker->done, memory_order_relaxed) + 1;
            atomic_store_explicit(&worker->done, done, memory_order_release);
        }
    }
    return atomic_exchange(&worker->done, 0);
}

static int64_t processor_time(const Worker *worker) {
    struct timespec t = {0};
    clock_gettime(worker->clock, &t);
    return t.tv_sec * 1000000000 + t.tv_nsec;
}

static int is_suspended(const Worker *worker) {
    int64_t before = processor_time(worker);
    for (int i = 0; i < 64; i++) relax();
    return processor_time(worker) == before;
}

/* Computes the pieces of suspended workers. For each of them:
 *
 * 1. The worker puts its piece into `held` and sets `can_leave` before it computes the piece (compute_repeatable).
 * 2. If the worker uses no processor time, the caller replaces `held` by TAKEN. If the worker was faster and has
 *    finished the piece, this fails, and the piece stays the worker's.
 * 3. The caller sends the signal. If that fails, it gives the piece back.
 * 4. The caller calls membarrier. From then on, the worker does not compute the piece.
 * 5. The worker's signal handler, leave_piece, jumps to the beginning of compute_repeatable, where the worker claims
 *    other pieces.
 * 6. The caller computes the piece.
 *
 * Returns how many pieces are now done: those that it took over, and those that these workers had finished but not
 * reported. */
static int64_t take_over(uint64_t number, int64_t threads, Work *work, const void *job) {
    int64_t taken = 0;
    for (int64_t thread = 1; thread < threads; thread++) {
        Worker *worker = &team.worker[thread];
        uint64_t held = atomic_load(&worker->held), taken_mark = TAKEN;
        if (held == NOTHING || held == TAKEN || held >> PIECE_BITS != number || !is_suspended(worker) ||
            !atomic_compare_exchange_strong(&worker->held, &held, TAKEN))
            continue;
        /* If no signal can be queued, give the piece back, unless the worker has already passed it. */
        if (syscall(SYS_tgkill, getpid(), worker->id, team.leave_signal) &&
            atomic_compare_exchange_strong(&worker->held, &taken_mark, held))
            continue;
        syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED, 0, 0);
        work(job, 0, PIECE(held));
        taken += 1 + atomic_exchange(&worker->done, 0);
    }
    return taken;
}

/* Prepares for taking over pieces, if the system has membarrier and a real-time signal is free. */
static void allow_taking_over(void) {
    if (syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, 0, 0)) return;
    for (int number = SIGRTMAX; number >= SIGRTMIN && !team.leave_signal; number--) {
        struct sigaction before, leave = {.sa_handler = leave_piece, .sa_flags = SA_NODEFER | SA_RESTART};
        if (sigaction(number, 0, &before) || before.sa_handler != SIG_DFL) continue;
        if (!sigaction(number, &leave, 0)) team.leave_signal = number;
    }
}

static void *serve(void *argument) {
    int64_t thread = (int64_t)argument;
    uint32_t number = 0;
    own = &team.worker[thread];
    own->id = (pid_t)syscall(SYS_gettid);
    pthread_getcpuclockid(pthread_self(), &own->clock);
    /* Accept only leave_signal and the signals of faults, so that leave_piece never jumps out of another handler. */
    static const int taken[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGSYS};
    sigset_t blocked;
    sigfillset(&blocked);
    for (size_t i = 0; i < sizeof taken / sizeof *taken; i++) sigdelset(&blocked, taken[i]);
    if (team.leave_signal) sigdelset(&blocked, team.leave_signal);
    pthread_sigmask(SIG_SETMASK, &blocked, 0);
    for (;;) {
        if (!spin(&team.number, number, is_shared() ? SPIN_BESIDE : SPIN_ALONE)) {
            atomic_fetch_add(&team.sleepers, 1);
            while (atomic_load(&team.number) == number) wait_while(&team.number, number, 0);
            atomic_fetch_sub(&team.sleepers, 1);
        }
        number = atomic_load_explicit(&team.number, memory_order_acquire);
        /* The values below may already belong to a later job. If so, no piece can be claimed. */
        int64_t threads = atomic_load_explicit(&team.threads, memory_order_relaxed);
        Work *work = atomic_load_explicit(&team.work, memory_order_relaxed);
        const void *job = atomic_load_explicit(&team.job, memory_order_relaxed);
        if (thread >= threads) continue;
        int cpu = atomic_load_explicit(&team.caller_cpu, memory_order_relaxed);
        if (sched_getcpu() == cpu) leave(cpu);
        int can_repeat = atomic_load_explicit(&team.can_repeat, memory_order_relaxed);
        int64_t done = can_repeat ? compute_repeatable(number, threads, work, job, thread)
                                  : compute(team.shares, number, threads, work, job, thread);
        if (done) finish((uint32_t)done);
    }
    return 0;
}

/* A forked child has none of its parent's threads. */
static void after_fork(void) {
    team.workers = 0;
    for (int i = 0; i < MOST_THREADS; i++) {
        atomic_store(&team.worker[i].held, NOTHING);
        atomic_store(&team.worker[i].done, 0);
        team.worker[i].can_leave = 0;
    }
    atomic_store(&team.sleepers, 0);
    pthread_mutex_init(&team.one, 0);
}

static int64_t start_workers(int64_t count) {
    static int is_watching;
    if (!is_watching) is_watching = !pthread_atfork(0, 0, after_fork);
    if (!team.workers) allow_taking_over();
    while (team.workers < count) {
        pthread_t thread;
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        int failed = pthread_create(&thread, &attributes, serve, (void *)(team.workers + 1));
        pthread_attr_destroy(&attributes);
        if (failed) break;
        team.workers++;
    }
    return team.workers;
}

static void in_pieces_own(Work *work, const void *job, int64_t pieces, int64_t threads, int can_repeat) {
    threads = least(threads, start_workers(threads - 1) + 1);
    uint32_t number = atomic_load_explicit(&team.number, memory_order_relaxed) + 1;
    atomic_store_explicit(&team.done, 0, memory_order_relaxed);
    atomic_store_explicit(&team.pieces, pieces, memory_order_relaxed);
    atomic_store_explicit(&team.threads, threads, memory_order_relaxed);
    atomic_store_explicit(&team.work, work, memory_order_relaxed);
    atomic_store_explicit(&team.job, job, memory_order_relaxed);
    can_repeat = can_repeat && team.leave_signal;
    atomic_store_explicit(&team.can_repeat, can_repeat, memory_order_relaxed);
    atomic_store_explicit(&team.caller_cpu, sched_getcpu(), memory_order_relaxed);
    deal(team.shares, number, pieces, threads);
    atomic_store(&team.number, number);
    uint32_t sleepers = atomic_load(&team.sleepers);
    if (sleepers) wake(&team.number, (int)least(sleepers, threads - 1));
    finish((uint32_t)compute(team.shares, number, threads, work, job, 0));
    for (uint32_t done; (done = atomic_load(&team.done)) != (uint32_t)pieces;) {
        if (spin(&team.done, done, SPIN_END)) continue;
        int64_t taken = can_repeat ? take_over(number, threads, work, job) : 0;
        if (taken) {
            finish((uint32_t)taken);
            continue;
        }
        atomic_store(&team.is_caller_asleep, 1);
        if ((done = atomic_load(&team.done)) != (uint32_t)pieces)
            wait_while(&team.done, done, can_repeat ? SLEEP_END : 0);
        atomic_store(&team.is_caller_asleep, 0);
    }
}

/* Sets whether the library's own threads compute the calling thread's kernels from now on. */
EXPORT void turret_own_threads(int64_t are_wanted) { has_own_threads = are_wanted != 0; }

static void divide(Work *work, const void *job, int64_t pieces, int64_t threads, int can_repeat) {
    threads = least(least(threads, pieces), MOST_THREADS);
    if (threads > 1 && !has_own_threads) {
        in_pieces_openmp(work, job, pieces, threads);
    } else if (threads > 1 && pthread_mutex_trylock(&team.one) == 0) {
        in_pieces_own(work, job, pieces, threads, can_repeat);
        pthread_mutex_unlock(&team.one);
    } else { /* one thread suffices, or another thread's job is running */
        for (int64_t piece = 0; piece < pieces; piece++) work(job, 0, piece);
    }
}
#else
EXPORT void turret_own_threads(int64_t are_wanted) { (void)are_wanted; }

static void divide(Work *work, const void *job, int64_t pieces, int64_t threads, int can_repeat) {
    (void)can_repeat;
    threads = least(least(threads, pieces), MOST_THREADS);
    if (threads <= 1)
        for (int64_t piece = 0; piece < pieces; piece++) work(job, 0, piece);
    else
        in_pieces_openmp(work, job, pieces, threads);
}
#endif

void in_pieces(Work *work, const void *job, int64_t pieces, int64_t threads) {
    divide(work, job, pieces, threads, 0);
}

void in_repeatable_pieces(Work *work, const void *job, int64_t pieces, int64_t threads) {
    divide(work, job, pieces, threads, 1);
}
