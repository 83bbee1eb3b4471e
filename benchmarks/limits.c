/* Limits of this machine: read bandwidth of memory and peaks of the product instructions, as one JSON object.
   cc -O3 -pthread limits.c -o limits; ./limits THREADS
   Each peak keeps 12 independent accumulators in registers, more than latency x ports of any x86-64 CPU needs. */
#define _GNU_SOURCE
#include <immintrin.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { kChains = 12, kSteps = 4000000 };
static const size_t kBytes = (size_t)256 << 20;

typedef struct {
    int (*run)(const char *, size_t);
    const char *memory;
    size_t size;
    int sink;
} Job;

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

__attribute__((target("avx2"))) static int read_memory(const char *memory, size_t size) {
    __m256i sum[4] = {{0}};
    for (size_t i = 0; i < size; i += 128)
        for (int j = 0; j < 4; ++j) sum[j] = _mm256_xor_si256(sum[j], *(const __m256i *)(memory + i + 32 * j));
    __m256i all = _mm256_xor_si256(_mm256_xor_si256(sum[0], sum[1]), _mm256_xor_si256(sum[2], sum[3]));
    return _mm256_extract_epi32(all, 0) ^ _mm256_extract_epi32(all, 7);
}

/* One peak: STEP updates chain[i] from a and b. The empty asm keeps a and b opaque, so that no product is shared. */
#define PEAK(NAME, TARGET, TYPE, ZERO, STEP)                                                       \
    __attribute__((target(TARGET))) static int NAME(const char *memory, size_t size) {             \
        TYPE a = ZERO, b = ZERO, chain[kChains];                                                   \
        (void)memory, (void)size;                                                                  \
        for (int i = 0; i < kChains; ++i) chain[i] = ZERO;                                         \
        for (int step = 0; step < kSteps; ++step)                                                  \
            _Pragma("GCC unroll 12") for (int i = 0; i < kChains; ++i) {                           \
                __asm__ volatile("" : "+x"(a), "+x"(b));                                           \
                chain[i] = STEP;                                                                   \
            }                                                                                      \
        for (int i = 1; i < kChains; ++i) __asm__ volatile("" ::"x"(chain[i]));                    \
        __asm__ volatile("" ::"x"(chain[0]));                                                      \
        return 0;                                                                                  \
    }

#define MADDUBS _mm256_add_epi32(chain[i], _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), b))
#define MADDWD _mm256_add_epi32(chain[i], _mm256_madd_epi16(a, b))
PEAK(fma256, "avx2,fma", __m256, _mm256_setzero_ps(), _mm256_fmadd_ps(a, b, chain[i]))
PEAK(maddwd256, "avx2", __m256i, _mm256_setzero_si256(), MADDWD)
PEAK(maddubs256, "avx2", __m256i, _mm256_setzero_si256(), MADDUBS)
PEAK(vnni256, "avxvnni", __m256i, _mm256_setzero_si256(), _mm256_dpbusd_avx_epi32(chain[i], a, b))
PEAK(fma512, "avx512f", __m512, _mm512_setzero_ps(), _mm512_fmadd_ps(a, b, chain[i]))
PEAK(vnni512, "avx512f,avx512vnni", __m512i, _mm512_setzero_si512(), _mm512_dpbusd_epi32(chain[i], a, b))

static void *start(void *argument) {
    Job *job = argument;
    job->sink = job->run(job->memory, job->size);
    return 0;
}

/* Best of several: seconds for `threads` threads to run the same job, each on its own part of the memory. */
static double best(int threads, int (*run)(const char *, size_t), const char *memory, int repeats) {
    double result = 1e9;
    pthread_t thread[64];
    Job job[64];
    size_t part = kBytes / (size_t)threads / 128 * 128;
    for (int repeat = 0; repeat < repeats; ++repeat) {
        double begin = seconds();
        for (int t = 0; t < threads; ++t) {
            job[t] = (Job){run, memory + part * (size_t)t, part, 0};
            pthread_create(&thread[t], 0, start, &job[t]);
        }
        for (int t = 0; t < threads; ++t) pthread_join(thread[t], 0);
        double spent = seconds() - begin;
        if (spent < result) result = spent;
    }
    return result;
}

static void peak(const char *name, int supported, int threads, int (*run)(const char *, size_t), int operations) {
    if (supported)
        printf(", \"%s\": %.1f", name, 1e-9 * operations * kChains * kSteps * threads / best(threads, run, 0, 5));
}

int main(int count, char **arguments) {
    int threads = count > 1 ? atoi(arguments[1]) : 1;
    char *memory = aligned_alloc(1 << 21, kBytes);
    if (threads < 1 || threads > 64 || !memory || !__builtin_cpu_supports("avx2")) return 1;
    memset(memory, 1, kBytes);
    printf("{\"read_gbs\": %.1f", 1e-9 * kBytes / best(threads, read_memory, memory, 9));
    peak("fma256", __builtin_cpu_supports("fma"), threads, fma256, 16);
    peak("maddwd256", 1, threads, maddwd256, 32);
    peak("maddubs256", 1, threads, maddubs256, 64);
    peak("vnni256", __builtin_cpu_supports("avxvnni"), threads, vnni256, 64);
    peak("fma512", __builtin_cpu_supports("avx512f"), threads, fma512, 32);
    peak("vnni512", __builtin_cpu_supports("avx512vnni"), threads, vnni512, 128);
    puts("}");
    return 0;
}
