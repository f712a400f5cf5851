#include "decoder.h"

#include <cmath>

#include "pool.h"

namespace bitwright {
namespace {

// Root mean square norm of n numbers (arXiv:1910.07467); to may be x.
void normalize(const float *x, const float *weight, ptrdiff_t n, float epsilon, float *to) {
    float squares[16] = {}, total = 0;  // sixteen sums, which the compiler keeps side by side
    for (ptrdiff_t i = 0; i < n; i++) squares[i % 16] += x[i] * x[i];
    for (float square : squares) total += square;
    const float factor = 1 / std::sqrt(total / (float)n + epsilon);
    for (ptrdiff_t i = 0; i < n; i++) to[i] = x[i] * factor * weight[i];
}

// Rotary positions (arXiv:2104.09864): halves of a head turned against each other.
void rotate(float *x, const float *cosine, const float *sine, ptrdiff_t D) {
    for (ptrdiff_t i = 0, half = D / 2; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + half] = b * cosine[i + half] + a * sine[i + half];
    }
}

void add(float *to, const float *from, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i++) to[i] += from[i];
}

}  // namespace

void Decoder::multiply(const Kernels &kernels, const std::vector<const Linear *> &linears, const float *x, float *const *y,
                       int threads) {
    for (size_t i = 0; i < linears.size(); i++) {
        const Linear &a = *linears[i];
        if (a.packed) {
            const Inputs &now = rounded_.inputs;
            if (i == 0 || now.block != a.packed->block) rounded_.round(kernels, x, false, 1, a.K(), a.packed->block, bytes, false, 1);
            bitwright::multiply(kernels, *a.packed, rounded_.inputs, y[i], threads);
        } else {
            Dense d = a.dense;
            d.x = x, d.y = y[i], d.M = 1;
            share_out(d.N, 64, threads, [&](ptrdiff_t first, ptrdiff_t last) { kernels.dense(d, first, last); });
        }
        if (a.bias) add(y[i], a.bias, a.N());
    }
}

void Decoder::step(const Kernels &kernels, float *x, ptrdiff_t position, float *cache, float *logits, int threads) {
    const ptrdiff_t Q = heads * D, KV = key_heads * D;
    ptrdiff_t widest = 0;
    for (const Layer &layer : layers) widest = layer.up.N() > widest ? layer.up.N() : widest;
    const ptrdiff_t first = window && position >= window ? position - window + 1 : 0, padded = (position + 17 - first) / 16 * 16;
    room_.resize(2 * H + 2 * Q + 2 * KV + 2 * widest + heads * padded);
    float *normed = room_.data(), *out = normed + H, *q = out + H, *k = q + Q, *v = k + KV, *mixed = v + KV, *gate = mixed + Q,
          *up = gate + widest, *scores = up + widest;
    const float *cosine = this->cosine + position * D, *sine = this->sine + position * D;
    for (const Layer &a : layers) {
        float *keys = cache, *values = cache + KV * room;
        cache += 2 * KV * room;
        normalize(x, a.before, H, epsilon, normed);
        float *const qkv[3] = {q, k, v};
        multiply(kernels, {&a.q, &a.k, &a.v}, normed, qkv, threads);
        for (ptrdiff_t h = 0; h < heads; h++) {
            if (a.q_norm) normalize(q + h * D, a.q_norm, D, epsilon, q + h * D);
            rotate(q + h * D, cosine, sine, D);
        }
        for (ptrdiff_t h = 0; h < key_heads; h++) {
            if (a.k_norm) normalize(k + h * D, a.k_norm, D, epsilon, k + h * D);
            rotate(k + h * D, cosine, sine, D);
            for (ptrdiff_t i = 0; i < D; i++) {
                keys[(h * room + position) * D + i] = k[h * D + i];
                values[(h * room + position) * D + i] = v[h * D + i];
            }
        }
        const Attention over{q, keys, values, scores, mixed, scaling, first, position + 1, padded, room, D, heads / key_heads};
        share_out(heads, heads / key_heads, threads, [&](ptrdiff_t begin, ptrdiff_t end) { kernels.attend(over, begin, end); });
        multiply(kernels, {&a.o}, mixed, &out, threads);
        add(x, out, H);
        normalize(x, a.after, H, epsilon, normed);
        float *const both[2] = {gate, up};
        multiply(kernels, {&a.gate, &a.up}, normed, both, threads);
        share_out(a.up.N(), 1024, threads, [&](ptrdiff_t begin, ptrdiff_t end) { kernels.gate(gate, up, begin, end); });
        multiply(kernels, {&a.down}, up, &out, threads);
        add(x, out, H);
    }
    normalize(x, norm, H, epsilon, normed);
    multiply(kernels, {&head}, normed, &logits, threads);
}

}  // namespace bitwright
