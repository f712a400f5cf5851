// From floats to llama.cpp's blocks and back: rounding in one go, and bytes.
#include <cstring>

#include "python/bind_rounding.h"
#include "simd/fields.h"

using namespace bitwright;

namespace {

// Scales searched, codes under them, and what they lose: a few rows after the other, while they are in the cache.
void round_rows(const Format &f, Values w, Vector weight, Vector shrink, Vector factor, bool quick, ptrdiff_t g, Out scale,
                std::optional<Out> zero, CodeArray codes, Out sums, int threads) {
    size_t N = w.shape(0), K = w.shape(1), G = g > 0 ? (K + g - 1) / g : 0;
    require(g > 0 && (g % MOST_LANES == 0 || (size_t)g == K), "groups must be of whole vectors, or of whole rows");
    require(weight.shape(0) == K, "weight must have K entries");
    require(shrink.shape(0) == factor.shape(0) && shrink.shape(0) > 0, "shrink and factor must be of one length");
    shaped(scale, N, G, "scale must be [N, G]");
    shaped(codes, N, K, "codes must be [N, K]");
    shaped(sums, 2, N, "sums must be [2, N]");
    require(zero.has_value() == (f.zero != SYM), "zero goes with formats that have one");
    if (zero) shaped(*zero, N, G, "zero must be [N, G]");
    bool half = is_half(w);
    int8_t *all = bytes_of(codes);
    nb::gil_scoped_release unlocked;
    share_out(N, MOST_LANES, threads, [&](ptrdiff_t first, ptrdiff_t last) {
        std::vector<float> &room = scratch(room_of_group(g) + MOST_LANES * K);
        float *some = room.data() + room_of_group(g);
        for (ptrdiff_t at = first; at < last; at += MOST_LANES) {
            ptrdiff_t n = last - at < MOST_LANES ? last - at : MOST_LANES;
            const float *rows = (const float *)w.data() + at * K;
            if (half) chosen->widen((const uint16_t *)w.data() + at * K, some, n * K), rows = some;
            float *s = scale.data() + at * G, *z = zero ? zero->data() + at * G : nullptr, *lost = sums.data() + at;
            Search search{rows, weight.data(), shrink.data(), factor.data(), s, z, (ptrdiff_t)K, g, (ptrdiff_t)shrink.shape(0), quick};
            chosen->search(f, search, room.data(), 0, n);
            chosen->encode(f, {rows, s, z, all + at * K, (ptrdiff_t)K, g, weight.data(), lost, lost + N}, 0, n);
        }
    });
}

template <class T, int dimensions>
using Table = nb::ndarray<const T, nb::ndim<dimensions>, nb::c_contig, nb::device::cpu>;

// A codebook with the arrays that it points to; checked once.
struct Codebook {
    Table<float, 3> points;
    Table<uint8_t, 3> entries;
    Matrix middle;
    Table<int32_t, 3> near;
    Vector level;
    Lattice lattice;
};

Codebook *make_codebook(Table<float, 3> points, Table<uint8_t, 3> entries, Matrix middle, Table<int32_t, 3> near, Vector level, int width,
                        int run, bool has_signs, bool even) {
    size_t V = points.shape(0), P = points.shape(1), d = points.shape(2), places = 1;
    for (size_t i = 0; i < d; i++) places *= middle.shape(1) + 1;
    require(V >= 1 && V <= 2 && entries.shape(0) == V && entries.shape(1) == P && entries.shape(2) == d, "codes must be [V, P, d]");
    require(middle.shape(0) == V && near.shape(0) == V && near.shape(1) == places && near.shape(2) > 0, "near must be [V, L^d, n]");
    require(d > 0 && width > 0 && width <= MOST_RUN && width % (int)d == 0 && run > 0, "width must be of whole entries");
    require(run <= (int)d || (run % (int)d == 0 && width % run == 0), "a run must be of whole entries, width of whole runs");
    require(!even || width % 8 == 0, "width must be of whole eights");
    for (size_t i = 0; i < near.size(); i++) require(near.data()[i] >= 0 && near.data()[i] < (int32_t)P, "near must be entries");
    for (size_t i = 0; i < entries.size(); i++) require(entries.data()[i] < level.shape(0), "a code beyond the levels");
    Lattice a{points.data(), entries.data(), middle.data(), near.data(), level.data(), (int)V, (int)P, (int)d,
              (int)middle.shape(1) + 1, (int)near.shape(2), (ptrdiff_t)places, width, run, (int)level.shape(0) - 1, has_signs, even};
    return new Codebook{points, entries, middle, near, level, a};
}

// Codes [R, width] of the nearest entries to x [R, width], importance u.
void nearest_runs(const Codebook &book, Matrix x, std::optional<Matrix> u, CodeArray codes, int threads) {
    const Lattice &a = book.lattice;
    shaped(x, x.shape(0), a.width, "x must be [R, width]");
    shaped(codes, x.shape(0), a.width, "codes must be [R, width]");
    if (u) shaped(*u, x.shape(0), a.width, "u must be [R, width]");
    Runs runs{x.data(), data_of(u), (uint8_t *)bytes_of(codes)};
    nb::gil_scoped_release unlocked;
    share_out(x.shape(0), 1024, threads, [&](ptrdiff_t first, ptrdiff_t last) { chosen->nearest_runs(a, runs, first, last); });
}

using Octets = nb::ndarray<uint8_t, nb::ndim<2>, nb::device::cpu>;  // rows may lie apart

// Numbers of a few bits, and bytes in stretches of n that hold them side by side.
void check_beside(Octets &numbers, Octets &bytes, size_t n, int bits) {
    size_t m = bytes.shape(1);
    require((bits == 1 || bits == 2 || bits == 4) && n > 0 && n % 8 == 0 && m % n == 0, "stretches of whole eights");
    shaped(numbers, bytes.shape(0), m * 8 / bits, "numbers must be [rows, 8 / bits of each byte]");
    require(numbers.stride(1) == 1 && bytes.stride(1) == 1 && numbers.stride(0) == (int64_t)(m * 8 / bits),
            "rows must be contiguous, numbers altogether");
}

void put_side_by_side(Octets numbers, Octets bytes, size_t n, int bits, int turn) {
    check_beside(numbers, bytes, n, bits);
    nb::gil_scoped_release unlocked;
    put_beside(numbers.data(), bytes.data(), bytes.stride(0), bytes.shape(0), bytes.shape(1), n, bits, (uint8_t)turn);
}

void take_side_by_side(Octets bytes, Octets numbers, size_t n, int bits, int less) {
    check_beside(numbers, bytes, n, bits);
    require(less >= 0 && less <= 128, "less must be 0 to 128");
    nb::gil_scoped_release unlocked;
    take_apart(bytes.data(), bytes.stride(0), numbers.data(), bytes.shape(0), bytes.shape(1), n, bits, (uint8_t)less);
}

void put_rows(Octets from, Octets to) {
    size_t rows = from.shape(0), n = from.shape(1);
    shaped(to, rows, n, "both must be of one shape");
    require(n < 2 || (from.stride(1) == 1 && to.stride(1) == 1), "rows must be contiguous");
    nb::gil_scoped_release unlocked;
    move_rows(from.data(), from.stride(0), to.data(), to.stride(0), rows, n);
}

}  // namespace

namespace bitwright {

void bind_blocks(nb::module_ &m) {
    using namespace nb::literals;
    m.def("round_rows", &round_rows, "format"_a, "w"_a.noconvert(), "weight"_a.noconvert(), "shrink"_a.noconvert(),
          "factor"_a.noconvert(), "quick"_a, "g"_a, "scale"_a.noconvert(), "zero"_a.noconvert().none(), "codes"_a.noconvert(),
          "sums"_a.noconvert(), "threads"_a);
    nb::class_<Codebook>(m, "Codebook")
        .def(nb::new_(&make_codebook), "points"_a.noconvert(), "entries"_a.noconvert(), "middle"_a.noconvert(), "near"_a.noconvert(),
             "level"_a.noconvert(), "width"_a, "run"_a, "has_signs"_a, "even"_a);
    m.def("nearest_runs", &nearest_runs, "codebook"_a, "x"_a.noconvert(), "u"_a.noconvert().none(), "codes"_a.noconvert(), "threads"_a);
    m.def("put_side_by_side", &put_side_by_side, "numbers"_a.noconvert(), "bytes"_a.noconvert(), "n"_a, "bits"_a,
          "turn"_a);
    m.def("put_rows", &put_rows, "rows"_a.noconvert(), "place"_a.noconvert());
    m.def("take_side_by_side", &take_side_by_side, "bytes"_a.noconvert(), "numbers"_a.noconvert(), "n"_a, "bits"_a,
          "less"_a);
}

}  // namespace bitwright
