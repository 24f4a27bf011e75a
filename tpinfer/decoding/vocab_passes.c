/*
 * The passes over rows as long as the vocabulary, on CPU threads: the largest logit, and the masses
 * of masses.py. No Python headers: built with the system compiler and called through ctypes by
 * native_passes.py, which checks shapes and dtypes. OpenMP's threads are torch's own.
 *
 * Every float32 operation below is rounded by itself (-ffp-contract=off) and stands in the same
 * order in masses.py, so both give the same bits, on any processor.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define CHUNK 128                   /* masses.py */
#define SMALL_WORK 65536            /* logits for which threads are not worth waking */
#define NO_KEY INT64_MIN            /* ordered_keys.py */
#define NAN_KEY INT64_MAX
#define FULL_MASS 4398046511104.0f  /* 2^42 */

/* Mirrored field by field in native_passes.py. */
struct vocab_rows {
    const float *logits;            /* rows `row_stride` elements apart */
    const int64_t *rows;            /* [num_rows]: which rows */
    const float *highest, *factor, *min_p;  /* [num_rows] */
    const float *cut_value;         /* [num_rows], or NULL: nothing is cut */
    const int64_t *cut_id;          /* [num_rows] */
    const int64_t *places;          /* [num_rows]: for tokens_at */
    int64_t *sums;                  /* [num_rows, chunks]: written by sum_masses */
    int64_t *out;                   /* keys, masses or tokens */
    int64_t num_rows, width, row_stride, first, num_threads;
};

int64_t vocab_rows_struct_bytes(void) { return sizeof(struct vocab_rows); }

#define INLINE static inline __attribute__((always_inline))

INLINE int32_t bits_of(float x) { int32_t bits; memcpy(&bits, &x, 4); return bits; }
INLINE float from_bits(int32_t bits) { float x; memcpy(&x, &bits, 4); return x; }

/* masses.py:masses, as a whole float32. */
INLINE float mass_of(float logit, float highest, float factor, float least)
{
    float x = (logit - highest) * factor;
    x = x > -30.0f ? x : -30.0f;
    float n = nearbyintf(x * 1.44269504f);
    float r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    float mass = p * from_bits(((int32_t)n + 42 + 127) << 23);
    return mass >= least ? floorf(mass) : 0.0f;
}

/* The masses of one chunk of `count` logits, the rest of CHUNK zero. `id` is the first one's. */
INLINE void chunk_masses(const struct vocab_rows *a, int64_t row, int64_t chunk, float *mass)
{
    int64_t start = chunk * CHUNK, left = a->width - start;
    int64_t count = left < CHUNK ? left : CHUNK;
    const float *logits = a->logits + a->rows[row] * a->row_stride + start;
    float highest = a->highest[row], factor = a->factor[row], least = a->min_p[row] * FULL_MASS;
    if (count == CHUNK) {
        for (int i = 0; i < CHUNK; i++)
            mass[i] = mass_of(logits[i], highest, factor, least);
    } else {
        for (int i = 0; i < CHUNK; i++)
            mass[i] = 0;
        for (int i = 0; i < count; i++)
            mass[i] = mass_of(logits[i], highest, factor, least);
    }
    if (a->cut_value) {
        float value = a->cut_value[row];
        int64_t last = a->cut_id[row] - a->first - start;   /* of those that equal it */
        for (int64_t i = 0; i < count; i++)
            if (!(logits[i] > value || (logits[i] == value && i <= last)))
                mass[i] = 0;
    }
}

INLINE int64_t sum_of(const float *mass)
{
    double lane[16] = {0};          /* whole numbers below 2^53: exact in any order */
    for (int i = 0; i < CHUNK; i += 16)
        for (int j = 0; j < 16; j++)
            lane[j] += mass[i + j];
    double total = 0;
    for (int j = 0; j < 16; j++)
        total += lane[j];
    return (int64_t)total;
}

/* sums[row, chunk] = the chunk's mass. */
void sum_masses(struct vocab_rows *a)
{
    int64_t chunks = (a->width + CHUNK - 1) / CHUNK;
#pragma omp parallel for collapse(2) num_threads(a->num_threads) \
    if (a->num_threads > 1 && a->num_rows * a->width > SMALL_WORK)
    for (int64_t row = 0; row < a->num_rows; row++)
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            float mass[CHUNK];
            chunk_masses(a, row, chunk, mass);
            a->sums[row * chunks + chunk] = sum_of(mass);
        }
}

/* out[row, column] = the column's mass. */
void list_masses(struct vocab_rows *a)
{
    int64_t chunks = (a->width + CHUNK - 1) / CHUNK;
#pragma omp parallel for collapse(2) num_threads(a->num_threads) \
    if (a->num_threads > 1 && a->num_rows * a->width > SMALL_WORK)
    for (int64_t row = 0; row < a->num_rows; row++)
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            float mass[CHUNK];
            chunk_masses(a, row, chunk, mass);
            int64_t start = chunk * CHUNK, left = a->width - start;
            int64_t *out = a->out + row * a->width + start;
            for (int64_t i = 0; i < (left < CHUNK ? left : CHUNK); i++)
                out[i] = (int64_t)mass[i];
        }
}

/* out[row] = the token whose mass covers places[row], counted from this rank's first mass. */
void tokens_at(struct vocab_rows *a)
{
    int64_t chunks = (a->width + CHUNK - 1) / CHUNK;
    for (int64_t row = 0; row < a->num_rows; row++) {
        int64_t place = a->places[row], chunk = 0, column = 0;
        const int64_t *sums = a->sums + row * chunks;
        while (chunk < chunks - 1 && place >= sums[chunk])
            place -= sums[chunk++];
        float mass[CHUNK];
        chunk_masses(a, row, chunk, mass);
        while (column < CHUNK - 1 && place >= (int64_t)mass[column])
            place -= (int64_t)mass[column++];
        column += chunk * CHUNK;
        a->out[row] = a->first + (column < a->width ? column : a->width - 1);
    }
}

/* ordered_keys.py:ordered_bits. */
INLINE int32_t ordered(float x)
{
    int32_t bits = bits_of(x + 0.0f);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

INLINE int64_t best_key(const float *logits, int64_t width, int64_t first)
{
    int32_t best = INT32_MIN;
    int64_t found = 0;
    for (int64_t start = 0; start < width; start += 1024) {
        int64_t stop = start + 1024 < width ? start + 1024 : width;
        int32_t highest = INT32_MIN, magnitude = 0;
        for (int64_t i = start; i < stop; i++) {
            int32_t key = ordered(logits[i]), size = bits_of(logits[i]) & 0x7fffffff;
            highest = key > highest ? key : highest;
            magnitude = size > magnitude ? size : magnitude;
        }
        if (magnitude > 0x7f800000)
            return NAN_KEY;
        if (highest > best) {       /* a later equal one does not count */
            best = highest;
            found = start;
        }
    }
    while (found < width - 1 && ordered(logits[found]) != best)
        found++;
    if (!width)
        return NO_KEY;
    return (int64_t)((uint64_t)(int64_t)best << 32) + (0xffffffffLL - first - found);
}

/* out[row] = the key of the row's largest logit. */
void best_keys(struct vocab_rows *a)
{
#pragma omp parallel for num_threads(a->num_threads) \
    if (a->num_threads > 1 && a->num_rows * a->width > SMALL_WORK)
    for (int64_t row = 0; row < a->num_rows; row++)
        a->out[row] = best_key(a->logits + a->rows[row] * a->row_stride, a->width, a->first);
}
