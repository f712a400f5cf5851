// The extension's Python face: arrays come in by DLPack, shapes are checked here, rows are shared out among threads.
#include "python/bind_rounding.h"

using namespace bitwright;

namespace bitwright {

const Kernels *chosen = available()[0];

void require(bool condition, const char *message) {
    if (!condition) throw nb::value_error(message);
}

bool is_half(const Values &values) {
    using nb::dlpack::dtype_code;
    nb::dlpack::dtype type = values.dtype();
    bool half = type.code == (uint8_t)dtype_code::Bfloat && type.bits == 16;
    require(half || (type.code == (uint8_t)dtype_code::Float && type.bits == 32), "values must be float32 or bfloat16");
    return half;
}

}  // namespace bitwright

namespace {

using Groups = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

Format make_format(int zero, int encoding, float lo, float hi, float first, float reach, bool turned,
                   const std::vector<float> &level, const std::vector<int> &code) {
    require(level.size() <= 16 && level.size() == code.size(), "a codebook has at most 16 levels, and a code for each");
    Format f{};
    f.zero = zero, f.encoding = encoding, f.lo = lo, f.hi = hi, f.first = first, f.span = hi - lo, f.reach = reach, f.turned = turned;
    f.levels = (int)level.size();
    for (int i = 0; i < f.levels; i++) {
        require(code[i] >= 0 && code[i] < 16, "codes of a codebook are 0 to 15");
        f.level[i] = level[i];
        f.middle[i] = i + 1 < f.levels ? (level[i + 1] + level[i]) / 2 : __builtin_inff();
        f.code[i] = (int8_t)code[i];
        f.value[code[i]] = level[i];
    }
    return f;
}

void search(const Format &f, Matrix w, Vector weight, Vector shrink, Vector factor, bool quick, ptrdiff_t g, Out scale,
            std::optional<Out> zero, int threads) {
    size_t N = w.shape(0), K = w.shape(1), G = g > 0 ? (K + g - 1) / g : 0;
    require(g > 0 && weight.shape(0) == K, "weight must have K entries");
    require(shrink.shape(0) == factor.shape(0) && shrink.shape(0) > 0, "shrink and factor must be of one length");
    shaped(scale, N, G, "scale must be [N, G]");
    require(zero.has_value() == (f.zero != SYM), "zero goes with formats that have one");
    if (zero) shaped(*zero, N, G, "zero must be [N, G]");
    Search a{w.data(), weight.data(), shrink.data(), factor.data(), scale.data(), zero ? zero->data() : nullptr,
             (ptrdiff_t)K, g, (ptrdiff_t)shrink.shape(0), quick};
    nb::gil_scoped_release unlocked;
    share_out(N, MOST_LANES, threads, [&](ptrdiff_t first, ptrdiff_t last) {
        chosen->search(f, a, scratch(room_of_group(g)).data(), first, last);
    });
}

void refine(const Format &f, Matrix w, Vector weight, Matrix move, Out scale, std::optional<Out> zero, Out outer,
            std::optional<Out> outer_zero, float low, float high, ptrdiff_t g, ptrdiff_t rounds, int threads) {
    size_t N = w.shape(0), K = w.shape(1), G = g > 0 ? (K + g - 1) / g : 0, S = (K + 255) / 256;
    require(g >= 16 && 256 % g == 0 && weight.shape(0) == K, "weight must have K entries, groups fill blocks of 256");
    shaped(move, move.shape(0), 2, "move must be [C, 2]");
    shaped(scale, N, G, "scale must be [N, G]");
    shaped(outer, N, S, "outer must be [N, S]");
    require(zero.has_value() == (f.zero != SYM), "zero goes with formats that have one");
    require(outer_zero.has_value() == (f.zero == MIN), "outer_zero goes with formats that have a minimum");
    if (zero) shaped(*zero, N, G, "zero must be [N, G]");
    if (outer_zero) shaped(*outer_zero, N, S, "outer_zero must be [N, S]");
    Refine a{w.data(), weight.data(), move.data(), scale.data(), zero ? zero->data() : nullptr, outer.data(),
             outer_zero ? outer_zero->data() : nullptr, low, high, (ptrdiff_t)K, g, (ptrdiff_t)move.shape(0), rounds};
    nb::gil_scoped_release unlocked;
    share_out(N, MOST_LANES, threads, [&](ptrdiff_t first, ptrdiff_t last) {
        chosen->refine(f, a, scratch(room_of_group(256)).data(), first, last);
    });
}

void encode(const Format &f, Matrix w, Matrix scale, std::optional<Matrix> zero, ptrdiff_t g, CodeArray codes, int threads) {
    size_t N = w.shape(0), K = w.shape(1), G = g > 0 ? (K + g - 1) / g : 0;
    shaped(scale, N, G, "scale must be [N, G]");
    shaped(codes, N, K, "codes must be [N, K]");
    require(zero.has_value() == (f.zero != SYM), "zero goes with formats that have one");
    if (zero) shaped(*zero, N, G, "zero must be [N, G]");
    Encode a{w.data(), scale.data(), data_of(zero), bytes_of(codes), (ptrdiff_t)K, g, nullptr, nullptr, nullptr};
    nb::gil_scoped_release unlocked;
    share_out(N, MOST_LANES, threads, [&](ptrdiff_t first, ptrdiff_t last) { chosen->encode(f, a, first, last); });
}

void missed(const Format &f, Matrix w, Vector weight, CodeArray codes, Matrix scale, std::optional<Matrix> zero, ptrdiff_t g,
            Out sums, int threads) {
    size_t N = w.shape(0), K = w.shape(1), G = g > 0 ? (K + g - 1) / g : 0;
    require(g % MOST_LANES == 0 || (size_t)g == K, "groups must be of whole vectors, or of whole rows");
    require(weight.shape(0) == K, "weight must have K entries");
    shaped(codes, N, K, "codes must be [N, K]");
    shaped(scale, N, G, "scale must be [N, G]");
    shaped(sums, 2, N, "sums must be [2, N]");
    require(zero.has_value() == (f.zero != SYM), "zero goes with formats that have one");
    if (zero) shaped(*zero, N, G, "zero must be [N, G]");
    Missed a{w.data(), weight.data(), bytes_of(codes), scale.data(), data_of(zero), sums.data(), sums.data() + N,
             (ptrdiff_t)K, g};
    nb::gil_scoped_release unlocked;
    share_out(N, MOST_LANES, threads, [&](ptrdiff_t first, ptrdiff_t last) { chosen->missed(f, a, first, last); });
}

void round_columns(const Format &f, Out target, Matrix original, Matrix propagation, Groups group, Matrix scale, std::optional<Matrix> zero,
           CodeArray codes, Out errors, int threads) {
    size_t n = target.shape(0), N = target.shape(1);
    shaped(original, n, N, "original must be [n, N]");
    shaped(propagation, n, n, "propagation must be [n, n]");
    shaped(codes, n, N, "codes must be [n, N]");
    shaped(errors, n, N, "errors must be [n, N]");
    require(group.shape(0) == n && scale.shape(1) == N, "group must be [n], scale [G, N]");
    require(zero.has_value() == (f.zero != SYM), "zero goes with formats that have one");
    if (zero) shaped(*zero, scale.shape(0), N, "zero must be [G, N]");
    for (size_t i = 0; i < n; i++)
        require(group(i) >= 0 && group(i) < (int64_t)scale.shape(0), "group beyond the scales");
    Columns a{target.data(), original.data(), propagation.data(), scale.data(), data_of(zero), group.data(), bytes_of(codes),
            errors.data(), (ptrdiff_t)n, (ptrdiff_t)N};
    nb::gil_scoped_release unlocked;
    share_out(N, 4 * MOST_LANES, threads, [&](ptrdiff_t first, ptrdiff_t last) {
        chosen->round_columns(f, a, scratch(3 * n * MOST_LANES).data(), first, last);
    });
}

void sweep(const Format &f, Out decoded, Out pull, CodeArray codes, Out scale, std::optional<Matrix> zero, Matrix H,
           Vector curvature, float ridge, bool solve, ptrdiff_t g, ptrdiff_t begin, int threads) {
    size_t n = decoded.shape(0), N = decoded.shape(1);
    shaped(pull, n, N, "pull must be [n, N]");
    shaped(codes, n, N, "codes must be [n, N]");
    shaped(H, n, n, "H must be [n, n]");
    require(curvature.shape(0) == n && g > 0 && begin >= 0, "curvature must be [n], g above 0, begin not below 0");
    require(n > 0 && scale.shape(1) == N && (begin + n - 1) / g < scale.shape(0), "scale must be [G, N]");
    require(zero.has_value() == (f.zero != SYM), "zero goes with formats that have one");
    if (zero) shaped(*zero, scale.shape(0), N, "zero must be [G, N]");
    Sweep a{decoded.data(), pull.data(), bytes_of(codes), scale.data(), data_of(zero), H.data(), curvature.data(), ridge,
            solve, (ptrdiff_t)n, (ptrdiff_t)N, g, begin};
    nb::gil_scoped_release unlocked;
    share_out(N, 4 * MOST_LANES, threads, [&](ptrdiff_t first, ptrdiff_t last) {
        chosen->sweep(f, a, scratch(6 * n * MOST_LANES).data(), first, last);
    });
}

void tune(const Format &f, Matrix w, Matrix base, Out offset, Out square, Matrix start, Out scale, Out stretch,
          Out stretch_square, std::optional<Matrix> zero, std::optional<Values> gradient, Values decoded, ptrdiff_t g,
          bool movable, float rate, float scale_rate, float fresh, int threads) {
    size_t N = w.shape(0), K = w.shape(1), G = g > 0 ? (K + g - 1) / g : 0;
    require(g > 0 && f.levels == 0, "g must be above 0, codes integers");
    shaped(base, N, K, "base must be [N, K]");
    shaped(offset, N, K, "offset must be [N, K]");
    shaped(square, N, K, "square must be [N, K]");
    shaped(decoded, N, K, "decoded must be [N, K]");
    shaped(start, N, G, "start must be [N, G]");
    shaped(scale, N, G, "scale must be [N, G]");
    shaped(stretch, N, G, "stretch must be [N, G]");
    shaped(stretch_square, N, G, "stretch_square must be [N, G]");
    require(zero.has_value() == (f.zero != SYM), "zero goes with formats that have one");
    if (zero) shaped(*zero, N, G, "zero must be [N, G]");
    bool half = is_half(decoded);
    if (gradient) {
        shaped(*gradient, N, K, "gradient must be [N, K]");
        require(is_half(*gradient) == half, "gradient must be of the type of decoded");
    }
    Tune a{w.data(), base.data(), offset.data(), square.data(), start.data(), scale.data(), stretch.data(),
           stretch_square.data(), data_of(zero), gradient ? gradient->data() : nullptr, decoded.data(), half, movable,
           rate, scale_rate, fresh, (ptrdiff_t)K, g};
    nb::gil_scoped_release unlocked;
    size_t n = MOST_LANES;
    while (n < (size_t)g) n *= 2;
    share_out(N, 16, threads, [&](ptrdiff_t first, ptrdiff_t last) {
        chosen->tune(f, a, scratch(n).data(), first, last);
    });
}

std::vector<std::string> names() {
    std::vector<std::string> found;
    for (auto k = available(); *k; k++) found.push_back((*k)->name);
    return found;
}

void choose(const std::string &name) {
    for (auto k = available(); *k; k++)
        if (name == (*k)->name) {
            chosen = *k;
            return;
        }
    throw nb::value_error(("no kernels named " + name + " run here").c_str());
}

}  // namespace

NB_MODULE(_native, m) {
    using namespace nb::literals;
    nb::class_<Format>(m, "Format")
        .def(nb::new_(&make_format), "zero"_a, "encoding"_a, "lo"_a, "hi"_a, "first"_a, "reach"_a, "turned"_a, "level"_a, "code"_a);
    // Nothing is converted on the way in: a converted copy would swallow what is written to it.
    m.def("search", &search, "format"_a, "w"_a.noconvert(), "weight"_a.noconvert(), "shrink"_a.noconvert(),
          "factor"_a.noconvert(), "quick"_a, "g"_a, "scale"_a.noconvert(), "zero"_a.noconvert().none(), "threads"_a);
    m.def("refine", &refine, "format"_a, "w"_a.noconvert(), "weight"_a.noconvert(), "move"_a.noconvert(),
          "scale"_a.noconvert(), "zero"_a.noconvert().none(), "outer"_a.noconvert(), "outer_zero"_a.noconvert().none(),
          "low"_a, "high"_a, "g"_a, "rounds"_a, "threads"_a);
    m.def("encode", &encode, "format"_a, "w"_a.noconvert(), "scale"_a.noconvert(), "zero"_a.noconvert().none(), "g"_a,
          "codes"_a.noconvert(), "threads"_a);
    m.def("missed", &missed, "format"_a, "w"_a.noconvert(), "weight"_a.noconvert(), "codes"_a.noconvert(),
          "scale"_a.noconvert(), "zero"_a.noconvert().none(), "g"_a, "sums"_a.noconvert(), "threads"_a);
    m.def("round_columns", &round_columns, "format"_a, "target"_a.noconvert(), "original"_a.noconvert(), "propagation"_a.noconvert(),
          "group"_a.noconvert(), "scale"_a.noconvert(), "zero"_a.noconvert().none(), "codes"_a.noconvert(),
          "errors"_a.noconvert(), "threads"_a);
    m.def("sweep", &sweep, "format"_a, "decoded"_a.noconvert(), "pull"_a.noconvert(), "codes"_a.noconvert(),
          "scale"_a.noconvert(), "zero"_a.noconvert().none(), "H"_a.noconvert(), "curvature"_a.noconvert(), "ridge"_a,
          "solve"_a, "g"_a, "begin"_a, "threads"_a);
    m.def("tune", &tune, "format"_a, "w"_a.noconvert(), "base"_a.noconvert(), "offset"_a.noconvert(), "square"_a.noconvert(),
          "start"_a.noconvert(), "scale"_a.noconvert(), "stretch"_a.noconvert(), "stretch_square"_a.noconvert(),
          "zero"_a.noconvert().none(), "gradient"_a.noconvert().none(), "decoded"_a.noconvert(), "g"_a, "movable"_a,
          "rate"_a, "scale_rate"_a, "fresh"_a, "threads"_a);
    bind_blocks(m);
    bind_products(m);
    bind_layers(m);
    m.def("names", &names);
    m.def("choose", &choose, "name"_a);
    m.def("current", [] { return std::string(chosen->name); });
}
