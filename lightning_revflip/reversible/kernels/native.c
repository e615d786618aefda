/* Element-wise half-steps of RevGRU and RevLSTM on a CPU, one function for what takes torch some
 * thirty calls. `cells.py` states what is computed and is the specification; compiled on first use
 * by `native.py`.
 *
 * n rows, h units per half. Floats are float32; states and buffers are float64 that hold integers,
 * as everywhere in the package. Rows of `projected` and `grad_projected` are `stride` apart, all
 * other arrays are dense. Loops without branches are written for the compiler's vectoriser.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define GATE 1024.0
#define EMIT 2097152.0  /* 2^21: a word is due where b >= z * EMIT */
#define LOWEST 32768.0  /* 2^15: a word is missing where b < LOWEST */
#define SIGN 32768      /* words are unsigned, int16 is not */

/* exp by range reduction and a polynomial (Cephes), relative error below 1e-7. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 87.0f ? 87.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

static inline float hyperbolic_tangent(float x) { return 2.0f * sigmoid(2.0f * x) - 1.0f; }

/* A gate limited from below and rounded to multiples of 1/1024. */
static inline float limited(float s, float floor_, float lowest) {
    float scaled = rintf(s * (1024.0f * (1.0f - floor_)) + 1024.0f * floor_);
    scaled = scaled < lowest ? lowest : scaled > 1023.0f ? 1023.0f : scaled;
    return scaled * (1.0f / 1024.0f);
}

void sigmoids(int64_t count, const float *x, float *out) {
    for (int64_t i = 0; i < count; i++) out[i] = sigmoid(x[i]);
}

/* state <- state * gate, losslessly; returns the number of words pushed. Units take turns with the
 * `lanes` numbers in b. */
int64_t multiply(int64_t count, int64_t lanes, double *restrict state, double *restrict b,
                 const float *restrict gate, int16_t *restrict words) {
    int64_t pushed = 0;
    for (int64_t start = 0; start < count; start += lanes) {
        int64_t size = count - start < lanes ? count - start : lanes;
        double *restrict h = state + start;
        const float *restrict g = gate + start;
        for (int64_t i = 0; i < size; i++) {
            double z = GATE * g[i];
            if (b[i] >= z * EMIT) {
                int64_t value = (int64_t)b[i];
                words[pushed++] = (int16_t)((value & 65535) - SIGN);
                b[i] = (double)(value >> 16);
            }
        }
        for (int64_t i = 0; i < size; i++) {
            double z = GATE * g[i];
            double quotient = floor(b[i] / z);
            double product = b[i] - quotient * z + h[i] * z;
            double kept = floor(product * (1.0 / GATE));
            b[i] = quotient * GATE + (product - kept * GATE);
            h[i] = kept;
        }
    }
    return pushed;
}

/* Undoes `multiply` with the words below `words + available`; returns how many it took, or -1 if
 * there were not enough. */
int64_t divide(int64_t count, int64_t lanes, double *restrict state, double *restrict b,
               const float *restrict gate, const int16_t *restrict words, int64_t available) {
    int64_t popped = 0;
    for (int64_t start = count ? (count - 1) / lanes * lanes : -1; start >= 0; start -= lanes) {
        int64_t size = count - start < lanes ? count - start : lanes;
        double *restrict h = state + start;
        const float *restrict g = gate + start;
        for (int64_t i = 0; i < size; i++) {
            double z = GATE * g[i];
            double quotient = floor(b[i] * (1.0 / GATE));
            double product = h[i] * GATE + (b[i] - quotient * GATE);
            double restored = floor(product / z);
            b[i] = quotient * z + (product - restored * z);
            h[i] = restored;
        }
        for (int64_t i = size - 1; i >= 0; i--) {
            if (b[i] < LOWEST) {
                if (popped == available) return -1;
                popped++;
                b[i] = b[i] * 65536.0 + (double)(words[available - popped] + SIGN);
            }
        }
    }
    return popped;
}

/* --- RevLSTM: rows of 5h activations z, p, f, o, g; states [c | h] ---------------------------- */

void lstm_gates(int64_t n, int64_t h, float *restrict act, const float *restrict projected, int64_t stride,
                float floor_, float lowest, float *restrict gate) {
    for (int64_t r = 0; r < n; r++) {
        float *a = act + r * 5 * h, *z = gate + r * 2 * h;
        const float *p = projected + r * stride;
        for (int64_t j = 0; j < 4 * h; j++) a[j] = sigmoid(a[j] + p[j]);
        for (int64_t j = 4 * h; j < 5 * h; j++) a[j] = hyperbolic_tangent(a[j] + p[j]);
        for (int64_t j = 0; j < 2 * h; j++) z[j] = limited(a[j], floor_, lowest);
    }
}

void lstm_add(int64_t n, int64_t h, const float *act, double *state, double one) {
    double unit = 1.0 / one;
    for (int64_t r = 0; r < n; r++) {
        const float *f = act + r * 5 * h + 2 * h, *o = f + h, *g = o + h;
        double *c = state + r * 2 * h, *s = c + h;
        for (int64_t j = 0; j < h; j++) {
            c[j] += rint(f[j] * g[j] * one);
            s[j] += rint(o[j] * hyperbolic_tangent((float)(c[j] * unit)) * one);
        }
    }
}

void lstm_subtract(int64_t n, int64_t h, const float *act, double *state, double one,
                   float *tanh_c) {
    double unit = 1.0 / one;
    for (int64_t r = 0; r < n; r++) {
        const float *f = act + r * 5 * h + 2 * h, *o = f + h, *g = o + h;
        double *c = state + r * 2 * h, *s = c + h;
        for (int64_t j = 0; j < h; j++) {
            float t = hyperbolic_tangent((float)(c[j] * unit));
            s[j] -= rint(o[j] * t * one);
            c[j] -= rint(f[j] * g[j] * one);
            tanh_c[r * h + j] = t;
        }
    }
}

/* One of the states of each row as floats: the columns first..first + h of rows of `width`. */
void to_float(int64_t n, int64_t h, const double *state, int64_t width, int64_t first, double one,
              float *out) {
    double unit = 1.0 / one;
    for (int64_t r = 0; r < n; r++)
        for (int64_t j = 0; j < h; j++)
            out[r * h + j] = (float)(state[r * width + first + j] * unit);
}

void lstm_vjp(int64_t n, int64_t h, const float *restrict act, const float *restrict gate, const float *restrict old_h,
              const float *restrict old_c, const float *restrict tanh_c, const float *restrict grad_h, const float *restrict grad_c,
              float slope, float *restrict grad_projected, int64_t stride, float *restrict grad_old_h,
              float *restrict grad_old_c) {
    for (int64_t r = 0; r < n; r++) {
        const float *sz = act + r * 5 * h, *sp = sz + h, *f = sp + h, *o = f + h, *g = o + h;
        const float *z = gate + r * 2 * h, *p = z + h;
        float *out = grad_projected + r * stride;
        for (int64_t j = 0; j < h; j++) {
            int64_t i = r * h + j;
            float dh = grad_h[i], t = tanh_c[i];
            float dc = grad_c[i] + dh * o[j] * (1.0f - t * t);
            out[j] = dc * old_c[i] * slope * sz[j] * (1.0f - sz[j]);
            out[h + j] = dh * old_h[i] * slope * sp[j] * (1.0f - sp[j]);
            out[2 * h + j] = dc * g[j] * f[j] * (1.0f - f[j]);
            out[3 * h + j] = dh * t * o[j] * (1.0f - o[j]);
            out[4 * h + j] = dc * f[j] * (1.0f - g[j] * g[j]);
            grad_old_c[i] = dc * z[j];
            grad_old_h[i] = dh * p[j];
        }
    }
}

/* --- RevGRU: rows of 2h activations r, z, and h of g ------------------------------------------ */

void gru_reset(int64_t n, int64_t h, float *restrict act, const float *restrict projected, int64_t stride,
               const float *restrict other, float floor_, float lowest, float *restrict gate, float *restrict reset_other) {
    for (int64_t r = 0; r < n; r++) {
        float *a = act + r * 2 * h;
        const float *p = projected + r * stride;
        for (int64_t j = 0; j < 2 * h; j++) a[j] = sigmoid(a[j] + p[j]);
        for (int64_t j = 0; j < h; j++) {
            gate[r * h + j] = limited(a[h + j], floor_, lowest);
            reset_other[r * h + j] = a[j] * other[r * h + j];
        }
    }
}

void gru_candidate(int64_t n, int64_t h, float *g, const float *projected, int64_t stride) {
    for (int64_t r = 0; r < n; r++)
        for (int64_t j = 0; j < h; j++)
            g[r * h + j] = hyperbolic_tangent(g[r * h + j] + projected[r * stride + 2 * h + j]);
}

/* state <- state + (1 - gate) * g, where `one` stands for 1; a negative `one` subtracts. */
void gru_add(int64_t count, const float *gate, const float *g, double *state, double one) {
    for (int64_t i = 0; i < count; i++) state[i] += rint((1.0f - gate[i]) * g[i] * one);
}

void gru_vjp_candidate(int64_t n, int64_t h, const float *restrict gate, const float *restrict g, const float *restrict grad,
                       float *restrict grad_g, float *restrict grad_projected, int64_t stride) {
    for (int64_t r = 0; r < n; r++)
        for (int64_t j = 0; j < h; j++) {
            int64_t i = r * h + j;
            grad_g[i] = grad[i] * (1.0f - gate[i]) * (1.0f - g[i] * g[i]);
            grad_projected[r * stride + 2 * h + j] = grad_g[i];
        }
}

void gru_vjp_gates(int64_t n, int64_t h, const float *restrict act, const float *restrict gate, const float *restrict g,
                   const float *restrict old, const float *restrict other, const float *restrict grad,
                   const float *restrict grad_reset_other, float slope, float *restrict grad_projected, int64_t stride, float *restrict grad_old, float *restrict grad_other) {
    for (int64_t r = 0; r < n; r++) {
        const float *reset = act + r * 2 * h, *s = reset + h;
        float *out = grad_projected + r * stride;
        for (int64_t j = 0; j < h; j++) {
            int64_t i = r * h + j;
            out[j] = grad_reset_other[i] * other[i] * reset[j] * (1.0f - reset[j]);
            out[h + j] = grad[i] * (old[i] - g[i]) * slope * s[j] * (1.0f - s[j]);
            grad_old[i] = grad[i] * gate[i];
            grad_other[i] = grad_reset_other[i] * reset[j];
        }
    }
}
