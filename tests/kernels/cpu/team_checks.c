/* Checks that every piece is computed once, for one calling thread, for two at once, for a child after a fork,
 * and alongside threads that take the processors away. Results must be complete when the call returns, and nothing
 * may be written later. */
#include "team.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MOST_PIECES 1000

void turret_own_threads(int64_t are_wanted);

typedef struct {
    int64_t *sums; /* of the pieces; not atomic */
    int64_t *running; /* by thread: whether it is computing */
    int64_t value;
} Job;

static int failures;

static void add(const void *job, int64_t thread, int64_t piece) {
    const Job *j = job;
    if (j->running[thread]++) abort();
    for (volatile int64_t i = 0; i < piece % 7 * 20; i++) continue;
    j->sums[piece] += j->value;
    j->running[thread]--;
}

static int64_t run(int64_t threads, int64_t jobs) {
    int64_t sums[MOST_PIECES], running[MOST_THREADS] = {0}, wrong = 0;
    unsigned state = 7;
    for (int64_t value = 1; value <= jobs; value++) {
        int64_t pieces = (state = state * 1103515245 + 12345) >> 16 & 0xff;
        Job job = {sums, running, value};
        memset(sums, 0, sizeof sums);
        in_pieces(add, &job, pieces, threads);
        for (int64_t i = 0; i < MOST_PIECES; i++) wrong += sums[i] != (i < pieces ? value : 0);
    }
    return wrong;
}

/* A piece that takes some time and reads nothing that it writes. */
static void set(const void *job, int64_t thread, int64_t piece) {
    const Job *j = job;
    (void)thread;
    for (int64_t i = 0; i <= 20000; i++) ((volatile int64_t *)j->sums)[piece] = j->value + piece * i / 20000;
}

static int64_t run_repeatable(int64_t threads, int64_t jobs) {
    int64_t sums[MOST_PIECES] = {0}, wrong = 0;
    for (int64_t value = 1; value <= jobs; value++) {
        int64_t pieces = 4 * threads;
        Job job = {sums, 0, value};
        in_repeatable_pieces(set, &job, pieces, threads);
        for (int64_t i = 0; i < pieces; i++) wrong += sums[i] != value + i;
        memset(sums, 0, sizeof sums);
        for (volatile int64_t i = 0; i < 20000; i++) continue;
        for (int64_t i = 0; i < pieces; i++) wrong += sums[i] != 0;
    }
    return wrong;
}

static int is_begun;

/* On a worker, the piece stops for five seconds before it writes. The caller waits until one has begun. */
static void stop_and_set(const void *job, int64_t thread, int64_t piece) {
    const Job *j = job;
    if (thread > 0) {
        __atomic_store_n(&is_begun, 1, __ATOMIC_SEQ_CST);
        sleep(5);
        j->sums[piece] = -1;
    }
    while (!__atomic_load_n(&is_begun, __ATOMIC_SEQ_CST)) continue;
    if (thread == 0) j->sums[piece] = j->value;
}

static int64_t run_stopped(int64_t threads) {
    int64_t sums[MOST_PIECES] = {0}, wrong = 0;
    Job job = {sums, 0, 7};
    time_t start = time(0);
    in_repeatable_pieces(stop_and_set, &job, 8, threads);
    wrong += time(0) - start > 3;
    usleep(100000);
    for (int64_t i = 0; i < 8; i++) wrong += sums[i] != 7;
    return wrong;
}

static void *run_beside(void *threads) {
    turret_own_threads(1);
    return (void *)run(*(int64_t *)threads, 2000);
}

static void *spin(void *stop) {
    while (!__atomic_load_n((int *)stop, __ATOMIC_RELAXED)) continue;
    return 0;
}

static void expect(int64_t wrong, const char *what) {
    if (wrong) printf("%s: %lld pieces are wrong\n", what, (long long)wrong);
    failures += wrong != 0;
}

int main(int count, char **arguments) {
    int64_t threads = count > 1 ? atoi(arguments[1]) : 2;
    /* A second argument leaves out OpenMP's threads, which a sanitizer cannot follow. */
    if (count < 3) expect(run(threads, 100), "openmp");
    turret_own_threads(1);
    expect(run(threads, 5000), "alone");
    pthread_t other;
    void *wrong = 0;
    pthread_create(&other, 0, run_beside, &threads);
    expect(run(threads, 2000), "two callers, first");
    pthread_join(other, &wrong);
    expect((int64_t)wrong, "two callers, second");
    int stop = 0;
    pthread_t hogs[4];
    for (int i = 0; i < 4; i++) pthread_create(&hogs[i], 0, spin, &stop);
    expect(run(threads, 300), "beside others");
    /* A sanitizer does not know that a thread stops before another repeats its piece. */
    if (count < 3) expect(run_repeatable(threads, 1000), "repeatable pieces beside others");
    __atomic_store_n(&stop, 1, __ATOMIC_RELAXED);
    for (int i = 0; i < 4; i++) pthread_join(hogs[i], 0);
    usleep(400000); /* all workers sleep by now */
    expect(run(threads, 100), "after a pause");
    if (count < 3 && threads > 1) expect(run_stopped(threads), "a stopped worker");
    fflush(stdout);
    pid_t child = fork();
    if (!child) _exit(run(threads, 100) != 0);
    int status = 1;
    waitpid(child, &status, 0);
    expect(status != 0, "a child");
    printf("team of %lld: %d failures\n", (long long)threads, failures);
    return failures != 0;
}
