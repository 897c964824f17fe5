/* Read bandwidth of the memory: threads sum buffers far larger than the caches, several times; the fastest pass and
 * the median pass are printed as JSON, in GB/s (1e9 bytes). Usage: bandwidth [threads] [MiB per thread] [passes]. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

enum { LANES = 8, AHEAD = 4096, MAX_THREADS = 256, MAX_PASSES = 1000 };
typedef uint64_t vec __attribute__((vector_size(64)));

static size_t bytes;
static int passes;
static pthread_barrier_t gate;
static volatile uint64_t sink;
static double began[MAX_THREADS][MAX_PASSES], ended[MAX_THREADS][MAX_PASSES];

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static vec sum(const vec *data, size_t count) {
    vec acc[LANES] = {{0}};
    for (size_t i = 0; i + LANES <= count; i += LANES) {
        for (int j = 0; j < LANES; j++) {
            __builtin_prefetch((const char *)(data + i + j) + AHEAD);
            acc[j] += data[i + j];
        }
    }
    for (int j = 1; j < LANES; j++) acc[0] += acc[j];
    return acc[0];
}

static void *reader(void *argument) {
    int self = (int)(intptr_t)argument;
    vec *data = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) {
        fprintf(stderr, "bandwidth: no memory for %zu bytes\n", bytes);
        exit(1);
    }
    madvise(data, bytes, MADV_HUGEPAGE);
    for (size_t i = 0; i < bytes / sizeof(vec); i++) data[i] = (vec){i, 1, 2, 3, 4, 5, 6, 7};
    for (int pass = 0; pass < passes; pass++) {
        pthread_barrier_wait(&gate);
        began[self][pass] = now();
        sink += sum(data, bytes / sizeof(vec))[0];
        ended[self][pass] = now();
    }
    return NULL;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv) {
    int threads = argc > 1 ? atoi(argv[1]) : 2;
    int mib = argc > 2 ? atoi(argv[2]) : 256;
    passes = argc > 3 ? atoi(argv[3]) : 15;
    if (threads < 1 || threads > MAX_THREADS || mib < 1 || passes < 1 || passes > MAX_PASSES) {
        fprintf(stderr, "usage: bandwidth [threads 1-%d] [MiB per thread] [passes 1-%d]\n", MAX_THREADS, MAX_PASSES);
        return 2;
    }
    bytes = (size_t)mib << 20;
    pthread_barrier_init(&gate, NULL, (unsigned)threads);
    pthread_t ids[MAX_THREADS];
    double rate[MAX_PASSES];
    for (int i = 0; i < threads; i++) {
        if (pthread_create(&ids[i], NULL, reader, (void *)(intptr_t)i) != 0) {
            fprintf(stderr, "bandwidth: cannot start thread %d\n", i);
            return 1;
        }
    }
    for (int i = 0; i < threads; i++) pthread_join(ids[i], NULL);
    for (int pass = 0; pass < passes; pass++) {
        double first = began[0][pass], last = ended[0][pass];
        for (int i = 1; i < threads; i++) {
            if (began[i][pass] < first) first = began[i][pass];
            if (ended[i][pass] > last) last = ended[i][pass];
        }
        rate[pass] = 1e-9 * (double)bytes * threads / (last - first);
    }
    qsort(rate, (size_t)passes, sizeof(double), ascending);
    printf("{\"threads\": %d, \"best_gb_s\": %.3f, \"median_gb_s\": %.3f}\n", threads, rate[passes - 1], rate[passes / 2]);
    return 0;
}
