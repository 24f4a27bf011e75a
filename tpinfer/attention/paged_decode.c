/*
 * Attention of decode rows (one query token each) over the paged KV cache, on CPU threads. No
 * Python headers: built with the system compiler and called through ctypes by native_decode.py,
 * which checks shapes and dtypes. OpenMP's threads are torch's own: both name libgomp.so.1.
 *
 * A task is one KV head of one row: the query heads that read it walk its keys in tiles with a
 * running maximum (online softmax: Milakov and Gimelshein, arXiv 1805.02867). Keys and values are
 * read where they lie, as runs of adjoining slots, and turned into float32 one vector at a time.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { F32, BF16, F16, I8, F8 };    /* codes in native_decode.py */

#define TILE 64                     /* keys whose scores are held at once */
#define MOST_GROUP 32               /* query heads a KV head, at most */
#define MOST_DIM 256                /* head dim, at most */

/* Mirrored field by field in native_decode.py. */
struct attention {
    const uint8_t *keys, *values;               /* [K, S, D] of one layer */
    const float *key_scales, *value_scales;     /* [K, S], or NULL */
    const uint8_t *queries;                     /* query_dtype, rows query_stride elements apart */
    uint8_t *out;                               /* query_dtype [T, K * G, D] */
    float *lse;                                 /* [T, K * G], or NULL where nobody asks */
    const int32_t *tokens;                      /* [rows]: where a row's query and result are */
    const int32_t *run_offsets;                 /* [rows + 1]: a row's runs */
    const int32_t *run_starts, *run_lengths;    /* slots */
    int64_t num_rows, num_kv_heads, group_size, head_dim, head_slots, query_stride;
    int64_t query_dtype, cache_dtype, num_threads;
    double scale;
};

int64_t attention_struct_bytes(void) { return sizeof(struct attention); }

int64_t knows_float16(void)
{
#ifdef __FLT16_MAX__
    return 1;
#else
    return 0;
#endif
}

#define INLINE static inline __attribute__((always_inline))

INLINE float from_bits(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }

/* e^x for x <= 0 within 2 ulp: 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes expf). */
INLINE float exp_of(float x)
{
    x = x < -87.0f ? -87.0f : x;
    float n = nearbyintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * from_bits((uint32_t)((int32_t)n + 127) << 23);
}

INLINE void load(float *to, const uint8_t *from, int64_t count, int dtype)
{
    if (dtype == F32) {
        memcpy(to, from, count * 4);
    } else if (dtype == BF16) {
        const uint16_t *bits = (const uint16_t *)from;
        for (int64_t i = 0; i < count; i++) to[i] = from_bits((uint32_t)bits[i] << 16);
    } else if (dtype == F16) {
#ifdef __FLT16_MAX__
        const _Float16 *halves = (const _Float16 *)from;
        for (int64_t i = 0; i < count; i++) to[i] = (float)halves[i];
#endif
    } else if (dtype == I8) {
        const int8_t *bytes = (const int8_t *)from;
        for (int64_t i = 0; i < count; i++) to[i] = (float)bytes[i];
    } else {
        /* e4m3: the exponent is 120 below float32's; the product is exact, subnormals included. */
        for (int64_t i = 0; i < count; i++) {
            uint32_t x = from[i];
            to[i] = from_bits((x & 0x80) << 24 | (x & 0x7f) << 20) * 0x1p120f;
        }
    }
}

INLINE void store(uint8_t *to, const float *from, int64_t count, int dtype)
{
    if (dtype == F32) {
        memcpy(to, from, count * 4);
    } else if (dtype == BF16) {
        uint16_t *bits = (uint16_t *)to;
        for (int64_t i = 0; i < count; i++) {
            uint32_t x;
            memcpy(&x, from + i, 4);
            uint32_t rounded = (x + 0x7fff + ((x >> 16) & 1)) >> 16;  /* to nearest even */
            bits[i] = from[i] != from[i] ? 0x7fc0 : (uint16_t)rounded;
        }
    } else {
#ifdef __FLT16_MAX__
        _Float16 *halves = (_Float16 *)to;
        for (int64_t i = 0; i < count; i++) halves[i] = (_Float16)from[i];
#endif
    }
}

/* Of queries and results, once a task: calls, not copies, so that compiling takes less. */
static __attribute__((noinline)) void load_query(float *to, const uint8_t *from, int64_t count,
                                                 int64_t dtype)
{
    if (dtype == F32) load(to, from, count, F32);
    else if (dtype == BF16) load(to, from, count, BF16);
    else load(to, from, count, F16);
}

static __attribute__((noinline)) void store_result(uint8_t *to, const float *from, int64_t count,
                                                   int64_t dtype)
{
    if (dtype == F32) store(to, from, count, F32);
    else if (dtype == BF16) store(to, from, count, BF16);
    else store(to, from, count, F16);
}

INLINE int64_t width_of(int64_t dtype) { return dtype == F32 ? 4 : dtype <= F16 ? 2 : 1; }

struct progress { float most[MOST_GROUP], total[MOST_GROUP]; };

/* Keys [slot, slot + count) of one head: scores, running maximum, weighted values. */
INLINE void tile(const struct attention *a, int64_t head, int64_t slot, int64_t count,
                 const float *query, float *sums, struct progress *done, int64_t dim,
                 int64_t group, int dtype)
{
    float scores[MOST_GROUP][TILE], vector[MOST_DIM];
    int64_t bytes = dim * width_of(dtype), first = head * a->head_slots + slot;
    const uint8_t *keys = a->keys + first * bytes, *values = a->values + first * bytes;
    for (int64_t n = 0; n < count; n++) {
        load(vector, keys + n * bytes, dim, dtype);
        float factor = (float)a->scale * (a->key_scales ? a->key_scales[first + n] : 1.0f);
        for (int64_t g = 0; g < group; g++) {
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t d = 0; d < dim; d++) sum += query[g * dim + d] * vector[d];
            scores[g][n] = sum * factor;
        }
    }
    for (int64_t g = 0; g < group; g++) {
        float most = done->most[g], total = 0.0f;
        for (int64_t n = 0; n < count; n++) most = scores[g][n] > most ? scores[g][n] : most;
        if (most > done->most[g]) {
            float shrink = done->total[g] > 0.0f ? exp_of(done->most[g] - most) : 0.0f;
            done->most[g] = most;
            done->total[g] *= shrink;
            for (int64_t d = 0; d < dim; d++) sums[g * dim + d] *= shrink;
        }
#pragma omp simd reduction(+ : total)
        for (int64_t n = 0; n < count; n++) {
            float weight = scores[g][n] - most;
            weight = weight != weight ? weight : exp_of(weight);
            scores[g][n] = weight;
            total += weight;
        }
        done->total[g] += total;
    }
    for (int64_t n = 0; n < count; n++) {
        load(vector, values + n * bytes, dim, dtype);
        float factor = a->value_scales ? a->value_scales[first + n] : 1.0f;
        for (int64_t g = 0; g < group; g++) {
            float weight = scores[g][n] * factor;
#pragma omp simd
            for (int64_t d = 0; d < dim; d++) sums[g * dim + d] += weight * vector[d];
        }
    }
}

/* One KV head of one row. */
INLINE void task(const struct attention *a, int64_t row, int64_t head, int64_t dim, int64_t group,
                 int dtype)
{
    float query[MOST_GROUP * MOST_DIM], sums[MOST_GROUP * MOST_DIM];
    struct progress done;
    int64_t token = a->tokens[row], heads = a->num_kv_heads * group;
    int64_t query_width = width_of(a->query_dtype);
    const uint8_t *from = a->queries + (token * a->query_stride + head * group * dim) * query_width;
    load_query(query, from, group * dim, a->query_dtype);
    memset(sums, 0, group * dim * sizeof(float));
    for (int64_t g = 0; g < group; g++) { done.most[g] = -INFINITY; done.total[g] = 0.0f; }
    for (int32_t run = a->run_offsets[row]; run < a->run_offsets[row + 1]; run++) {
        int64_t slot = a->run_starts[run], left = a->run_lengths[run];
        for (; left > 0; slot += TILE, left -= TILE)
            tile(a, head, slot, left < TILE ? left : TILE, query, sums, &done, dim, group, dtype);
    }
    for (int64_t g = 0; g < group; g++) {
        int64_t place = token * heads + head * group + g;
        int nothing = a->run_offsets[row] == a->run_offsets[row + 1];
        float factor = nothing ? 0.0f : 1.0f / done.total[g];
        for (int64_t d = 0; d < dim; d++) sums[g * dim + d] *= factor;
        if (a->lse) a->lse[place] = nothing ? -INFINITY : done.most[g] + logf(done.total[g]);
        store_result(a->out + place * dim * query_width, sums + g * dim, dim, a->query_dtype);
    }
}

/* A copy of the loops for each usual head dim, so that a vector stays in registers. */
#define BY_DTYPE(dim, group)                                                \
    switch (a->cache_dtype) {                                               \
    case F32: task(a, row, head, dim, group, F32); break;                   \
    case BF16: task(a, row, head, dim, group, BF16); break;                 \
    case F16: task(a, row, head, dim, group, F16); break;                   \
    case I8: task(a, row, head, dim, group, I8); break;                     \
    default: task(a, row, head, dim, group, F8);                            \
    }

static void task_64(const struct attention *a, int64_t row, int64_t head)
{
    BY_DTYPE(64, a->group_size)
}

static void task_128(const struct attention *a, int64_t row, int64_t head)
{
    BY_DTYPE(128, a->group_size)
}

static void task_any(const struct attention *a, int64_t row, int64_t head)
{
    BY_DTYPE(a->head_dim, a->group_size)
}

#define SMALL_WORK (1 << 18)

void attend(const struct attention *a)
{
    int64_t num_tasks = a->num_rows * a->num_kv_heads;
    int threads = (int)a->num_threads;
    int64_t num_keys = 0, num_runs = a->run_offsets[a->num_rows];
    for (int64_t i = 0; i < num_runs; i++) num_keys += a->run_lengths[i];
    /* Waking a thread takes longer than so few products. */
    if (num_keys * a->num_kv_heads * a->group_size * a->head_dim < SMALL_WORK) threads = 1;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < num_tasks; i++) {
        int64_t row = i / a->num_kv_heads, head = i % a->num_kv_heads;
        if (a->head_dim == 128) task_128(a, row, head);
        else if (a->head_dim == 64) task_64(a, row, head);
        else task_any(a, row, head);
    }
}
