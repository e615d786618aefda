/* Random perturbations of float32 weights on a CPU: noise is made, scaled and used in one pass, and
 * made again from its seed in the backward pass. `perturbations.py` states what is computed. At the
 * end, steps of recurrent layers.
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
#define KL_BLOCK 1024 /* weights that are summed in float32 */

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

/* --- elementary functions, relative error about 1e-7 ------------------------------------------ */

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

/* exp for x <= 0 by range reduction and a polynomial (Cephes); 0 below the smallest normal. */
static inline float exponential(float x) {
    float clamped = x < -87.0f ? -87.0f : x;
    float n = rintf(clamped * 1.44269504f);
    float r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    float scale = from_bits((uint32_t)((int32_t)n + 127) << 23);
    return x < -87.0f ? 0.0f : p * scale;
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

/* log(1 + e) / e for 0 <= e <= 1: the polynomial of degree 8 with the least relative error, 3e-8. */
static inline float log1p_ratio(float e) {
    float p = 5.2324179598e-3f;
    p = p * e - 2.9504131342e-2f;
    p = p * e + 7.8224148135e-2f;
    p = p * e - 1.3663092759e-1f;
    p = p * e + 1.9105934797e-1f;
    p = p * e - 2.4842963826e-1f;
    p = p * e + 3.3319094498e-1f;
    p = p * e - 4.9999493030e-1f;
    return p * e + 1.0f;
}

/* log(1 + exp(x)), and its derivative. */
static inline float softplus(float x, float *slope) {
    float e = exponential(-fabsf(x));
    *slope = (x > 0.0f ? 1.0f : e) / (1.0f + e);
    return e * log1p_ratio(e) + (x > 0.0f ? x : 0.0f);
}

/* --- noise ------------------------------------------------------------------------------------ */

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

void normal(int64_t count, uint64_t seed, float *restrict out) {
    FOR_EACH_NORMAL(out[i] = z[i - start])
}

void normal_times(int64_t count, uint64_t seed, const float *restrict x, float factor,
                  float *restrict out) {
    FOR_EACH_NORMAL(out[i] = factor * x[i] * z[i - start])
}

/* Softplus of rho times noise. */
void gaussian(int64_t count, uint64_t seed, const float *restrict rho, float *restrict out) {
    float slope;
    FOR_EACH_NORMAL(out[i] = softplus(rho[i], &slope) * z[i - start])
}

/* The same, and in `grad` the gradient by rho in place of that by the product. */
void gaussian_vjp(int64_t count, uint64_t seed, const float *restrict rho, float *restrict grad,
                  float *restrict out) {
    FOR_EACH_NORMAL(float slope; out[i] = softplus(rho[i], &slope) * z[i - start];
                    grad[i] *= slope * z[i - start])
}

/* Signs, LANES * 32 of them a round, times x where it is given. */
static inline void signs_of_block(int64_t count, uint64_t seed, int64_t begin,
                                  const float *restrict x, float *restrict out) {
    Generators generators;
    seed_block(&generators, seed, (uint64_t)(begin / BLOCK));
    int64_t end = begin + BLOCK < count ? begin + BLOCK : count;
    for (int64_t start = begin; start < end; start += 32 * LANES) {
        uint32_t bits[LANES];
        next_bits(&generators, bits);
        for (int bit = 0; bit < 32; bit++) {
            int64_t at = start + bit * LANES;
            int64_t size = end - at < LANES ? end - at : LANES;
            if (size == LANES) {
                for (int i = 0; i < LANES; i++) {
                    uint32_t sign = (bits[i] << bit) & 0x80000000u;
                    out[at + i] = from_bits((x ? to_bits(x[at + i]) : 0x3f800000u) ^ sign);
                }
            } else {
                for (int i = 0; i < size; i++) {
                    uint32_t sign = (bits[i] << bit) & 0x80000000u;
                    out[at + i] = from_bits((x ? to_bits(x[at + i]) : 0x3f800000u) ^ sign);
                }
            }
        }
    }
}

void signs(int64_t count, uint64_t seed, float *restrict out) {
    for (int64_t begin = 0; begin < count; begin += BLOCK)
        signs_of_block(count, seed, begin, 0, out);
}

void signs_times(int64_t count, uint64_t seed, const float *restrict x, float *restrict out) {
    for (int64_t begin = 0; begin < count; begin += BLOCK)
        signs_of_block(count, seed, begin, x, out);
}

/* --- Kullback-Leibler divergence of N(mean, softplus(rho)^2) from N(0, prior^2) ---------------- */

/* The part of one weight; `slope` is the derivative by rho. */
static inline float kl_of_weight(float mean, float rho, float precision, float *slope) {
    float e = exponential(-fabsf(rho)), ratio = log1p_ratio(e);
    float rest = rho > 0.0f ? rho : 0.0f, std = e * ratio + rest;
    /* Below 0, std = e * ratio may vanish; its logarithm rho + log(ratio), and sigmoid / std, do
     * not. */
    float safe = rho > 0.0f ? std : ratio;
    float log_std = logarithm(safe) + (rho - rest);
    float reciprocal = 1.0f / ((1.0f + e) * safe);
    float sigmoid = (rho > 0.0f ? 1.0f : e) * safe * reciprocal;
    *slope = sigmoid * std * precision - reciprocal;
    return 0.5f * (precision * (std * std + mean * mean) - 1.0f) - log_std;
}

/* Sum over the weights, and `weight` times its derivatives added to the gradients. */
static inline double kl(int64_t count, const float *restrict mean, const float *restrict rho,
                        float prior, float weight, float *restrict grad_mean,
                        float *restrict grad_rho, int with_gradients) {
    float precision = 1.0f / (prior * prior);
    double total = (double)count * log(prior);
    for (int64_t begin = 0; begin < count; begin += KL_BLOCK) {
        int64_t end = begin + KL_BLOCK < count ? begin + KL_BLOCK : count;
        float sums[LANES] = {0};
        for (int64_t start = begin; start < end; start += LANES) {
            int64_t size = end - start < LANES ? end - start : LANES;
            for (int lane = 0; lane < size; lane++) {
                int64_t i = start + lane;
                float slope;
                sums[lane] += kl_of_weight(mean[i], rho[i], precision, &slope);
                if (with_gradients) {
                    grad_mean[i] += weight * precision * mean[i];
                    grad_rho[i] += weight * slope;
                }
            }
        }
        for (int lane = 0; lane < LANES; lane++) total += sums[lane];
    }
    return total;
}

double gaussian_kl(int64_t count, const float *mean, const float *rho, float prior) {
    return kl(count, mean, rho, prior, 0.0f, 0, 0, 0);
}

double gaussian_kl_vjp(int64_t count, const float *mean, const float *rho, float prior,
                       float weight, float *grad_mean, float *grad_rho) {
    return kl(count, mean, rho, prior, weight, grad_mean, grad_rho, 1);
}

/* --- steps of an LSTM and a GRU, see `recurrent_cells.py` ------------------------------------- */

static inline float sigmoid(float x) {
    float e = exponential(-fabsf(x));
    return (x > 0.0f ? 1.0f : e) / (1.0f + e);
}

static inline float hyperbolic_tangent(float x) {
    float e = exponential(-2.0f * fabsf(x));
    return copysignf((1.0f - e) / (1.0f + e), x);
}

void lstm_advance(int64_t rows, int64_t size, float *restrict gates, const float *restrict u,
                  float *restrict kept, float *restrict h, float *restrict c) {
    for (int64_t row = 0; row < rows; row++, gates += 4 * size, u += 4 * size) {
        float *restrict i = gates, *restrict f = gates + size;
        float *restrict g = gates + 2 * size, *restrict o = gates + 3 * size;
        for (int64_t j = 0; j < size; j++) {
            i[j] = sigmoid(i[j] + u[j]);
            f[j] = sigmoid(f[j] + u[j + size]);
            g[j] = hyperbolic_tangent(g[j] + u[j + 2 * size]);
            o[j] = sigmoid(o[j] + u[j + 3 * size]);
            int64_t at = row * size + j;
            kept[at] = c[at];
            c[at] = f[j] * c[at] + i[j] * g[j];
            h[at] = o[j] * hyperbolic_tangent(c[at]);
        }
    }
}

void lstm_retreat(int64_t rows, int64_t size, const float *restrict gates,
                  const float *restrict kept, float *restrict grad_h, float *restrict grad_c,
                  float *restrict grad_a) {
    for (int64_t row = 0; row < rows; row++, gates += 4 * size, grad_a += 4 * size) {
        for (int64_t j = 0; j < size; j++) {
            float i = gates[j], f = gates[j + size];
            float g = gates[j + 2 * size], o = gates[j + 3 * size];
            int64_t at = row * size + j;
            float tanh_c = hyperbolic_tangent(f * kept[at] + i * g);
            float by_c = grad_c[at] + grad_h[at] * o * (1.0f - tanh_c * tanh_c);
            grad_a[j] = by_c * g * i * (1.0f - i);
            grad_a[j + size] = by_c * kept[at] * f * (1.0f - f);
            grad_a[j + 2 * size] = by_c * i * (1.0f - g * g);
            grad_a[j + 3 * size] = grad_h[at] * tanh_c * o * (1.0f - o);
            grad_c[at] = by_c * f;
            grad_h[at] = 0.0f;
        }
    }
}

void gru_advance(int64_t rows, int64_t size, float *restrict gates, const float *restrict u,
                 float *restrict kept, float *restrict h) {
    for (int64_t row = 0; row < rows; row++, gates += 3 * size, u += 3 * size) {
        float *restrict r = gates, *restrict z = gates + size, *restrict n = gates + 2 * size;
        for (int64_t j = 0; j < size; j++) {
            int64_t at = row * size + j;
            kept[at] = u[j + 2 * size];
            r[j] = sigmoid(r[j] + u[j]);
            z[j] = sigmoid(z[j] + u[j + size]);
            n[j] = hyperbolic_tangent(n[j] + r[j] * kept[at]);
            h[at] = n[j] + z[j] * (h[at] - n[j]);
        }
    }
}

void gru_retreat(int64_t rows, int64_t size, const float *restrict gates,
                 const float *restrict kept, const float *restrict hidden,
                 float *restrict grad_h, float *restrict grad_a) {
    for (int64_t row = 0; row < rows; row++, gates += 3 * size, grad_a += 3 * size) {
        for (int64_t j = 0; j < size; j++) {
            float r = gates[j], z = gates[j + size], n = gates[j + 2 * size];
            int64_t at = row * size + j;
            float by_n = grad_h[at] * (1.0f - z) * (1.0f - n * n);
            grad_a[j] = by_n * kept[at] * r * (1.0f - r);
            grad_a[j + size] = grad_h[at] * (hidden[at] - n) * z * (1.0f - z);
            grad_a[j + 2 * size] = by_n;
            grad_h[at] *= z;
        }
    }
}
