/* Random numbers for float32 on a CPU.
 *
 * A seed stands for a stream of numbers, which is cut into blocks that do not depend on each other.
 * Within a block, LANES generators xoshiro128++ (Blackman and Vigna, 2021) run side by side, in
 * loops without branches for the compiler's vectoriser.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define BATCH (2 * LANES) /* Gaussian numbers of one round */
#define BLOCK 16384

/* --- random bits ------------------------------------------------------------------------------ */

typedef struct {
    uint32_t a[LANES], b[LANES], c[LANES], d[LANES];
} Generators;

/* SplitMix64 (Steele, Lea and Flood, 2014): well mixed numbers from consecutive ones. */
static inline uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

static void seed_block(Generators *g, uint64_t seed, uint64_t block) {
    uint64_t state = mix(seed + 0x9e3779b97f4a7c15u) ^ mix(block * 0x9e3779b97f4a7c15u + 1);
    for (int i = 0; i < LANES; i++) {
        uint64_t first = mix(state += 0x9e3779b97f4a7c15u);
        uint64_t second = mix(state += 0x9e3779b97f4a7c15u);
        g->a[i] = (uint32_t)first;
        g->b[i] = (uint32_t)(first >> 32);
        g->c[i] = (uint32_t)second;
        g->d[i] = (uint32_t)(second >> 32) | 1; /* never all zero */
    }
}

static inline uint32_t rotate(uint32_t x, int bits) { return (x << bits) | (x >> (32 - bits)); }

static inline void next_bits(Generators *restrict g, uint32_t *restrict out) {
    for (int i = 0; i < LANES; i++) {
        uint32_t a = g->a[i], b = g->b[i], c = g->c[i], d = g->d[i];
        out[i] = rotate(a + d, 7) + a;
        uint32_t shifted = b << 9;
        c ^= a;
        d ^= b;
        b ^= c;
        a ^= d;
        c ^= shifted;
        d = rotate(d, 11);
        g->a[i] = a, g->b[i] = b, g->c[i] = c, g->d[i] = d;
    }
}

/* --- normal numbers ---------------------------------------------------------------------------- */

static inline float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint32_t to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* log of a positive normal number (Cephes). */
static inline float logarithm(float x) {
    uint32_t bits = to_bits(x);
    /* Mantissa in [sqrt(1/2), sqrt(2)). */
    int32_t exponent = (int32_t)(bits - 0x3f3504f3u) >> 23;
    float m = from_bits(bits - ((uint32_t)exponent << 23)) - 1.0f;
    float e = (float)exponent, square = m * m;
    float p = 7.0376836292e-2f;
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    p = p * m * square + e * -2.12194440e-4f - 0.5f * square;
    return m + p + e * 0.693359375f;
}

/* Standard normal numbers (Box and Muller, 1958), BATCH of them. */
static inline void next_normal(Generators *restrict g, float *restrict out) {
    uint32_t first[LANES], second[LANES];
    next_bits(g, first);
    next_bits(g, second);
    for (int i = 0; i < LANES; i++) {
        float uniform = ((float)(first[i] >> 1) + 0.5f) * 0x1p-31f;
        float radius = sqrtf(-2.0f * logarithm(uniform));
        /* An angle in a quarter around 0, then one of the four quarters. */
        float x = ((float)(int32_t)(second[i] & 0x3fffffffu) - 0x1p29f) * (0x1p-30f * 1.57079633f);
        float s = x * x;
        float sine = x + x * s * (-1.6666654611e-1f + s * (8.3321608736e-3f - s * 1.9515295891e-4f));
        float cosine = 1.0f - 0.5f * s +
                       s * s * (4.1666645683e-2f + s * (-1.3887316255e-3f + s * 2.4433157118e-5f));
        uint32_t swap = (uint32_t)((int32_t)second[i] >> 31);
        uint32_t one = to_bits(sine), other = to_bits(cosine), change = (one ^ other) & swap;
        uint32_t sign = (second[i] << 1) & 0x80000000u;
        out[i] = radius * from_bits(one ^ change ^ sign);
        out[i + LANES] = radius * from_bits(other ^ change ^ sign);
    }
}

/* Applies USE to i = 0..count-1 and z[i - start], the noise there. */
#define FOR_EACH_NORMAL(USE)                                                            \
    for (int64_t begin = 0; begin < count; begin += BLOCK) {                            \
        Generators generators;                                                          \
        seed_block(&generators, seed, (uint64_t)(begin / BLOCK));                       \
        int64_t end = begin + BLOCK < count ? begin + BLOCK : count;                    \
        for (int64_t start = begin; start < end; start += BATCH) {                      \
            float z[BATCH];                                                             \
            next_normal(&generators, z);                                                \
            if (end - start >= BATCH) {                                                 \
                for (int64_t i = start; i < start + BATCH; i++) { USE; }                \
            } else {                                                                    \
                for (int64_t i = start; i < end; i++) { USE; }                          \
            }                                                                           \
        }                                                                               \
    }
