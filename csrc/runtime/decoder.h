// Tokens of several sequences through a Llama-like model: norms, rotary positions, attention and matrices, without Python between them.
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

// Keys and values of several sequences, with the caller: rows of bytes [slots, L, 2, key heads, room, width].
struct Cache {
    uint8_t *rows;
    int type;               // KeyValue
    ptrdiff_t room, width;
};

// Tokens [first, last) of those that are read together: they follow one another in a sequence, from a position on.
struct Run {
    ptrdiff_t first, last, slot, position;
};

// A model, and what it needs while tokens go through it.
struct Decoder {
    std::vector<Layer> layers;
    const float *norm;      // [H]
    Linear head;
    const float *cosine, *sine;  // [positions, D]
    ptrdiff_t H, heads, key_heads, D, positions;
    ptrdiff_t window;       // positions that attention looks back at; 0: all
    float epsilon, scaling;
    int bytes;              // that inputs of packed matrices are rounded to

    // Let M tokens x [M, H] through all blocks, in place: of each its sequence and its place there, [M]. One reading of the
    // weights serves all, and what becomes of a token does not depend on which others are read with it.
    void read(const Kernels &kernels, float *x, const int64_t *slots, const int64_t *places, ptrdiff_t M, const Cache &cache, int threads);

    // Logits [M, V] after what `read` left of M tokens.
    void finish(const Kernels &kernels, const float *x, ptrdiff_t M, float *logits, int threads);

  private:
    std::vector<float> room_, queries_, gathered_;
    Rounded rounded_;
    void enter(const Kernels &kernels, const Layer &a, const float *x, ptrdiff_t M, float *q, float *k, float *v, int threads);
    void keep(const Kernels &kernels, const Cache &cache, ptrdiff_t layer, const int64_t *slots, const int64_t *places, ptrdiff_t M,
              const Layer &a, float *q, float *k, float *v, int threads) const;
    void attend(const Kernels &kernels, const Cache &cache, ptrdiff_t layer, const std::vector<Run> &runs, const float *q, float *mixed,
                int threads) const;
    void leave(const Kernels &kernels, const Layer &a, const float *mixed, float *x, ptrdiff_t M, int threads);
    void multiply(const Kernels &kernels, const std::vector<const Linear *> &linears, const float *x, ptrdiff_t M,
                  const std::vector<float *> &y, int threads);
    void normalize_rows(const Kernels &kernels, const float *x, const float *weight, ptrdiff_t M, float *to, int threads) const;
    const float *gather(const float *x, ptrdiff_t M, const Linear &a, int threads);
    float *space(size_t size);
    ptrdiff_t at(const Cache &cache, ptrdiff_t slot, ptrdiff_t layer, ptrdiff_t head) const;
};

}  // namespace bitwright
