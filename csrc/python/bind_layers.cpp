// Layers on codes: shapes checked, Python's face.
#include "python/bind.h"
#include "runtime/layer.h"

#include <array>
#include <memory>
#include <nanobind/stl/array.h>

namespace bitwright {
namespace {

using Bytes = nb::ndarray<const int8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Wholes = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Numbers = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using CodesIn = nb::ndarray<const int8_t, nb::device::cpu>;
using NumbersIn = nb::ndarray<const float, nb::device::cpu>;
using CodesOut = nb::ndarray<int8_t, nb::device::cpu>;
using NumbersOut = nb::ndarray<float, nb::device::cpu>;

// A layer and the arrays it lies in.
struct HeldLayer {
    IntegerLayer layer;
    Bytes w;
    Wholes start;
    Numbers scale, constant, sums;
};

using Pair = std::array<ptrdiff_t, 2>;

HeldLayer make_layer(Bytes w, Wholes start, Numbers scale, Numbers constant, Numbers sums, ptrdiff_t N, ptrdiff_t groups, ptrdiff_t C,
                ptrdiff_t groups_of_k, Pair taps, ptrdiff_t tap_step, int steps, Pair kernel, Pair stride, Pair dilation,
                std::array<ptrdiff_t, 4> padding) {
    require(N > 0 && groups > 0 && N % groups == 0 && C > 0, "N must be a multiple of groups, C above 0");
    require(groups_of_k > 0 && taps[0] > 0 && taps[1] > 0 && taps[0] * taps[1] % groups_of_k == 0, "groups_of_k must share taps evenly");
    require(steps > 0 && tap_step >= 0, "steps must be above 0, tap_step not below");
    for (int i = 0; i < 2; i++) require(kernel[i] > 0 && stride[i] > 0 && dilation[i] > 0, "kernel, stride, dilation must be above 0");
    for (ptrdiff_t each : padding) require(each >= 0, "padding must not be below 0");
    HeldLayer h{{}, w, start, scale, constant, sums};
    IntegerLayer &a = h.layer;
    Codes &f = a.fixed;
    f.alone = groups == N && C == 1 && groups > 1;
    f.N = N, f.n = f.alone ? N : N / groups, f.C = C, f.groups_of_k = (int)groups_of_k;
    f.taps = (int)(taps[0] * taps[1] / groups_of_k), f.steps = steps;
    const size_t rows = (f.alone ? 1 : groups) * ((f.n + 15) / 16) * 16;
    require(w.shape(0) == rows * groups_of_k * f.taps * (f.alone ? 1 : 4 * steps), "w must hold every output, padded to 16");
    require(start.shape(0) == rows * groups_of_k && scale.shape(0) == rows * groups_of_k, "start, scale: [outputs, groups_of_k]");
    require(constant.shape(0) == rows && sums.shape(0) == rows, "constant and sums: [outputs]");
    f.w = w.data(), f.start = start.data(), f.scale = scale.data(), f.constant = constant.data(), f.sums = sums.data();
    a.window = {{kernel[0], kernel[1]}, {stride[0], stride[1]}, {dilation[0], dilation[1]}, padding[0], padding[1], padding[2], padding[3]};
    a.tap_rows = (int)taps[0], a.tap_columns = (int)taps[1], a.tap_step = tap_step, a.channels = groups * C;
    const ptrdiff_t reach = (taps[1] - 1) * tap_step + (f.alone ? 1 : 4 * steps);
    require(taps[0] <= kernel[0] && reach < (dilation[1] * (kernel[1] - 1) + 1) * a.channels + 64, "taps must not reach beyond the window");
    return h;
}

// [T, C], [B, C, W] or [B, C, H, W] with its steps.
template <class Array>
Shape shape_of(const Array &x, ptrdiff_t *step) {
    const size_t n = x.ndim();
    require(2 <= n && n <= 4, "x must be [T, C], [B, C, W] or [B, C, H, W]");
    step[0] = x.stride(0), step[1] = n == 4 ? x.stride(2) : 0, step[2] = n > 2 ? x.stride(n - 1) : 0, step[3] = x.stride(1);
    return {(ptrdiff_t)x.shape(0), n == 4 ? (ptrdiff_t)x.shape(2) : 1, n > 2 ? (ptrdiff_t)x.shape(n - 1) : 1, (ptrdiff_t)x.shape(1)};
}

// Where y [B, N, H, W], or fewer axes, has its numbers: channels last, without gaps.
template <class Array>
auto *checked(const IntegerLayer &a, const Shape &x, size_t axes, const Array &y) {
    ptrdiff_t step[4];
    require(x.C == a.channels, "x must have the channels of the layer");
    require(x.H + a.window.top + a.window.bottom > a.window.dilation[0] * (a.window.kernel[0] - 1) &&
            x.W + a.window.left + a.window.right > a.window.dilation[1] * (a.window.kernel[1] - 1), "x must not be smaller than the window");
    const Shape s = a.shape(x), found = shape_of(y, step);
    require(y.ndim() == axes && found.B == s.B && found.H == s.H && found.W == s.W && found.C == s.C, "y must have the shape that comes out");
    require((s.C == 1 || step[3] == 1) && (s.W == 1 || step[2] == s.C) && (s.H == 1 || step[1] == s.W * s.C) &&
            (s.B == 1 || step[0] == s.H * s.W * s.C), "y must have its channels last, without gaps");
    return y.data();
}

void codes_to_codes(const HeldLayer &h, CodesIn x, CodesOut y, int border, float low, float high, int threads) {
    ptrdiff_t step[4];
    const Shape s = shape_of(x, step);
    Codes out{};
    out.codes = checked(h.layer, s, x.ndim(), y), out.low = low, out.high = high;
    require(-128 <= low && low <= high && high <= 127 && -128 <= border && border <= 127, "codes are -128 to 127");
    nb::gil_scoped_release unlocked;
    h.layer.run(*chosen, x.data(), s, step, border, out, threads);
}

void codes_to_numbers(const HeldLayer &h, CodesIn x, NumbersOut y, int border, int threads) {
    ptrdiff_t step[4];
    const Shape s = shape_of(x, step);
    Codes out{};
    out.y = checked(h.layer, s, x.ndim(), y);
    require(-128 <= border && border <= 127, "codes are -128 to 127");
    nb::gil_scoped_release unlocked;
    h.layer.run(*chosen, x.data(), s, step, border, out, threads);
}

void numbers_to_numbers(const HeldLayer &h, NumbersIn x, NumbersOut y, float low, float high, float inverse, bool zero, int threads) {
    ptrdiff_t step[4];
    const Shape s = shape_of(x, step);
    Codes out{};
    out.y = checked(h.layer, s, x.ndim(), y);
    require(-128 <= low && low < high && high <= 127, "codes are -128 to 127");
    const bool plain = (s.W == 1 || step[2] == 1) && (s.H == 1 || step[1] == s.W) && (s.C == 1 || step[3] == s.H * s.W);
    const bool last = (s.C == 1 || step[3] == 1) && (s.W == 1 || step[2] == s.C) && (s.H == 1 || step[1] == s.W * s.C);
    require((plain || last) && (s.B == 1 || step[0] == s.H * s.W * s.C), "x must be contiguous, or have its channels last");
    nb::gil_scoped_release unlocked;
    h.layer.run(*chosen, x.data(), s, step, {low, high, inverse, zero}, out, threads);
}

using Cube = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Cells = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void recur(const HeldLayer &input, const HeldLayer &state, Cube x, Cells h, std::optional<Cells> c, Cube y, bool backwards, float low,
           float high, float inverse, bool zero, int threads) {
    const IntegerLayer &a = input.layer, &b = state.layer;
    const size_t T = x.shape(0), B = x.shape(1), H = b.channels;
    require(a.fixed.N == (ptrdiff_t)((c ? 4 : 3) * H) && b.fixed.N == a.fixed.N, "layers must have 4 H outputs with c, 3 H without");
    require(x.shape(2) == (size_t)a.channels, "x must be [T, B, K]");
    require(B > 0 && h.shape(0) == B && h.shape(1) == H && (!c || (c->shape(0) == B && c->shape(1) == H)), "h and c must be [B, H]");
    require(y.shape(0) == T && y.shape(1) == B && y.shape(2) == H, "y must be [T, B, H]");
    require(-128 <= low && low < high && high <= 127, "codes are -128 to 127");
    nb::gil_scoped_release unlocked;
    a.recur(*chosen, b, x.data(), h.data(), c ? c->data() : nullptr, y.data(), T, B, backwards, {low, high, inverse, zero}, threads);
}

// Whether two arrays lie in memory alike, and how many numbers that are.
template <class A, class B>
ptrdiff_t alike(const A &x, const B &y) {
    require(x.ndim() == y.ndim(), "both must have one shape");
    size_t extent = 0;
    for (size_t i = 0; i < x.ndim(); i++) {
        require(x.shape(i) == y.shape(i) && (x.shape(i) == 1 || x.stride(i) == y.stride(i)), "both must lie in memory alike");
        require(x.stride(i) >= 0, "strides must not be below 0");
        extent += (x.shape(i) - 1) * x.stride(i);
    }
    require(x.size() == 0 || extent + 1 == x.size(), "there must be no gaps");
    return (ptrdiff_t)x.size();
}

constexpr ptrdiff_t TOGETHER = 1 << 15;  // numbers in one piece

void enter(NumbersIn x, CodesOut y, float scale, float zero, float low, float high, int threads) {
    const ptrdiff_t n = alike(x, y);
    require(-128 <= low && low <= high && high <= 127, "codes are -128 to 127");
    const Entry a{x.data(), y.data(), scale, zero, low, high};
    nb::gil_scoped_release unlocked;
    share_out(n, TOGETHER, threads, [&](ptrdiff_t first, ptrdiff_t last) { chosen->enter_codes(a, first, last); });
}

void add(CodesIn a, CodesIn b, CodesOut y, std::array<float, 3> factor, float low, float high, int threads) {
    const ptrdiff_t n = alike(a, y);
    require(alike(b, y) == n && -128 <= low && low <= high && high <= 127, "codes are -128 to 127");
    const Total t{a.data(), b.data(), y.data(), {factor[0], factor[1], factor[2]}, low, high};
    nb::gil_scoped_release unlocked;
    share_out(n, TOGETHER, threads, [&](ptrdiff_t first, ptrdiff_t last) { chosen->add_codes(t, first, last); });
}

void look_up(CodesIn x, Bytes table, CodesOut y, int threads) {
    const ptrdiff_t n = alike(x, y);
    require(table.shape(0) == 256, "a table has 256 codes");
    const int8_t *from = x.data(), *middle = table.data() + 128;
    int8_t *to = y.data();
    nb::gil_scoped_release unlocked;
    share_out(n, TOGETHER, threads, [&](ptrdiff_t first, ptrdiff_t last) {
        for (ptrdiff_t i = first; i < last; i++) to[i] = middle[from[i]];
    });
}

void largest(CodesIn x, CodesOut y, Pair kernel, Pair stride, Pair dilation, std::array<ptrdiff_t, 4> padding, int threads) {
    IntegerLayer a;  // for its geometry
    for (int i = 0; i < 2; i++) require(kernel[i] > 0 && stride[i] > 0 && dilation[i] > 0, "kernel, stride, dilation must be above 0");
    a.window = {{kernel[0], kernel[1]}, {stride[0], stride[1]}, {dilation[0], dilation[1]}, padding[0], padding[1], padding[2], padding[3]};
    ptrdiff_t step[4];
    const Shape s = shape_of(x, step);
    a.channels = a.fixed.N = s.C;
    require((s.C == 1 || step[3] == 1) && (s.W == 1 || step[2] == s.C) && (s.H == 1 || step[1] == s.W * s.C) &&
            (s.B == 1 || step[0] == s.H * s.W * s.C), "x must have its channels last, without gaps");
    int8_t *to = checked(a, s, x.ndim(), y);
    const Shape out = a.shape(s);
    const Pooling p{x.data(), to, s.H, s.W, s.C, out.H, out.W, {kernel[0], kernel[1]}, {stride[0], stride[1]}, {dilation[0], dilation[1]},
                    padding[2], padding[0]};
    nb::gil_scoped_release unlocked;
    share_out(s.B * out.H, 1 + TOGETHER / (out.W * s.C + 1), threads, [&](ptrdiff_t first, ptrdiff_t last) { chosen->pool_codes(p, first, last); });
}

}  // namespace

void bind_layers(nb::module_ &m) {
    using namespace nb::literals;
    nb::class_<HeldLayer>(m, "IntegerLayer")
        .def(nb::new_(&make_layer), "w"_a.noconvert(), "start"_a.noconvert(), "scale"_a.noconvert(), "constant"_a.noconvert(),
             "sums"_a.noconvert(), "N"_a, "groups"_a, "C"_a, "groups_of_k"_a, "taps"_a, "tap_step"_a, "steps"_a, "kernel"_a, "stride"_a,
             "dilation"_a, "padding"_a)
        .def("codes_to_codes", &codes_to_codes, "x"_a.noconvert(), "y"_a.noconvert(), "border"_a, "low"_a, "high"_a, "threads"_a)
        .def("codes_to_numbers", &codes_to_numbers, "x"_a.noconvert(), "y"_a.noconvert(), "border"_a, "threads"_a)
        .def("numbers_to_numbers", &numbers_to_numbers, "x"_a.noconvert(), "y"_a.noconvert(), "low"_a, "high"_a, "inverse"_a, "zero"_a,
             "threads"_a)
        .def("recur", &recur, "state"_a, "x"_a.noconvert(), "h"_a.noconvert(), "c"_a.noconvert().none(), "y"_a.noconvert(), "backwards"_a, "low"_a,
             "high"_a, "inverse"_a, "zero"_a, "threads"_a);
    m.def("enter_codes", &enter, "x"_a.noconvert(), "y"_a.noconvert(), "scale"_a, "zero"_a, "low"_a, "high"_a, "threads"_a);
    m.def("add_codes", &add, "a"_a.noconvert(), "b"_a.noconvert(), "y"_a.noconvert(), "factor"_a, "low"_a, "high"_a, "threads"_a);
    m.def("look_up_codes", &look_up, "x"_a.noconvert(), "table"_a.noconvert(), "y"_a.noconvert(), "threads"_a);
    m.def("largest_codes", &largest, "x"_a.noconvert(), "y"_a.noconvert(), "kernel"_a, "stride"_a, "dilation"_a, "padding"_a, "threads"_a);
}

}  // namespace bitwright
