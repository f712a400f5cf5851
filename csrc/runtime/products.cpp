#include "runtime/products.h"

#include <algorithm>

#include "runtime/pool.h"

namespace bitwright {

void Rounded::round(const Kernels &kernels, const void *x, bool half, ptrdiff_t M, ptrdiff_t K, int block, int bytes, bool by_row,
                    int threads) {
    const int height = M < 2 ? 1 : M < 3 ? 2 : M < 5 ? 4 : 8;
    const ptrdiff_t padded = (K + 31) / 32 * 32, rows = (M + height - 1) / height * height, blocks = (padded + block - 1) / block;
    const int repeat = by_row ? (int)blocks : BLOCK / block;
    const ptrdiff_t spans = (blocks + repeat - 1) / repeat;
    bytes_.resize(bytes * rows * padded);
    sums_.resize(rows * blocks);
    scales_.resize(rows * spans);
    int8_t *low = bytes == 2 ? bytes_.data() + rows * padded : nullptr;
    inputs = {x, half, bytes_.data(), low, sums_.data(), scales_.data(), M, K, padded, blocks, spans, height, bytes, block, repeat};
    share_out(rows, rows < 16 ? rows : 8, threads, [&](ptrdiff_t first, ptrdiff_t last) {
        kernels.round_inputs(inputs, scratch(2 * padded).data(), first, last);
    });
}

void multiply(const Kernels &kernels, const std::vector<Product> &products, const Inputs &x, int threads) {
    auto fours_of = [](const Product &p) { return (p.w->N + 63) / 64; };
    ptrdiff_t fours = 0;
    for (const Product &p : products) fours += fours_of(p);
    // Pieces that lie together, so that what is fetched ahead is one's own; a few for each thread, should one be held up.
    const ptrdiff_t grain = fours / (4 * (threads > 0 ? threads : 1));
    share_out(fours, grain > 1 ? grain : 1, threads, [&](ptrdiff_t first, ptrdiff_t last) {
        for (const Product &p : products) {
            const ptrdiff_t own = fours_of(p);
            if (first < own && last > 0) kernels.multiply(*p.w, x, p.y, std::max<ptrdiff_t>(first, 0), std::min(last, own));
            first -= own, last -= own;
        }
    });
}

void decode(const Kernels &kernels, const Weights &w, const Decoded &d, ptrdiff_t last, int threads) {
    const ptrdiff_t begin = d.first / 64, fours = (last + 63) / 64 - begin;
    share_out(fours, 1, threads, [&](ptrdiff_t first, ptrdiff_t last) { kernels.decode(w, d, begin + first, begin + last); });
}

void multiply(const Kernels &kernels, const Dense &d, int threads) {
    share_out(d.N, 64, threads, [&](ptrdiff_t first, ptrdiff_t last) { kernels.dense(d, first, last); });
}

}  // namespace bitwright
