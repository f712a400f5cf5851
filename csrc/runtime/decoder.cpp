#include "runtime/decoder.h"

#include <algorithm>
#include <cmath>

#include "runtime/pool.h"

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

constexpr ptrdiff_t ROWS = 8;  // a piece of work where a row is little

float *Decoder::space(size_t size) {
    if (room_.size() < size) room_.resize(size);
    return room_.data();
}

void Decoder::normalize_rows(const float *x, const float *weight, ptrdiff_t M, float *to, int threads) const {
    share_out(M, ROWS, threads, [&](ptrdiff_t first, ptrdiff_t last) {
        for (ptrdiff_t m = first; m < last; m++) normalize(x + m * H, weight, H, epsilon, to + m * H);
    });
}

// Inputs x [M, K] in the order of a matrix's columns.
const float *Decoder::gather(const float *x, ptrdiff_t M, const Linear &a, int threads) {
    const ptrdiff_t K = a.K();
    gathered_.resize(M * K);
    share_out(M, ROWS, threads, [&](ptrdiff_t first, ptrdiff_t last) {
        for (ptrdiff_t m = first; m < last; m++)
            for (ptrdiff_t k = 0; k < K; k++) gathered_[m * K + k] = x[m * K + a.order[k]];
    });
    return gathered_.data();
}

void Decoder::multiply(const Kernels &kernels, const std::vector<const Linear *> &linears, const float *x, ptrdiff_t M,
                       const std::vector<float *> &y, int threads) {
    int block = 0;  // for which x lies there in bytes already
    std::vector<Product> ready;
    auto run = [&] {
        bitwright::multiply(kernels, ready, rounded_.inputs, threads);
        ready.clear();
    };
    for (size_t i = 0; i < linears.size(); i++) {
        const Linear &a = *linears[i];
        if (!a.packed) {
            Dense d = a.dense;
            d.x = x, d.y = y[i], d.M = M;
            bitwright::multiply(kernels, d, threads);
            continue;
        }
        if (a.order || block != a.packed->block) {
            run();
            rounded_.round(kernels, a.order ? gather(x, M, a, threads) : x, false, M, a.K(), block = a.packed->block, bytes, false, threads);
        }
        ready.push_back({a.packed, y[i]});
        if (a.order) block = 0;  // nobody else's
    }
    run();
    for (size_t i = 0; i < linears.size(); i++)
        if (const Linear &a = *linears[i]; a.bias)
            for (ptrdiff_t m = 0; m < M; m++) add(y[i] + m * a.N(), a.bias, a.N());
}

void Decoder::enter(const Kernels &kernels, const Layer &a, const float *x, ptrdiff_t M, ptrdiff_t position, float *q, uint16_t *cache,
                    int threads) {
    const ptrdiff_t Q = heads * D, KV = key_heads * D;
    float *normed = space(M * (H + 2 * KV)), *k = normed + M * H, *v = k + M * KV;
    normalize_rows(x, a.before, M, normed, threads);
    multiply(kernels, {&a.q, &a.k, &a.v}, normed, M, {q, k, v}, threads);
    auto turn = [&](float *head, const float *head_norm, ptrdiff_t at) {
        if (head_norm) normalize(head, head_norm, D, epsilon, head);
        rotate(head, cosine + at * D, sine + at * D, D);
    };
    share_out(M, ROWS, threads, [&](ptrdiff_t first, ptrdiff_t last) {
        for (ptrdiff_t m = first; m < last; m++) {
            for (ptrdiff_t h = 0; h < heads; h++) turn(q + m * Q + h * D, a.q_norm, position + m);
            for (ptrdiff_t h = 0; h < key_heads; h++) {
                turn(k + m * KV + h * D, a.k_norm, position + m);
                uint16_t *key = cache + (h * room + position + m) * D, *value = key + KV * room;
                kernels.halve(k + m * KV + h * D, key, D);
                kernels.halve(v + m * KV + h * D, value, D);
            }
        }
    });
}

void Decoder::leave(const Kernels &kernels, const Layer &a, const float *mixed, float *x, ptrdiff_t M, int threads) {
    const ptrdiff_t I = a.up.N();
    float *out = space(M * (2 * H + 2 * I)), *normed = out + M * H, *gate = normed + M * H, *up = gate + M * I;
    auto add_out = [&](ptrdiff_t first, ptrdiff_t last) { add(x + first, out + first, last - first); };
    multiply(kernels, {&a.o}, mixed, M, {out}, threads);
    share_out(M * H, 1 << 14, threads, add_out);
    normalize_rows(x, a.after, M, normed, threads);
    multiply(kernels, {&a.gate, &a.up}, normed, M, {gate, up}, threads);
    share_out(M * I, 1 << 12, threads, [&](ptrdiff_t first, ptrdiff_t last) { kernels.gate(gate, up, first, last); });
    multiply(kernels, {&a.down}, up, M, {out}, threads);
    share_out(M * H, 1 << 14, threads, add_out);
}

void Decoder::finish(const Kernels &kernels, const float *x, float *logits, int threads) {
    float *normed = space(H);
    normalize(x, norm, H, epsilon, normed);
    multiply(kernels, {&head}, normed, 1, {logits}, threads);
}

void Decoder::step(const Kernels &kernels, float *x, ptrdiff_t position, uint16_t *cache, float *logits, int threads) {
    const ptrdiff_t first = window && position >= window ? position - window + 1 : 0, padded = (position + 17 - first) / 16 * 16;
    const ptrdiff_t Q = heads * D, KV = key_heads * D;
    queries_.resize(2 * Q + heads * padded);
    float *q = queries_.data(), *mixed = q + Q, *scores = mixed + Q;
    for (const Layer &a : layers) {
        enter(kernels, a, x, 1, position, q, cache, threads);
        const Attention over{q, cache, cache + KV * room, scores, mixed, scaling, first, position + 1, padded, room, D, heads / key_heads};
        share_out(heads, heads / key_heads, threads, [&](ptrdiff_t begin, ptrdiff_t end) { kernels.attend(over, begin, end); });
        leave(kernels, a, mixed, x, 1, threads);
        cache += 2 * KV * room;
    }
    finish(kernels, x, logits, threads);
}

}  // namespace bitwright
