/* A small pool of threads that takes the parts of one operation. Off unless asked for, and left out without HQM_THREADS:
 * then one thread does every part. Where the caller runs networks on threads of its own, whoever comes second works alone.
 */
#if defined(HQM_THREADS) && !defined(_POSIX_C_SOURCE)
#define _POSIX_C_SOURCE 200809L
#endif
#include "hqm_internal.h"

#ifdef HQM_THREADS
#include <pthread.h>

enum { MOST = 64, STACK = 1 << 20 /* bytes of each: some systems give less than kernels take */ };
static pthread_mutex_t in_use = PTHREAD_MUTEX_INITIALIZER, lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t begin = PTHREAD_COND_INITIALIZER, end = PTHREAD_COND_INITIALIZER;
/* all under lock; n_threads and n_started change under in_use, too */
static uint32_t n_threads = 1, n_started, n_left, n_rounds, seen[MOST];
static part_work *work;
static const void *context;

static void *serve(void *place) {
    uint32_t *mine = place, part = (uint32_t)(mine - seen);
    pthread_mutex_lock(&lock);
    for (;;) {
        while (*mine == n_rounds) pthread_cond_wait(&begin, &lock);
        *mine = n_rounds;
        if (part >= n_threads) continue;
        part_work *todo = work;
        const void *with = context;
        const uint32_t n = n_threads;
        pthread_mutex_unlock(&lock);
        todo(with, part, n);
        pthread_mutex_lock(&lock);
        if (!--n_left) pthread_cond_signal(&end);
    }
    return NULL;
}

/* A child process has none of the threads. */
static void forget(void) { n_threads = 1, n_started = 0; }

int hqm_use_threads(uint32_t n) {
    static int is_forking;
    if (n < 1 || n > MOST) return 0;
    pthread_mutex_lock(&in_use);
    pthread_mutex_lock(&lock);
    if (!is_forking) is_forking = !pthread_atfork(NULL, NULL, forget);
    pthread_attr_t attributes;
    const int is_ready = !pthread_attr_init(&attributes) && !pthread_attr_setstacksize(&attributes, STACK);
    while (n_started + 1 < n) {
        pthread_t thread;
        uint32_t *place = seen + n_started + 1;
        *place = n_rounds;
        if (!is_ready || pthread_create(&thread, &attributes, serve, place)) break;
        pthread_detach(thread);
        n_started++;
    }
    const int enough = n_started + 1 >= n;
    if (enough) n_threads = n;
    if (is_ready) pthread_attr_destroy(&attributes);
    pthread_mutex_unlock(&lock);
    pthread_mutex_unlock(&in_use);
    return enough;
}

void in_parts(part_work *todo, const void *with) {
    if (pthread_mutex_trylock(&in_use)) {
        todo(with, 0, 1);
        return;
    }
    const uint32_t n = n_threads;
    if (n > 1) {
        pthread_mutex_lock(&lock);
        work = todo, context = with, n_left = n - 1, n_rounds++;
        pthread_cond_broadcast(&begin);
        pthread_mutex_unlock(&lock);
    }
    todo(with, 0, n);
    if (n > 1) {
        pthread_mutex_lock(&lock);
        while (n_left) pthread_cond_wait(&end, &lock);
        pthread_mutex_unlock(&lock);
    }
    pthread_mutex_unlock(&in_use);
}

#else

int hqm_use_threads(uint32_t n) { return n == 1; }
void in_parts(part_work *todo, const void *with) { todo(with, 0, 1); }

#endif
