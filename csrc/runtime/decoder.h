// One token through a Llama-like model: norms, rotary positions, attention and matrices without Python between them.
#pragma once
#include <vector>

#include "kernels.h"
#include "runtime/products.h"

namespace bitwright {

// A matrix of either kind, and what is added to its products.
struct Linear {
    const Weights *packed;  // or null, and then
    Dense dense;            // w, type, N, K alone
    const float *bias;      // [N] or null
    const int32_t *order;   // [K] the input that each column multiplies, or null: column k input k
    ptrdiff_t N() const { return packed ? packed->N : dense.N; }
    ptrdiff_t K() const { return packed ? packed->K : dense.K; }
};

struct Layer {
    Linear q, k, v, o, gate, up, down;
    const float *before, *after;  // [H] weights of the norms before attention and before the MLP
    const float *q_norm, *k_norm;  // [D] or null: norms of each head (Qwen3)
};

// A model, and what it needs while tokens go through it. Its keys and values lie with the caller: f16 [L, 2, key heads, room, D].
struct Decoder {
    std::vector<Layer> layers;
    const float *norm;      // [H]
    Linear head;
    const float *cosine, *sine;  // [positions, D]
    ptrdiff_t H, heads, key_heads, D, positions, room;
    ptrdiff_t window;       // positions that attention looks back at; 0: all
    float epsilon, scaling;
    int bytes;              // that inputs of packed matrices are rounded to

    // A block's first half for M tokens x [M, H] from a position on: queries q [M, heads D]; keys and values go to the
    // layer's cache [2, key heads, room, D].
    void enter(const Kernels &kernels, const Layer &a, const float *x, ptrdiff_t M, ptrdiff_t position, float *q, uint16_t *cache,
               int threads);

    // Its second half: what attention mixed [M, heads D] and the MLP are added to x [M, H].
    void leave(const Kernels &kernels, const Layer &a, const float *mixed, float *x, ptrdiff_t M, int threads);

    // Logits [V] after one token x [H].
    void finish(const Kernels &kernels, const float *x, float *logits, int threads);

    // All of that for one token x [H], of which nothing is left.
    void step(const Kernels &kernels, float *x, ptrdiff_t position, uint16_t *cache, float *logits, int threads);

  private:
    std::vector<float> room_, queries_, gathered_;
    Rounded rounded_;
    void multiply(const Kernels &kernels, const std::vector<const Linear *> &linears, const float *x, ptrdiff_t M,
                  const std::vector<float *> &y, int threads);
    void normalize_rows(const float *x, const float *weight, ptrdiff_t M, float *to, int threads) const;
    const float *gather(const float *x, ptrdiff_t M, const Linear &a, int threads);
    float *space(size_t size);
};

}  // namespace bitwright
