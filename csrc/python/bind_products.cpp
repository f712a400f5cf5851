// Products of packed weights: shapes checked, Python's face.
#include "python/bind.h"
#include "runtime/decoder.h"
#include "runtime/products.h"

#include <memory>

namespace bitwright {
namespace {

using Octets = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Numbers = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Halves = nb::ndarray<nb::ndim<1>, nb::c_contig, nb::device::cpu>;  // float16
using Places = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Cells = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

const uint16_t *halves_of(const Halves &values, size_t count, const char *message) {
    require(values.dtype().bits == 16 && values.shape(0) == count, message);
    return (const uint16_t *)values.data();
}

// A matrix and the arrays it lies in.
struct Matrix {
    Octets panels;
    Halves scale;
    std::optional<Octets> point;
    std::optional<Halves> minimum;
    Numbers unit;
    Weights w;
};

Matrix make_matrix(Octets panels, Halves scale, std::optional<Octets> point, std::optional<Halves> minimum, Numbers unit,
                   int bits, int offset, const std::vector<int> &high, const std::vector<int> &low, ptrdiff_t N, ptrdiff_t K,
                   ptrdiff_t g) {
    require(N > 0 && K > 0 && g >= 16 && g % 16 == 0, "N and K must be above 0, g a multiple of 16");
    require(1 <= bits && bits <= 8 && 0 <= offset && offset <= 255, "bits must be 1 to 8, offset 0 to 255");
    require(g < BLOCK ? BLOCK % g == 0 : g % BLOCK == 0, "g must divide 256, or be a multiple of it");
    require(high.size() <= 16 && (low.empty() || low.size() == high.size()), "a table has at most 16 codes, and as many low bytes");
    require(high.empty() || bits <= 4, "codes of more than 4 bits are not looked up");
    require(low.empty() || (!point && !minimum), "codes of two bytes have neither points nor minima");
    require(!point || !minimum, "points or minima, not both");
    const size_t P = (N + 63) / 64 * 4, tiles = (K + 31) / 32, G = (K + g - 1) / g, count = P * G * 16;
    require(panels.shape(0) == P * tiles * 64 * bits, "panels must hold N rows, padded to 64, of K columns, padded to 32");
    require(unit.shape(0) == (size_t)N, "unit must have N entries");
    Matrix m{panels, scale, point, minimum, unit, {}};
    Weights &w = m.w;
    w.panels = panels.data(), w.unit = unit.data();
    w.scale = halves_of(scale, count, "scale must be float16 [N / 16, G, 16]");
    if (minimum) w.minimum = halves_of(*minimum, count, "minimum must be float16 [N / 16, G, 16]");
    if (point) require(point->shape(0) == count, "point must be uint8 [N / 16, G, 16]"), w.point = point->data();
    for (size_t i = 0; i < high.size(); i++) w.high[i] = (uint8_t)high[i];
    for (size_t i = 0; i < low.size(); i++) w.low[i] = (uint8_t)low[i];
    w.table = !high.empty(), w.bits = bits, w.bytes = low.empty() ? 1 : 2, w.offset = offset;
    w.N = N, w.K = K, w.tiles = tiles, w.groups = G;
    w.block = g < BLOCK ? (int)g : BLOCK, w.repeat = (int)(g / w.block);
    return m;
}

// Float weights and their type.
Dense dense_of(const Values &w) {
    using nb::dlpack::dtype_code;
    const nb::dlpack::dtype type = w.dtype();
    const bool whole = type.code == (uint8_t)dtype_code::Float && type.bits == 32, half = type.code == (uint8_t)dtype_code::Float && type.bits == 16;
    require(whole || half || (type.code == (uint8_t)dtype_code::Bfloat && type.bits == 16), "weights must be float32, float16 or bfloat16");
    return {nullptr, w.data(), whole ? F32 : half ? F16 : BF16, nullptr, 0, (ptrdiff_t)w.shape(0), (ptrdiff_t)w.shape(1)};
}

void product_of_floats(Values w, Cells x, Out y, int threads) {
    Dense d = dense_of(w);
    require(x.shape(1) == w.shape(1), "x must have K columns");
    require(y.shape(0) == x.shape(0) && y.shape(1) == w.shape(0), "y must be [M, N]");
    d.x = x.data(), d.y = y.data(), d.M = x.shape(0);
    nb::gil_scoped_release unlocked;
    multiply(*chosen, d, threads);
}

// A decoder and the arrays that it reads.
struct Held {
    Decoder decoder;
    std::vector<nb::object> kept;
};

const float *vector_of(nb::handle array, ptrdiff_t n, Held &held, const char *message) {
    if (array.is_none()) return nullptr;
    auto numbers = nb::cast<Numbers>(array, false);
    require((ptrdiff_t)numbers.shape(0) == n, message);
    held.kept.push_back(nb::borrow(array));
    return numbers.data();
}

// (matrix or float weights, bias or None, order or None)
Linear linear_of(nb::handle parts, Held &held) {
    nb::object weight = parts[0], bias = parts[1], order = parts[2];
    Linear a{};
    if (nb::isinstance<Matrix>(weight)) a.packed = &nb::cast<const Matrix &>(weight).w;
    else a.dense = dense_of(nb::cast<Values>(weight, false));
    held.kept.push_back(weight);
    a.bias = vector_of(bias, a.N(), held, "a bias must be float32 [N]");
    if (!order.is_none()) {
        auto places = nb::cast<Places>(order, false);
        require((ptrdiff_t)places.shape(0) == a.K() && a.packed, "an order must be int32 [K], of a packed matrix");
        for (ptrdiff_t k = 0; k < a.K(); k++) require(places.data()[k] >= 0 && places.data()[k] < a.K(), "an order must stay below K");
        held.kept.push_back(order), a.order = places.data();
    }
    return a;
}

void sized(const Linear &a, ptrdiff_t N, ptrdiff_t K, const char *message) { require(a.N() == N && a.K() == K, message); }

// layers: (seven of those, (before, after), (q_norm, k_norm))
Held *make_decoder(nb::list layers, nb::handle norm, nb::handle head, Cells cosine, Cells sine, ptrdiff_t heads, ptrdiff_t key_heads,
                   ptrdiff_t D, ptrdiff_t window, float epsilon, float scaling, int bytes) {
    require(D > 0 && D % 16 == 0 && key_heads > 0 && heads % key_heads == 0, "heads must share keys evenly, D be a multiple of 16");
    require(cosine.shape(1) == (size_t)D && sine.shape(0) == cosine.shape(0) && sine.shape(1) == (size_t)D, "cosine, sine: [positions, D]");
    require(bytes == 1 || bytes == 2, "inputs are rounded to 1 or 2 bytes");
    auto held = std::make_unique<Held>();
    Decoder &d = held->decoder;
    d.heads = heads, d.key_heads = key_heads, d.D = D, d.window = window, d.epsilon = epsilon, d.scaling = scaling, d.bytes = bytes;
    d.head = linear_of(head, *held), d.H = d.head.K();
    d.norm = vector_of(norm, d.H, *held, "norms must be float32 [H]");
    d.cosine = cosine.data(), d.sine = sine.data(), d.positions = cosine.shape(0);
    held->kept.push_back(nb::cast(cosine)), held->kept.push_back(nb::cast(sine));
    for (nb::handle layer : layers) {
        nb::object linears = layer[0], norms = layer[1], of_heads = layer[2];
        Layer a{};
        Linear *each[7] = {&a.q, &a.k, &a.v, &a.o, &a.gate, &a.up, &a.down};
        for (int i = 0; i < 7; i++) *each[i] = linear_of(linears[i], *held);
        const ptrdiff_t I = a.up.N();
        sized(a.q, heads * D, d.H, "q must be [heads D, H]"), sized(a.k, key_heads * D, d.H, "k must be [key heads D, H]");
        sized(a.v, key_heads * D, d.H, "v must be [key heads D, H]"), sized(a.o, d.H, heads * D, "o must be [H, heads D]");
        sized(a.gate, I, d.H, "gate must be [I, H]"), sized(a.up, I, d.H, "up must be [I, H]"), sized(a.down, d.H, I, "down must be [H, I]");
        require(I % 16 == 0, "the MLP's width must be a multiple of 16");
        a.before = vector_of(norms[0], d.H, *held, "norms must be float32 [H]");
        a.after = vector_of(norms[1], d.H, *held, "norms must be float32 [H]");
        a.q_norm = vector_of(of_heads[0], D, *held, "norms of heads must be float32 [D]");
        a.k_norm = vector_of(of_heads[1], D, *held, "norms of heads must be float32 [D]");
        require(a.before && a.after, "norms must be float32 [H]");
        d.layers.push_back(a);
    }
    return held.release();
}

using Slots = nb::ndarray<nb::ndim<6>, nb::c_contig, nb::device::cpu>;  // float16, or bytes
using Numbered = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// How keys and values of D numbers are kept, by the bits of a code.
Cache cache_of(const Decoder &d, const Slots &rows, int bits) {
    require(bits == 16 || bits == 8 || bits == 4, "keys and values are kept in 16, 8 or 4 bits");
    const bool whole = bits == 16;
    const int type = whole ? KV_F16 : bits == 8 ? KV_Q8 : KV_Q4;
    const ptrdiff_t width = kept_width(type, d.D);
    require(rows.shape(1) == d.layers.size() && rows.shape(2) == 2 && rows.shape(3) == (size_t)d.key_heads &&
            rows.dtype().bits == (whole ? 16 : 8) && (ptrdiff_t)rows.shape(5) * (whole ? 2 : 1) == width,
            "the cache must be float16 [slots, L, 2, key heads, room, D], or bytes");
    return {(uint8_t *)rows.data(), type, (ptrdiff_t)rows.shape(4), width};
}

void read(Held &held, Out x, Numbered slots, Numbered places, Slots rows, int bits, int threads) {
    Decoder &d = held.decoder;
    const size_t M = x.shape(0);
    const Cache cache = cache_of(d, rows, bits);
    require(x.shape(1) == (size_t)d.H && slots.shape(0) == M && places.shape(0) == M, "x must be [M, H], slots and places [M]");
    for (size_t m = 0; m < M; m++) {
        require(slots.data()[m] >= 0 && slots.data()[m] < (int64_t)rows.shape(0), "no such slot");
        require(places.data()[m] >= 0 && places.data()[m] < cache.room && places.data()[m] < d.positions, "the position lies beyond the cache");
    }
    nb::gil_scoped_release unlocked;
    d.read(*chosen, x.data(), slots.data(), places.data(), M, cache, threads);
}

void finish(Held &held, Cells x, Out logits, int threads) {
    Decoder &d = held.decoder;
    require(x.shape(1) == (size_t)d.H && logits.shape(0) == x.shape(0) && logits.shape(1) == (size_t)d.head.N(), "x must be [M, H], logits [M, V]");
    nb::gil_scoped_release unlocked;
    d.finish(*chosen, x.data(), x.shape(0), logits.data(), threads);
}

void product(const Matrix &m, Values x, Out y, int bytes, bool by_row, int threads) {
    require(x.shape(1) == (size_t)m.w.K, "x must have K columns");
    require(y.shape(0) == x.shape(0) && y.shape(1) == (size_t)m.w.N, "y must be [M, N]");
    require(bytes == 1 || bytes == 2, "inputs are rounded to 1 or 2 bytes");
    const bool half = is_half(x);
    const ptrdiff_t M = x.shape(0);
    if (M == 0) return;
    nb::gil_scoped_release unlocked;
    static thread_local Rounded rounded;
    rounded.round(*chosen, x.data(), half, M, m.w.K, m.w.block, bytes, by_row, threads);
    multiply(*chosen, {{&m.w, y.data()}}, rounded.inputs, threads);
}

// Rows [first, last) of a matrix in float32 or bfloat16, as columns of `to` [K, last - first or more].
void decode_rows(const Matrix &m, const std::vector<float> &level, float factor, ptrdiff_t first, ptrdiff_t last, Values to, int threads) {
    require(0 <= first && first < last && last <= m.w.N, "no such rows");
    require(first % 64 == 0 && (last % 64 == 0 || last == m.w.N), "rows are decoded from and to a multiple of 64, or to the last");
    require((ptrdiff_t)to.shape(0) == m.w.K && (ptrdiff_t)to.shape(1) >= last - first, "rows become columns of [K, last - first]");
    require(level.size() == (m.w.table ? 16 : 0), "sixteen levels, of a matrix with a table");
    const Decoded d{level.data(), factor, to.data(), is_half(to), first, (ptrdiff_t)to.shape(1)};
    nb::gil_scoped_release unlocked;
    decode(*chosen, m.w, d, last, threads);
}

}  // namespace

void bind_products(nb::module_ &m) {
    using namespace nb::literals;
    nb::class_<Matrix>(m, "Matrix")
        .def(nb::new_(&make_matrix), "panels"_a.noconvert(), "scale"_a.noconvert(), "point"_a.noconvert().none(),
             "minimum"_a.noconvert().none(), "unit"_a.noconvert(), "bits"_a, "offset"_a, "high"_a, "low"_a, "N"_a, "K"_a, "g"_a);
    m.def("product_of_floats", &product_of_floats, "w"_a.noconvert(), "x"_a.noconvert(), "y"_a.noconvert(), "threads"_a);
    nb::class_<Held>(m, "Decoder")
        .def(nb::new_(&make_decoder), "layers"_a, "norm"_a, "head"_a, "cosine"_a.noconvert(), "sine"_a.noconvert(), "heads"_a,
             "key_heads"_a, "D"_a, "window"_a, "epsilon"_a, "scaling"_a, "bytes"_a)
        .def("read", &read, "x"_a.noconvert(), "slots"_a.noconvert(), "places"_a.noconvert(), "cache"_a.noconvert(), "bits"_a, "threads"_a)
        .def("finish", &finish, "x"_a.noconvert(), "logits"_a.noconvert(), "threads"_a);
    m.def("decode_rows", &decode_rows, "matrix"_a, "level"_a, "factor"_a, "first"_a, "last"_a, "to"_a.noconvert(), "threads"_a);
    m.def("product", &product, "matrix"_a, "x"_a.noconvert(), "y"_a.noconvert(), "bytes"_a, "by_row"_a, "threads"_a);
}

}  // namespace bitwright
