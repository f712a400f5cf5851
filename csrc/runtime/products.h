// Products of inputs and packed weights, shared out among threads.
#pragma once
#include <vector>

#include "kernels.h"

namespace bitwright {

// Inputs as bytes, and the memory that holds them.
class Rounded {
  public:
    // Round x [M, K], float32 or (half) bfloat16, for weights that are summed over blocks of `block` columns.
    // bytes: 1 or 2 for each; by_row: one scale a row, not one every 256 columns.
    void round(const Kernels &kernels, const void *x, bool half, ptrdiff_t M, ptrdiff_t K, int block, int bytes, bool by_row,
               int threads);

    Inputs inputs{};

  private:
    std::vector<int8_t> bytes_;
    std::vector<int32_t> sums_;
    std::vector<float> scales_;
};

struct Product {
    const Weights *w;
    float *y;  // [M, N] = x w'
};

// Products of several matrices with the same inputs: together one piece of work.
void multiply(const Kernels &kernels, const std::vector<Product> &products, const Inputs &x, int threads);

// Rows of a matrix as floats, up to `last`.
void decode(const Kernels &kernels, const Weights &w, const Decoded &d, ptrdiff_t last, int threads);

// Products with float weights.
void multiply(const Kernels &kernels, const Dense &d, int threads);

}  // namespace bitwright
