/* What the programs share: clocks, and how long things took. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static int64_t read_clock(clockid_t clock) {
    struct timespec now;
    if (clock_gettime(clock, &now))
        return 0;
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static inline int64_t now_nanoseconds(void) { return read_clock(CLOCK_MONOTONIC); }

static inline double now_seconds(void) { return now_nanoseconds() / 1e9; }

static inline void fail(const char *what) {
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

/* Nanoseconds on a processor, in user and kernel mode, of all threads, also of ended ones. */
static inline int64_t processor_nanoseconds(const char *pid) {
    clockid_t clock;
    if ((errno = clock_getcpuclockid(atoi(pid), &clock)))
        fail("clock_getcpuclockid");
    return read_clock(clock);
}

static inline int64_t processor_nanoseconds_of_all(char **pids, int count) {
    int64_t sum = 0;
    for (int each = 0; each < count; each++)
        sum += processor_nanoseconds(pids[each]);
    return sum;
}

/* Durations in buckets of 10 µs up to a second, then of 1 ms. */
enum { FINE = 100000, COARSE = 60000, FINE_MICROSECONDS = 10, COARSE_MICROSECONDS = 1000 };

struct durations {
    int64_t count;
    double worst_seconds;
    uint32_t fine[FINE], coarse[COARSE];
};

static inline void add_duration(struct durations *durations, int64_t nanoseconds) {
    int64_t microseconds = nanoseconds < 0 ? 0 : nanoseconds / 1000;
    int64_t place = microseconds / FINE_MICROSECONDS;
    durations->count++;
    if (nanoseconds / 1e9 > durations->worst_seconds)
        durations->worst_seconds = nanoseconds / 1e9;
    if (place < FINE) {
        durations->fine[place]++;
        return;
    }
    place = microseconds / COARSE_MICROSECONDS;
    durations->coarse[place < COARSE ? place : COARSE - 1]++;
}

/* Milliseconds that *share* of the durations do not exceed, to the end of a bucket. */
static inline double percentile(const struct durations *durations, double share) {
    int64_t wanted = (int64_t)(durations->count * share), seen = 0;
    for (int place = 0; place < FINE; place++)
        if ((seen += durations->fine[place]) > wanted)
            return (place + 1) * FINE_MICROSECONDS / 1e3;
    for (int place = 0; place < COARSE; place++)
        if ((seen += durations->coarse[place]) > wanted)
            return (place + 1) * COARSE_MICROSECONDS / 1e3;
    return durations->worst_seconds * 1e3;
}
