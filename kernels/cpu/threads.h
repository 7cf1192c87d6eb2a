/* Loops whose turns are shared with helper threads.
 *
 * Unlike OpenMP's, a loop never waits for a helper to arrive, only for turns that one has begun. A core that
 * another process has taken thus costs the help and no more, where a barrier would cost the time until that
 * process lets go, milliseconds for microseconds of work.
 */
#pragma once

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>

/* A helper looks for the next loop so often before it sleeps: some 50 microseconds. */
#define LOOKS 1000
#define MOST_HELPERS 63
#define OPEN (1L << 32) /* in `gate`, whose low half counts the helpers inside */

typedef void Turn(const void *job, int64_t i);

static struct {
    atomic_flag taken; /* by one loop at a time; a second caller goes on alone */
    pthread_mutex_t mutex;
    pthread_cond_t opened;
    atomic_int sleeping;
    int num_helpers; /* ever started; changed by the loop that has `taken` alone */
    atomic_int wanted;
    atomic_long gate, next;
    int64_t count;
    Turn *turn;
    const void *job;
} shared = {.taken = ATOMIC_FLAG_INIT, .mutex = PTHREAD_MUTEX_INITIALIZER, .opened = PTHREAD_COND_INITIALIZER};

static inline void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void take_turns(void) {
    for (int64_t i; (i = atomic_fetch_add(&shared.next, 1)) < shared.count;) shared.turn(shared.job, i);
}

static void sleep_until_open(void) {
    pthread_mutex_lock(&shared.mutex);
    atomic_fetch_add(&shared.sleeping, 1);
    while (!(atomic_load(&shared.gate) & OPEN)) pthread_cond_wait(&shared.opened, &shared.mutex);
    atomic_fetch_sub(&shared.sleeping, 1);
    pthread_mutex_unlock(&shared.mutex);
}

static void *help(void *unused) {
    (void)unused;
    for (int looks = 0;;) {
        long gate = atomic_load(&shared.gate);
        if (gate & OPEN && (gate & ~OPEN) < atomic_load(&shared.wanted) &&
            atomic_load(&shared.next) < shared.count &&
            atomic_compare_exchange_strong(&shared.gate, &gate, gate + 1)) {
            take_turns();
            atomic_fetch_sub(&shared.gate, 1);
            looks = 0;
        } else if (++looks < LOOKS) {
            pause_briefly();
        } else {
            sleep_until_open();
            looks = 0;
        }
    }
    return NULL;
}

/* Call turn(job, i) for each i below count, on up to so many threads, in any order. */
static void share(int64_t count, int num_threads, Turn *turn, const void *job) {
    if (num_threads < 2 || count < 2 || atomic_flag_test_and_set(&shared.taken)) {
        for (int64_t i = 0; i < count; i++) turn(job, i);
        return;
    }
    const int wanted = num_threads - 1 < MOST_HELPERS ? num_threads - 1 : MOST_HELPERS;
    for (pthread_t thread; shared.num_helpers < wanted; shared.num_helpers++) {
        if (pthread_create(&thread, NULL, help, NULL)) break; /* fewer helpers will do */
        pthread_detach(thread);
    }
    shared.count = count, shared.turn = turn, shared.job = job;
    atomic_store(&shared.wanted, wanted);
    atomic_store(&shared.next, 0);
    atomic_store(&shared.gate, OPEN);
    if (atomic_load(&shared.sleeping)) {
        pthread_mutex_lock(&shared.mutex);
        pthread_cond_broadcast(&shared.opened);
        pthread_mutex_unlock(&shared.mutex);
    }
    take_turns();
    atomic_fetch_and(&shared.gate, ~OPEN);
    for (int looks = 0; atomic_load(&shared.gate); looks++) {
        if (looks < LOOKS) pause_briefly();
        else sched_yield();
    }
    atomic_flag_clear(&shared.taken);
}
