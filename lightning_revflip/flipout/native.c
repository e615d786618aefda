/* Random perturbations of float32 weights on a CPU: noise is made, scaled and used in one pass, and
 * made again from its seed in the backward pass. `perturbations.py` states what is computed. At the
 * end, steps of recurrent layers.
 */

#include "_random.h"

#define KL_BLOCK 1024 /* weights that are summed in float32 */

/* --- elementary functions, relative error about 1e-7 ------------------------------------------ */

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
