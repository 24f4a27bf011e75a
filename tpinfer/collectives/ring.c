/*
 * Collectives of the ranks of one host over a shared-memory segment. No Python headers: built with
 * the system compiler by build_ring.py and called through ctypes. python_ring.py speaks the same
 * protocol in Python; ranks of either kind can work together.
 *
 * Protocol. Every rank owns two slots and a counter of the phases it has published. In phase k it
 * writes its part into slot k % 2, stores k in its counter (release) and waits until every counter
 * has reached k (acquire); then it reads the other ranks' slots. Two slots are enough: a rank that
 * writes phase k + 2 has seen all counters at k + 1, so everybody is done reading phase k.
 *
 * Waiting spins for spin_ns, then yields the core at every look; spin_ns is 0 where ranks outnumber
 * cores, because there a spinning rank keeps the one it waits for from running. A wait ends with an
 * error when a peer is gone (its lock on byte `peer` of the segment file is free), when the abort
 * word is set, at the time limit, or when a Python signal handler raises.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

enum { F32, BF16, F16, F64, I32, I64 };                           /* codes in native_ring.py */
enum { OK, TIMED_OUT, PEER_GONE, ABORTED, INTERRUPTED, CLOSED };  /* codes in ring_segment.py */

#define RELEASE_AFTER_NS 200000LL   /* keep Python's lock through short waits */
#define SLEEP_AFTER_NS 20000000LL   /* from then on sleep between looks */
#define SLEEP_NS 50000
#define SIGNALS_EVERY_NS 20000000LL
#define PEERS_EVERY_NS 50000000LL
#define BLOCK 1024                  /* elements summed at a time, in the first-level cache */
#define GRAIN 32                    /* parts of a chunk start at multiples of so many elements */
#define MAX_RANKS 64
#define LINE_WORDS 16               /* 128 bytes: two cache lines, since they are fetched in pairs */

/* Mirrored field by field in native_ring.py. */
struct ring {
    uint8_t *segment;       /* NULL once the group is closed */
    int64_t rank, size;
    int64_t abort_offset, flags_offset, mail_flags_offset, mail_offset, slots_offset;
    int64_t slot_bytes, mail_bytes, one_shot_bytes;
    int64_t timeout_ns, spin_ns, descriptor;
    void *(*save_thread)(void);
    void (*restore_thread)(void *);
    int (*check_signals)(void);
    uint64_t phase;         /* of this rank */
    int64_t last_wait_ns;   /* of the last call: publishing to seeing the last peer, all phases */
    int64_t culprit;        /* rank that a failed call waited for */
};

typedef _Atomic uint64_t word;

int64_t ring_struct_bytes(void) { return sizeof(struct ring); }

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static inline void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

static inline word *word_at(const struct ring *r, int64_t offset)
{
    return (word *)(r->segment + offset);
}

static inline word *flag_of(const struct ring *r, int64_t rank)
{
    return word_at(r, r->flags_offset) + rank * LINE_WORDS;
}

static inline uint8_t *slot_of(const struct ring *r, int64_t rank, uint64_t phase)
{
    return r->segment + r->slots_offset + (rank * 2 + (int64_t)(phase & 1)) * r->slot_bytes;
}

/* The abort word: who set it, whom it blames, why; see ring_segment.py. */
static int fail(struct ring *r, int code, int64_t peer)
{
    uint64_t unset = 0;
    uint64_t reason = (uint64_t)(r->rank + 1) | (uint64_t)(peer + 1) << 16 | (uint64_t)code << 32;
    atomic_compare_exchange_strong(word_at(r, r->abort_offset), &unset, reason);
    r->culprit = peer;
    return code;
}

static int is_gone(const struct ring *r, int64_t peer)
{
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = peer, .l_len = 1};
    return fcntl((int)r->descriptor, F_GETLK, &lock) == 0 && lock.l_type == F_UNLCK;
}

static int has_reached(const word *flag, uint64_t want)
{
    return atomic_load_explicit(flag, memory_order_acquire) >= want;
}

/* A wait that spinning did not end. Python's lock is held again when it returns. */
static int wait_long(struct ring *r, const word *flag, uint64_t want, int64_t peer, int64_t start)
{
    int64_t asked_signals = start, asked_peer = start;
    void *thread = NULL;
    int code = OK;
    while (!has_reached(flag, want)) {
        int64_t now = now_ns(), waited = now - start;
        if (waited < SLEEP_AFTER_NS) {
            sched_yield();
        } else {
            struct timespec nap = {0, SLEEP_NS};
            nanosleep(&nap, NULL);
        }
        if (atomic_load_explicit(word_at(r, r->abort_offset), memory_order_acquire)) {
            code = has_reached(flag, want) ? OK : ABORTED;
        } else if (waited > r->timeout_ns) {
            code = TIMED_OUT;
        } else if (now - asked_peer > PEERS_EVERY_NS) {
            asked_peer = now;
            if (is_gone(r, peer) && !has_reached(flag, want)) code = PEER_GONE;
        }
        if (code) break;
        if (!thread && waited > RELEASE_AFTER_NS) {
            thread = r->save_thread();
        } else if (thread && now - asked_signals > SIGNALS_EVERY_NS) {
            asked_signals = now;
            r->restore_thread(thread);
            thread = NULL;
            if (r->check_signals()) {
                code = INTERRUPTED;
                break;
            }
        }
    }
    if (thread) r->restore_thread(thread);
    return code ? fail(r, code, code == INTERRUPTED ? r->rank : peer) : OK;
}

static int wait_for(struct ring *r, const word *flag, uint64_t want, int64_t peer)
{
    if (has_reached(flag, want)) return OK;
    int64_t start = now_ns();
    while (r->spin_ns) {
        for (int i = 0; i < 64; i++) {
            relax();
            if (has_reached(flag, want)) return OK;
        }
        if (now_ns() - start > r->spin_ns) break;
    }
    return wait_long(r, flag, want, peer, start);
}

static int begin(struct ring *r)
{
    r->last_wait_ns = 0;
    if (!r->segment) return CLOSED;
    if (atomic_load_explicit(word_at(r, r->abort_offset), memory_order_relaxed)) return ABORTED;
    return OK;
}

/* Publish this rank's part of `phase` and wait for everybody's. */
static int meet(struct ring *r, uint64_t phase)
{
    int64_t published = now_ns();
    r->phase = phase;
    atomic_store_explicit(flag_of(r, r->rank), phase, memory_order_release);
    for (int64_t step = 1; step < r->size; step++) {
        int64_t peer = (r->rank + step) % r->size;
        int code = wait_for(r, flag_of(r, peer), phase, peer);
        if (code) return code;
    }
    r->last_wait_ns += now_ns() - published;
    return OK;
}

static int64_t width_of(int64_t dtype)
{
    return dtype == BF16 || dtype == F16 ? 2 : dtype == F64 || dtype == I64 ? 8 : 4;
}

/* ---- sums in rank order; 16-bit floats in float32, rounded once ---- */

static inline float widen_bf16(uint16_t bits)
{
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

static inline uint16_t narrow_bf16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

static void widen_half(float *restrict out, const uint16_t *restrict in, int64_t n)
{
    int64_t i = 0;
#ifdef __F16C__
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(in + i))));
    for (; i < n; i++) out[i] = _cvtsh_ss(in[i]);
#else
    for (; i < n; i++) {
        _Float16 value;
        memcpy(&value, in + i, 2);
        out[i] = (float)value;
    }
#endif
}

static void narrow_half(uint16_t *restrict out, const float *restrict in, int64_t n)
{
    int64_t i = 0;
#ifdef __F16C__
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *)(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), 0));
    for (; i < n; i++) out[i] = _cvtss_sh(in[i], 0);
#else
    for (; i < n; i++) {
        _Float16 value = (_Float16)in[i];
        memcpy(out + i, &value, 2);
    }
#endif
}

/* out may be one of the sources (hence ivdep): an element is read from all, then written. */
#define PLAIN_SUM(NAME, TYPE)                                                                      \
    static void NAME(TYPE *out, const uint8_t *const *sources, int64_t size, int64_t n)           \
    {                                                                                              \
        TYPE sum[BLOCK];                                                                           \
        for (int64_t at = 0; at < n; at += BLOCK) {                                                \
            int64_t count = n - at < BLOCK ? n - at : BLOCK;                                       \
            const TYPE *left = (const TYPE *)sources[0] + at;                                      \
            for (int64_t p = 1; p < size; p++) {                                                   \
                const TYPE *right = (const TYPE *)sources[p] + at;                                 \
                TYPE *to = p == size - 1 ? out + at : sum;                                         \
                _Pragma("GCC ivdep")                                                               \
                for (int64_t i = 0; i < count; i++) to[i] = left[i] + right[i];                    \
                left = sum;                                                                        \
            }                                                                                      \
        }                                                                                          \
    }
PLAIN_SUM(sum_f32, float)
PLAIN_SUM(sum_f64, double)
PLAIN_SUM(sum_i32, uint32_t)
PLAIN_SUM(sum_i64, uint64_t)

static void sum_bf16(uint16_t *out, const uint8_t *const *sources, int64_t size, int64_t n)
{
    float sum[BLOCK];
    for (int64_t at = 0; at < n; at += BLOCK) {
        int64_t count = n - at < BLOCK ? n - at : BLOCK;
        const uint16_t *first = (const uint16_t *)sources[0] + at;
        for (int64_t i = 0; i < count; i++) sum[i] = widen_bf16(first[i]);
        for (int64_t p = 1; p < size; p++) {
            const uint16_t *part = (const uint16_t *)sources[p] + at;
            for (int64_t i = 0; i < count; i++) sum[i] += widen_bf16(part[i]);
        }
        for (int64_t i = 0; i < count; i++) out[at + i] = narrow_bf16(sum[i]);
    }
}

static void sum_f16(uint16_t *out, const uint8_t *const *sources, int64_t size, int64_t n)
{
    float sum[BLOCK], part[BLOCK];
    for (int64_t at = 0; at < n; at += BLOCK) {
        int64_t count = n - at < BLOCK ? n - at : BLOCK;
        widen_half(sum, (const uint16_t *)sources[0] + at, count);
        for (int64_t p = 1; p < size; p++) {
            widen_half(part, (const uint16_t *)sources[p] + at, count);
            for (int64_t i = 0; i < count; i++) sum[i] += part[i];
        }
        narrow_half(out + at, sum, count);
    }
}

/* out <- this rank's `own` plus what lies at `offset` in the other ranks' slots of `phase`. */
static void sum_slots(struct ring *r, uint64_t phase, int64_t offset, void *out, const void *own,
                      int64_t n, int64_t dtype)
{
    const uint8_t *sources[MAX_RANKS];
    for (int64_t p = 0; p < r->size; p++)
        sources[p] = p == r->rank ? (const uint8_t *)own : slot_of(r, p, phase) + offset;
    switch (dtype) {
    case F32: sum_f32(out, sources, r->size, n); break;
    case BF16: sum_bf16(out, sources, r->size, n); break;
    case F16: sum_f16(out, sources, r->size, n); break;
    case F64: sum_f64(out, sources, r->size, n); break;
    case I32: sum_i32(out, sources, r->size, n); break;
    default: sum_i64(out, sources, r->size, n); break;
    }
}

/* ---- collectives ---- */

/* Each rank sums its part of the chunk, then all gather the parts. */
static int reduce_chunk(struct ring *r, uint8_t *values, int64_t n, int64_t dtype)
{
    int64_t width = width_of(dtype), part = (n + r->size - 1) / r->size;
    part = (part + GRAIN - 1) / GRAIN * GRAIN;
    int64_t first = r->rank * part < n ? r->rank * part : n;
    int64_t last = first + part < n ? first + part : n;
    uint64_t phase = r->phase + 1;
    uint8_t *slot = slot_of(r, r->rank, phase);
    memcpy(slot, values, (size_t)(first * width));
    memcpy(slot + last * width, values + last * width, (size_t)((n - last) * width));
    int code = meet(r, phase);
    if (code) return code;
    uint8_t *own = values + first * width;
    sum_slots(r, phase, first * width, own, own, last - first, dtype);
    phase++;
    memcpy(slot_of(r, r->rank, phase) + first * width, own, (size_t)((last - first) * width));
    if ((code = meet(r, phase))) return code;
    for (int64_t p = 0; p < r->size; p++) {
        int64_t start = p * part < n ? p * part : n, stop = start + part < n ? start + part : n;
        if (p != r->rank)
            memcpy(values + start * width, slot_of(r, p, phase) + start * width,
                   (size_t)((stop - start) * width));
    }
    return OK;
}

int ring_all_reduce(struct ring *r, uint8_t *values, int64_t n, int64_t dtype)
{
    int64_t width = width_of(dtype);
    int code = begin(r);
    if (code || n == 0) return code;
    if (n * width <= r->one_shot_bytes) {
        uint64_t phase = r->phase + 1;
        memcpy(slot_of(r, r->rank, phase), values, (size_t)(n * width));
        if ((code = meet(r, phase))) return code;
        sum_slots(r, phase, 0, values, values, n, dtype);
        return OK;
    }
    int64_t most = r->slot_bytes / width;
    for (int64_t at = 0; at < n && !code; at += most)
        code = reduce_chunk(r, values + at * width, n - at < most ? n - at : most, dtype);
    return code;
}

int ring_all_gather(struct ring *r, uint8_t *out, const uint8_t *part, int64_t bytes)
{
    int code = begin(r);
    for (int64_t at = 0; at < bytes && !code; at += r->slot_bytes) {
        size_t count = (size_t)(bytes - at < r->slot_bytes ? bytes - at : r->slot_bytes);
        uint64_t phase = r->phase + 1;
        memcpy(slot_of(r, r->rank, phase), part + at, count);
        code = meet(r, phase);
        for (int64_t p = 0; p < r->size && !code; p++) {
            const uint8_t *source = p == r->rank ? part + at : slot_of(r, p, phase);
            memcpy(out + p * bytes + at, source, count);
        }
    }
    return code;
}

/* whole is [size][n]. */
int ring_reduce_scatter(struct ring *r, uint8_t *out, const uint8_t *whole, int64_t n,
                        int64_t dtype)
{
    int64_t width = width_of(dtype), most = r->slot_bytes / r->size / width / GRAIN * GRAIN;
    int code = begin(r);
    for (int64_t at = 0; at < n && !code; at += most) {
        int64_t count = n - at < most ? n - at : most;
        uint64_t phase = r->phase + 1;
        for (int64_t p = 0; p < r->size; p++)
            memcpy(slot_of(r, r->rank, phase) + p * most * width, whole + (p * n + at) * width,
                   (size_t)(count * width));
        if ((code = meet(r, phase))) return code;
        sum_slots(r, phase, r->rank * most * width, out + at * width,
                  whole + (r->rank * n + at) * width, count, dtype);
    }
    return code;
}

/* Bytes for and from each rank, in rank order; `rounds` is the same on all ranks. */
int ring_all_to_all_v(struct ring *r, uint8_t *out, const uint8_t *in, const int64_t *out_bytes,
                      const int64_t *in_bytes, int64_t rounds)
{
    int64_t most = r->slot_bytes / r->size / 64 * 64;
    int code = begin(r);
    for (int64_t at = 0; rounds-- > 0 && !code; at += most) {
        uint64_t phase = r->phase + 1;
        int64_t start = 0;
        for (int64_t p = 0; p < r->size; start += in_bytes[p++]) {
            int64_t left = in_bytes[p] - at, count = left < most ? left : most;
            if (count > 0)
                memcpy(slot_of(r, r->rank, phase) + p * most, in + start + at, (size_t)count);
        }
        if ((code = meet(r, phase))) return code;
        start = 0;
        for (int64_t p = 0; p < r->size; start += out_bytes[p++]) {
            int64_t left = out_bytes[p] - at, count = left < most ? left : most;
            if (count > 0)
                memcpy(out + start + at, slot_of(r, p, phase) + r->rank * most, (size_t)count);
        }
    }
    return code;
}

int ring_broadcast(struct ring *r, uint8_t *values, int64_t bytes, int64_t source)
{
    int code = begin(r);
    for (int64_t at = 0; at < bytes && !code; at += r->slot_bytes) {
        size_t count = (size_t)(bytes - at < r->slot_bytes ? bytes - at : r->slot_bytes);
        uint64_t phase = r->phase + 1;
        if (r->rank == source) memcpy(slot_of(r, source, phase), values + at, count);
        code = meet(r, phase);
        if (!code && r->rank != source) memcpy(values + at, slot_of(r, source, phase), count);
    }
    return code;
}

int ring_barrier(struct ring *r)
{
    int code = begin(r);
    return code ? code : meet(r, r->phase + 1);
}

/* Send (outgoing) or receive through the mailbox of this pair, one mail_bytes at a time. */
int ring_mail(struct ring *r, uint8_t *values, int64_t bytes, int64_t peer, int64_t outgoing)
{
    int64_t pair = outgoing ? r->rank * r->size + peer : peer * r->size + r->rank;
    word *sent = word_at(r, r->mail_flags_offset) + pair * 2 * LINE_WORDS;
    word *taken = sent + LINE_WORDS;
    uint8_t *box = r->segment + r->mail_offset + pair * r->mail_bytes;
    word *own = outgoing ? sent : taken;
    int code = begin(r);
    if (code) return code;
    uint64_t count = atomic_load_explicit(own, memory_order_relaxed);
    int64_t began = now_ns();
    for (int64_t at = 0; at < bytes && !code; at += r->mail_bytes) {
        size_t piece = (size_t)(bytes - at < r->mail_bytes ? bytes - at : r->mail_bytes);
        /* An outgoing piece needs an empty box, an incoming one a full box. */
        code = wait_for(r, outgoing ? taken : sent, count + !outgoing, peer);
        if (code) break;
        if (outgoing) memcpy(box, values + at, piece);
        else memcpy(values + at, box, piece);
        atomic_store_explicit(own, ++count, memory_order_release);
    }
    r->last_wait_ns = now_ns() - began;
    return code;
}
