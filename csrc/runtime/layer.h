// Linear layers and convolutions on codes, shared out among threads.
#pragma once
#include "kernels.h"

namespace bitwright {

// Of images, or rows: those have H = W = 1.
struct Shape { ptrdiff_t B, H, W, C; };

struct Window { ptrdiff_t kernel[2], stride[2], dilation[2], left, right, top, bottom; };

// How inputs are rounded as they come.
struct Rounding { float low, high, inverse; bool zero; };

struct IntegerLayer {
    Codes fixed{};          // what is the same in all calls
    Window window{};
    int tap_rows = 1, tap_columns = 1;
    ptrdiff_t tap_step = 0; // octets from one column of taps to the next
    ptrdiff_t channels = 0; // of all groups

    Shape shape(const Shape &x) const;

    // Codes x, with steps from one to the next along each axis, and the border's code. `out` says where results go.
    void run(const Kernels &kernels, const int8_t *x, const Shape &shape, const ptrdiff_t *step, int border, Codes out, int threads) const;

    // Numbers x, each image or row of which lies together.
    void run(const Kernels &kernels, const float *x, const Shape &shape, const ptrdiff_t *step, const Rounding &rounding, Codes out,
             int threads) const;

    // A recurrent layer whose product with the input this is: x [T, B, K], h [B, H] the first state, c [B, H] the LSTM's cell
    // (in and out) or null -> y [T, B, H].
    void recur(const Kernels &kernels, const IntegerLayer &ofstate, const float *x, const float *h, float *c, float *y, ptrdiff_t T,
               ptrdiff_t B, bool backwards, const Rounding &rounding, int threads) const;

  private:
    void place(const Kernels &kernels, Images &x, int threads) const;
    void multiply(const Kernels &kernels, const Images &x, Codes out, int threads) const;
};

}  // namespace bitwright
