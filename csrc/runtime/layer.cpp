#include "runtime/layer.h"

#include <vector>

#include "runtime/pool.h"

namespace bitwright {
namespace {

constexpr ptrdiff_t ALONE = 1 << 21;    // so few products are done before another thread has woken
constexpr ptrdiff_t TOGETHER = 1 << 15; // numbers that are moved in one go
constexpr ptrdiff_t STEPS_OF = 192;     // rows of inputs of a recurrent layer that are multiplied in one go, before the steps
constexpr ptrdiff_t SLACK = 64;         // octets behind the last that may be read

// What a call needs besides its arguments; kept for the next.
struct Room {
    std::vector<uint8_t> octets, samples, borders;
    std::vector<float> scales, zeros, ofinput, ofstate;
    std::vector<ptrdiff_t> taps;
};

Room &room() {
    static thread_local Room mine;
    return mine;
}

template <class T>
T *at_least(std::vector<T> &v, size_t size) {
    if (v.size() < size) v.resize(size);
    return v.data();
}

}  // namespace

Shape IntegerLayer::shape(const Shape &x) const {
    const ptrdiff_t height = x.H + window.top + window.bottom, width = x.W + window.left + window.right;
    const ptrdiff_t *kernel = window.kernel, *stride = window.stride, *dilation = window.dilation;
    return {x.B, (height - dilation[0] * (kernel[0] - 1) - 1) / stride[0] + 1,
            (width - dilation[1] * (kernel[1] - 1) - 1) / stride[1] + 1, fixed.N};
}

void IntegerLayer::place(const Kernels &kernels, Images &x, int threads) const {
    x.octets = at_least(room().octets, x.B * x.image + SLACK);
    if (x.B * x.image < TOGETHER) threads = 1;
    share_out(x.B * x.height, 1 + TOGETHER / (x.width * x.C), threads,
              [&](ptrdiff_t first, ptrdiff_t last) { kernels.place_codes(x, first, last); });
}

void IntegerLayer::multiply(const Kernels &kernels, const Images &x, Codes out, int threads) const {
    const Shape y = shape({x.B, x.H, x.W, x.C});
    const ptrdiff_t line = x.width * x.C;
    ptrdiff_t *tap = at_least(room().taps, tap_rows * tap_columns);
    for (int i = 0; i < tap_rows * tap_columns; i++)
        tap[i] = i / tap_columns * window.dilation[0] * line + i % tap_columns * tap_step;
    Codes a = fixed;
    a.scales = out.scales, a.zeros = out.zeros, a.y = out.y, a.codes = out.codes, a.low = out.low, a.high = out.high;
    a.octets = x.octets, a.tap = tap, a.rows = y.H, a.columns = y.W, a.M = y.B * y.H * y.W;
    a.image = x.image, a.down = window.stride[0] * line, a.right = window.stride[1] * x.C;
    const ptrdiff_t blocks = a.alone ? 1 : a.N / a.n * ((a.n + 63) / 64), pieces = blocks * ((a.M + CODE_ROWS - 1) / CODE_ROWS);
    if (a.M * a.N * a.groups_of_k * a.taps * a.steps * 4 < ALONE) threads = 1;
    const ptrdiff_t grain = pieces / (8 * (threads > 0 ? threads : 1));  // some for each thread, should one be held up
    share_out(pieces, grain > 1 ? grain : 1, threads, [&](ptrdiff_t first, ptrdiff_t last) { kernels.multiply_codes(a, first, last); });
}

// Images of this shape with their border, not yet placed.
static Images framed(const Shape &s, const ptrdiff_t *step, const Window &w) {
    Images x{};
    for (int i = 0; i < 4; i++) x.step[i] = step[i];
    x.B = s.B, x.H = s.H, x.W = s.W, x.C = s.C, x.top = w.top, x.left = w.left;
    x.height = s.H + w.top + w.bottom, x.width = s.W + w.left + w.right, x.image = x.height * x.width * x.C;
    return x;
}

void IntegerLayer::run(const Kernels &kernels, const int8_t *x, const Shape &shape, const ptrdiff_t *step, int border, Codes out,
                int threads) const {
    Images images = framed(shape, step, window);
    images.x = (const uint8_t *)x, images.flip = 128, images.fixed = (uint8_t)(border + 128);
    place(kernels, images, threads);
    multiply(kernels, images, out, threads);
}

void IntegerLayer::run(const Kernels &kernels, const float *x, const Shape &shape, const ptrdiff_t *step, const Rounding &rounding,
                Codes out, int threads) const {
    Images images = framed(shape, step, window);
    const ptrdiff_t n = shape.H * shape.W * shape.C;
    const bool as_it_lies = images.image == n && (n == shape.C || step[3] == 1);
    Samples samples{x, nullptr, at_least(room().scales, shape.B), nullptr, rounding.low, rounding.high, rounding.inverse, n};
    if (rounding.zero) samples.zero = at_least(room().zeros, shape.B);
    samples.octets = at_least(as_it_lies ? room().octets : room().samples, shape.B * n + SLACK);
    share_out(shape.B, 1 + TOGETHER / (n + 1), shape.B * n < TOGETHER ? 1 : threads,
              [&](ptrdiff_t first, ptrdiff_t last) { kernels.round_samples(samples, first, last); });
    images.x = images.octets = samples.octets;
    if (!as_it_lies) {
        uint8_t *border = at_least(room().borders, shape.B);
        for (ptrdiff_t b = 0; b < shape.B; b++) border[b] = (uint8_t)(128 + (rounding.zero ? (int)samples.zero[b] : 0));
        images.border = border;
        place(kernels, images, threads);
    }
    out.scales = samples.scale, out.zeros = samples.zero;
    multiply(kernels, images, out, threads);
}

void IntegerLayer::recur(const Kernels &kernels, const IntegerLayer &ofstate, const float *x, const float *h, float *c, float *y,
                         ptrdiff_t T, ptrdiff_t B, bool backwards, const Rounding &rounding, int threads) const {
    const ptrdiff_t N = fixed.N, H = ofstate.channels, most = B < STEPS_OF ? STEPS_OF / B : 1;
    const ptrdiff_t of_x[4] = {channels, 0, 0, 1}, of_h[4] = {H, 0, 0, 1};
    Codes some{}, one{};
    some.y = at_least(room().ofinput, most * B * N), one.y = at_least(room().ofstate, B * N);
    for (ptrdiff_t done = 0; done < T; done += most) {
        const ptrdiff_t count = T - done < most ? T - done : most, first = backwards ? T - done - count : done;
        run(kernels, x + first * B * channels, {count * B, 1, 1, channels}, of_x, rounding, some, threads);
        for (ptrdiff_t i = 0; i < count; i++) {
            const ptrdiff_t t = backwards ? count - 1 - i : i;
            ofstate.run(kernels, h, {B, 1, 1, H}, of_h, rounding, one, threads);
            const Gates gates{some.y + t * B * N, one.y, h, c, y + (first + t) * B * H, H};
            share_out(B, 1 + TOGETHER / N, threads, [&](ptrdiff_t from, ptrdiff_t to) { kernels.gates(gates, from, to); });
            h = gates.y;
        }
    }
}

}  // namespace bitwright
