#include "runtime/decoder.h"

#include <algorithm>
#include <cmath>

#include "runtime/pool.h"

namespace bitwright {
namespace {

// Rotary positions (arXiv:2104.09864): halves of a head turned against each other.
void rotate(float *x, const float *cosine, const float *sine, ptrdiff_t D) {
    for (ptrdiff_t i = 0, half = D / 2; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + half] = b * cosine[i + half] + a * sine[i + half];
    }
}

// x times an orthonormal Hadamard matrix, in blocks of the largest power of two that divides D; numerics/hadamard.py.
void hadamard(float *x, ptrdiff_t D) {
    const ptrdiff_t block = D & -D;
    for (ptrdiff_t step = 1; step < block; step *= 2)
        for (ptrdiff_t begin = 0; begin < D; begin += 2 * step)
            for (ptrdiff_t i = begin; i < begin + step; i++) {
                const float a = x[i], b = x[i + step];
                x[i] = a + b, x[i + step] = a - b;
            }
    const float root = std::sqrt((float)block);
    for (ptrdiff_t i = 0; i < D; i++) x[i] /= root;
}

// Tokens in runs that attention takes together: `most` at a time.
std::vector<Run> runs_of(const int64_t *slots, const int64_t *places, ptrdiff_t M, ptrdiff_t most) {
    std::vector<Run> runs;
    for (ptrdiff_t m = 0; m < M; m++) {
        const bool follows = m && slots[m] == slots[m - 1] && places[m] == places[m - 1] + 1 && m - runs.back().first < most;
        if (follows) runs.back().last = m + 1;
        else runs.push_back({m, m + 1, (ptrdiff_t)slots[m], (ptrdiff_t)places[m]});
    }
    return runs;
}

// Rows in a piece of work where a row is little: eight, or each thread's share of fewer.
ptrdiff_t some_of(ptrdiff_t M, int threads) { return M < 8 * threads ? (M + threads - 1) / threads : 8; }

void add(float *to, const float *from, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i++) to[i] += from[i];
}

}  // namespace

constexpr ptrdiff_t QUERIES = 24;  // of one key head that are computed together, about: their scores stay in the cache

float *Decoder::space(size_t size) {
    if (room_.size() < size) room_.resize(size);
    return room_.data();
}

void Decoder::normalize_rows(const Kernels &kernels, const float *x, const float *weight, ptrdiff_t M, float *to, int threads) const {
    share_out(M, some_of(M, threads), threads, [&](ptrdiff_t first, ptrdiff_t last) {
        for (ptrdiff_t m = first; m < last; m++) kernels.normalize(x + m * H, weight, H, epsilon, to + m * H);
    });
}

// Inputs x [M, K] in the order of a matrix's columns.
const float *Decoder::gather(const float *x, ptrdiff_t M, const Linear &a, int threads) {
    const ptrdiff_t K = a.K();
    gathered_.resize(M * K);
    share_out(M, some_of(M, threads), threads, [&](ptrdiff_t first, ptrdiff_t last) {
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

ptrdiff_t Decoder::at(const Cache &cache, ptrdiff_t slot, ptrdiff_t layer, ptrdiff_t head) const {
    return ((slot * (ptrdiff_t)layers.size() + layer) * 2 * key_heads + head) * cache.room * cache.width;
}

// A block's first matrices, for tokens x [M, H].
void Decoder::enter(const Kernels &kernels, const Layer &a, const float *x, ptrdiff_t M, float *q, float *k, float *v, int threads) {
    float *normed = space(M * H);
    normalize_rows(kernels, x, a.before, M, normed, threads);
    multiply(kernels, {&a.q, &a.k, &a.v}, normed, M, {q, k, v}, threads);
}

// Queries and keys turned to their positions; keys and values to the cache.
void Decoder::keep(const Kernels &kernels, const Cache &cache, ptrdiff_t layer, const int64_t *slots, const int64_t *places, ptrdiff_t M,
                   const Layer &a, float *q, float *k, float *v, int threads) const {
    const ptrdiff_t Q = heads * D, KV = key_heads * D;
    auto turn = [&](float *head, const float *head_norm, ptrdiff_t place) {
        if (head_norm) kernels.normalize(head, head_norm, D, epsilon, head);
        rotate(head, cosine + place * D, sine + place * D, D);
        if (cache.type == KV_Q4) hadamard(head, D);
    };
    share_out(M, some_of(M, threads), threads, [&](ptrdiff_t first, ptrdiff_t last) {
        for (ptrdiff_t m = first; m < last; m++) {
            for (ptrdiff_t h = 0; h < heads; h++) turn(q + m * Q + h * D, a.q_norm, places[m]);
            for (ptrdiff_t h = 0; h < key_heads; h++) {
                turn(k + m * KV + h * D, a.k_norm, places[m]);
                uint8_t *key = cache.rows + at(cache, slots[m], layer, h) + places[m] * cache.width;
                kernels.keep(k + m * KV + h * D, cache.type, D, key);
                kernels.keep(v + m * KV + h * D, cache.type, D, key + key_heads * cache.room * cache.width);
            }
        }
    });
}

// What the queries of each run mix of the values that they see.
void Decoder::attend(const Kernels &kernels, const Cache &cache, ptrdiff_t layer, const std::vector<Run> &runs, const float *q,
                     float *mixed, int threads) const {
    const ptrdiff_t share = heads / key_heads;
    share_out((ptrdiff_t)runs.size() * key_heads, 1, threads, [&](ptrdiff_t first, ptrdiff_t last) {
        for (ptrdiff_t i = first; i < last; i++) {
            const Run &run = runs[i / key_heads];
            const ptrdiff_t head = i % key_heads, begin = (run.first * heads + head * share) * D, rows = run.last - run.first;
            const uint8_t *keys = cache.rows + at(cache, run.slot, layer, head), *values = keys + key_heads * cache.room * cache.width;
            const ptrdiff_t end = run.position + rows, padded = (window && end > window + rows ? window + rows : end) / 16 * 16 + 32;
            float *near = scratch(32 * D + rows * share * padded).data();
            kernels.attend({q + begin, keys, values, near + 32 * D, near, mixed + begin, scaling, cache.type, rows, heads * D, share, D,
                            cache.width, run.position, window, padded});
        }
    });
}

// A block's second half: what attention mixed [M, heads D] and the MLP are added to x [M, H].
void Decoder::leave(const Kernels &kernels, const Layer &a, const float *mixed, float *x, ptrdiff_t M, int threads) {
    const ptrdiff_t I = a.up.N();
    float *out = space(M * (2 * H + 2 * I)), *normed = out + M * H, *gate = normed + M * H, *up = gate + M * I;
    auto add_out = [&](ptrdiff_t first, ptrdiff_t last) { add(x + first, out + first, last - first); };
    multiply(kernels, {&a.o}, mixed, M, {out}, threads);
    share_out(M * H, 1 << 14, threads, add_out);
    normalize_rows(kernels, x, a.after, M, normed, threads);
    multiply(kernels, {&a.gate, &a.up}, normed, M, {gate, up}, threads);
    share_out(M * I, 1 << 12, threads, [&](ptrdiff_t first, ptrdiff_t last) { kernels.gate(gate, up, first, last); });
    multiply(kernels, {&a.down}, up, M, {out}, threads);
    share_out(M * H, 1 << 14, threads, add_out);
}

void Decoder::finish(const Kernels &kernels, const float *x, ptrdiff_t M, float *logits, int threads) {
    float *normed = space(M * H);
    normalize_rows(kernels, x, norm, M, normed, threads);
    multiply(kernels, {&head}, normed, M, {logits}, threads);
}

void Decoder::read(const Kernels &kernels, float *x, const int64_t *slots, const int64_t *places, ptrdiff_t M, const Cache &cache,
                   int threads) {
    const Awake awake;
    const ptrdiff_t Q = heads * D, KV = key_heads * D, most = QUERIES * key_heads / heads;
    const std::vector<Run> runs = runs_of(slots, places, M, most > 1 ? most : 1);
    queries_.resize(M * (2 * Q + 2 * KV));
    float *q = queries_.data(), *mixed = q + M * Q, *k = mixed + M * Q, *v = k + M * KV;
    for (size_t i = 0; i < layers.size(); i++) {
        enter(kernels, layers[i], x, M, q, k, v, threads);
        keep(kernels, cache, i, slots, places, M, layers[i], q, k, v, threads);
        attend(kernels, cache, i, runs, q, mixed, threads);
        leave(kernels, layers[i], mixed, x, M, threads);
    }
}

}  // namespace bitwright
