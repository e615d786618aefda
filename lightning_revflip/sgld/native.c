/* Steps of the samplers in one pass over float32 parameters on a CPU: noise is made in the cache,
 * used and forgotten. `optimizers.py` states what is computed.
 */

#include "_random.h"

#define CHUNK 1024 /* normal numbers at a time */

void normal(int64_t count, uint64_t seed, float *restrict out) {
    FOR_EACH_NORMAL(out[i] = z[i - start])
}

/* The numbers that `normal` makes of a seed, in pieces of any size; zeros if there is no noise. */
typedef struct {
    Generators generators;
    uint64_t seed, chunks;
    int64_t used;
    int noisy;
    float z[CHUNK];
} Stream;

static void open_stream(Stream *s, uint64_t seed, int64_t noisy) {
    s->seed = seed, s->chunks = 0, s->used = CHUNK, s->noisy = noisy != 0;
    memset(s->z, 0, sizeof s->z);
}

/* Up to `wanted` numbers; returns how many. */
static int64_t take(Stream *s, int64_t wanted, const float **z) {
    if (s->used == CHUNK) {
        if (s->noisy) {
            if (s->chunks % (BLOCK / CHUNK) == 0)
                seed_block(&s->generators, s->seed, s->chunks / (BLOCK / CHUNK));
            for (int i = 0; i < CHUNK; i += BATCH) next_normal(&s->generators, s->z + i);
            s->chunks++;
        }
        s->used = 0;
    }
    int64_t count = wanted < CHUNK - s->used ? wanted : CHUNK - s->used;
    *z = s->z + s->used;
    s->used += count;
    return count;
}

/* Applies STEP to pieces of `count` values at p, g and z, from `start` on in tensor t. */
#define FOR_EACH_PIECE(STEP)                                                           \
    Stream stream;                                                                     \
    open_stream(&stream, seed, noisy);                                                 \
    for (int64_t t = 0; t < tensors; t++) {                                            \
        for (int64_t start = 0, count; start < sizes[t]; start += count) {             \
            const float *z;                                                            \
            count = take(&stream, sizes[t] - start, &z);                               \
            float *p = params[t] + start;                                              \
            const float *g = grads[t] + start;                                         \
            STEP;                                                                      \
        }                                                                              \
    }

/* --- SGLD ------------------------------------------------------------------------------------- */

static void move_sgld(int64_t count, float *restrict p, const float *restrict g,
                      const float *restrict z, float decay, float drift, float scale) {
    for (int64_t i = 0; i < count; i++) p[i] += scale * z[i] - drift * (g[i] + decay * p[i]);
}

void sgld(int64_t tensors, const int64_t *sizes, float *const *params, float *const *grads,
          uint64_t seed, int64_t noisy, float decay, float drift, float scale) {
    FOR_EACH_PIECE(move_sgld(count, p, g, z, decay, drift, scale))
}

/* --- SGHMC ------------------------------------------------------------------------------------ */

static void move_sghmc(int64_t count, float *restrict p, float *restrict v,
                       const float *restrict g, const float *restrict z, float lr, float decay,
                       float kept, float scale) {
    for (int64_t i = 0; i < count; i++) {
        float kicked = v[i] - lr * (g[i] + decay * p[i]);
        float half = p[i] + 0.5f * kicked;
        v[i] = kept * kicked + scale * z[i];
        p[i] = half + 0.5f * v[i];
    }
}

void sghmc(int64_t tensors, const int64_t *sizes, float *const *params, float *const *grads,
           float *const *velocities, uint64_t seed, int64_t noisy, float lr, float decay,
           float kept, float scale) {
    FOR_EACH_PIECE(
        move_sghmc(count, p, velocities[t] + start, g, z, lr, decay, kept, scale))
}

/* --- PSGLD ------------------------------------------------------------------------------------ */

/* V learns from the gradient before it is used, afterwards, or not. */
enum { BEFORE, AFTER, NEVER };

static void learn(int64_t count, float *restrict average, const float *restrict g,
                  float smoothing) {
    for (int64_t i = 0; i < count; i++)
        average[i] = smoothing * average[i] + (1.0f - smoothing) * g[i] * g[i];
}

static void move_psgld(int64_t count, float *restrict p, const float *restrict average,
                       const float *restrict g, const float *restrict z, float weight,
                       float stabilizer, float decay, float drift, float scale) {
    for (int64_t i = 0; i < count; i++) {
        float preconditioner = 1.0f / (stabilizer + sqrtf(average[i] * weight));
        p[i] += scale * sqrtf(preconditioner) * z[i]
                - drift * preconditioner * (g[i] + decay * p[i]);
    }
}

void psgld(int64_t tensors, const int64_t *sizes, float *const *params, float *const *grads,
           float *const *averages, const float *weights, const int64_t *learns, uint64_t seed,
           int64_t noisy, float smoothing, float stabilizer, float decay, float drift,
           float scale) {
    FOR_EACH_PIECE({
        float *average = averages[t] + start;
        if (learns[t] == BEFORE) learn(count, average, g, smoothing);
        move_psgld(count, p, average, g, z, weights[t], stabilizer, decay, drift, scale);
        if (learns[t] == AFTER) learn(count, average, g, smoothing);
    })
}
