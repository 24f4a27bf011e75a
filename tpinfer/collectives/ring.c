/* All-reduce and all-gather between the processes of one host, through one shared mapping.
 *
 * Mapping: a header page (64-bit words: 0 ready, 1 abort, 8+r pid of rank r, 64+8r flag of rank r, one cache line
 * each), then two slots of slot_bytes per rank. A collective has a number `seq`; its slot is seq & 1. Each rank
 * copies its part into its slot, publishes seq in its flag (release), and waits for every other flag to reach seq
 * (acquire). A slot is written again two collectives later, when every rank has published the one in between and so
 * has finished reading. All ranks add in rank order in float32, so all get the same bits.
 *
 * The same protocol is spoken by python_ring.py; ranks of either kind may share a mapping.
 */
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#define FLAG(ctx, r) ((_Atomic uint64_t *)((ctx)->words + 64 + 8 * (r)))
#define ABORTED -1000000
enum { F32 = 0, BF16 = 1, F16 = 2 };

struct ring {
    uint64_t *words;      /* header page */
    char *slots;          /* 2 * size slots */
    uint64_t slot_bytes;
    uint64_t seq;
    int64_t timeout_ns;
    int32_t rank, size;
    int32_t spins;        /* polls before the core is yielded */
    int32_t pad;
};

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static inline void pause_core(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

static char *slot(const struct ring *c, int rank, uint64_t seq) {
    return c->slots + (2 * (uint64_t)rank + (seq & 1)) * c->slot_bytes;
}

/* 0, or -1 - rank that did not come in time, or ABORTED. */
static int64_t wait_all(struct ring *c, uint64_t seq, int64_t began) {
    for (int r = 0; r < c->size; r++) {
        if (r == c->rank) continue;
        int32_t polls = 0;
        while (__atomic_load_n(FLAG(c, r), __ATOMIC_ACQUIRE) < seq) {
            if (++polls <= c->spins) {
                pause_core();
                continue;
            }
            sched_yield();
            if ((polls & 255) == 0) {
                if (__atomic_load_n(c->words + 1, __ATOMIC_RELAXED)) return ABORTED;
                if (now_ns() - began > c->timeout_ns) return -1 - r;
            }
        }
    }
    return 0;
}

static inline float from_bf16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline uint16_t to_bf16(float f) { /* round to nearest even; NaN stays NaN */
    uint32_t bits;
    memcpy(&bits, &f, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? (uint16_t)((bits >> 16) | 0x40) : (uint16_t)rounded;
}

#define BLOCK 512
/* out = sum over ranks, block by block so that the float32 sums stay in L1 */
static void add_ranks(const struct ring *c, uint64_t seq, char *out, uint64_t count, int dtype) {
    float sum[BLOCK];
    for (uint64_t at = 0; at < count; at += BLOCK) {
        uint64_t n = count - at < BLOCK ? count - at : BLOCK;
        for (int r = 0; r < c->size; r++) {
            const char *from = slot(c, r, seq);
            if (dtype == F32) {
                const float *x = (const float *)from + at;
                if (r == 0) memcpy(sum, x, n * 4);
                else for (uint64_t i = 0; i < n; i++) sum[i] += x[i];
            } else if (dtype == BF16) {
                const uint16_t *x = (const uint16_t *)from + at;
                if (r == 0) for (uint64_t i = 0; i < n; i++) sum[i] = from_bf16(x[i]);
                else for (uint64_t i = 0; i < n; i++) sum[i] += from_bf16(x[i]);
            } else {
                const _Float16 *x = (const _Float16 *)from + at;
                if (r == 0) for (uint64_t i = 0; i < n; i++) sum[i] = (float)x[i];
                else for (uint64_t i = 0; i < n; i++) sum[i] += (float)x[i];
            }
        }
        if (dtype == F32) memcpy((float *)out + at, sum, n * 4);
        else if (dtype == BF16) for (uint64_t i = 0; i < n; i++) ((uint16_t *)out)[at + i] = to_bf16(sum[i]);
        else for (uint64_t i = 0; i < n; i++) ((_Float16 *)out)[at + i] = (_Float16)sum[i];
    }
}

/* Sum `count` values at `buffer` over the ranks, in place. Returns ns waited for the last peer, or below 0. */
int64_t ring_all_reduce(struct ring *c, char *buffer, uint64_t count, int32_t dtype) {
    uint64_t width = dtype == F32 ? 4 : 2, most = c->slot_bytes / width;
    int64_t waited = 0;
    do {
        uint64_t n = count < most ? count : most, seq = ++c->seq;
        memcpy(slot(c, c->rank, seq), buffer, n * width);
        __atomic_store_n(FLAG(c, c->rank), seq, __ATOMIC_RELEASE);
        int64_t began = now_ns(), failed = wait_all(c, seq, began);
        if (failed) return failed;
        waited += now_ns() - began;
        add_ranks(c, seq, buffer, n, dtype);
        buffer += n * width;
        count -= n;
    } while (count);
    return waited;
}

/* out[r * bytes ..] = rank r's `bytes` bytes. Returns ns waited, or below 0. */
int64_t ring_all_gather(struct ring *c, char *out, const char *mine, uint64_t bytes) {
    int64_t waited = 0;
    uint64_t done = 0;
    do {
        uint64_t n = bytes - done < c->slot_bytes ? bytes - done : c->slot_bytes, seq = ++c->seq;
        memcpy(slot(c, c->rank, seq), mine + done, n);
        __atomic_store_n(FLAG(c, c->rank), seq, __ATOMIC_RELEASE);
        int64_t began = now_ns(), failed = wait_all(c, seq, began);
        if (failed) return failed;
        waited += now_ns() - began;
        for (int r = 0; r < c->size; r++) memcpy(out + r * bytes + done, slot(c, r, seq), n);
        done += n;
    } while (done < bytes);
    return waited;
}
