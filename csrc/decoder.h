// One token through a Llama-like model: norms, rotary positions, attention and matrices without Python between them.
#pragma once
#include <vector>

#include "kernels.h"
#include "products.h"

namespace bitwright {

// A matrix of either kind, and what is added to its products.
struct Linear {
    const Weights *packed;  // or null, and then
    Dense dense;            // w, type, N, K alone
    const float *bias;      // [N] or null
    ptrdiff_t N() const { return packed ? packed->N : dense.N; }
    ptrdiff_t K() const { return packed ? packed->K : dense.K; }
};

struct Layer {
    Linear q, k, v, o, gate, up, down;
    const float *before, *after;  // [H] weights of the norms before attention and before the MLP
    const float *q_norm, *k_norm;  // [D] or null: norms of each head (Qwen3)
};

// Keys and values of T positions so far, [L][2][heads][room][D].
struct Decoder {
    std::vector<Layer> layers;
    const float *norm;      // [H]
    Linear head;
    const float *cosine, *sine;  // [positions, D]
    ptrdiff_t H, heads, key_heads, D, positions, room;
    ptrdiff_t window;       // positions that attention looks back at; 0: all
    float epsilon, scaling;
    int bytes;              // that inputs of packed matrices are rounded to

    // x [H], of which nothing is left, at this position: logits [V]. cache [L, 2, key_heads, room, D].
    void step(const Kernels &kernels, float *x, ptrdiff_t position, float *cache, float *logits, int threads);

  private:
    std::vector<float> room_;
    Rounded rounded_;
    void multiply(const Kernels &kernels, const std::vector<const Linear *> &linears, const float *x, float *const *y, int threads);
};

}  // namespace bitwright
