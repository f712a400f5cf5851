// Round to nearest under scales that are given, row by row, and what that loses. Included behind search.h.

typedef int16_t Int16s __attribute__((vector_size(2 * LANES)));

// Lanes h further on, around the end.
template <int h, int... LANE>
static INLINE Ints turned(Ints x, std::integer_sequence<int, LANE...>) {
    return __builtin_shufflevector(x, x, ((LANE + h) % LANES)...);
}

// Whether no lane is set.
template <int h = LANES / 2>
static INLINE bool none(Ints x) {
    if constexpr (h == 0) return x[0] == 0;
    else return none<h / 2>(x | turned<h>(x, std::make_integer_sequence<int, LANES>()));
}

// A group's scale and zero, and what divides by the scale.
struct Under {
    Vec scale, zero, divisor, inverse;
    bool quick;  // whether the inverse is as good as the divisor, but for numbers half way between two codes
    Under(float s, float z) : scale(all(s)), zero(all(z)), divisor(all(safe(s))), inverse(all(1 / safe(s))) {
        quick = magnitude(s) > 1e-30f && magnitude(s) < 1e30f;
    }
};

// The codes of n <= LANES weights of one group.
static inline void encode_few(const Format &f, const float *w, ptrdiff_t n, const Under &u, int8_t *codes) {
    Vec v{}, decoded;
    if (n == LANES) {
        *(LooseBytes *)codes = codes_of(f, round_to(f, load(w), u.scale, u.divisor, u.zero, decoded));
        return;
    }
    for (ptrdiff_t i = 0; i < n; i++) v[i] = w[i];
    Bytes found = codes_of(f, round_to(f, v, u.scale, u.divisor, u.zero, decoded));
    for (ptrdiff_t i = 0; i < n; i++) codes[i] = found[i];
}

// The codes of a group of whole vectors, without dividing: a quotient is w times the inverse, but for its last bits. False if
// those might decide for some weight, near the middle between two codes.
template <int kind>
static INLINE bool encode_quick(const Format &f, const float *w, ptrdiff_t g, const Under &u, int8_t *codes) {
    Ints doubt{};
    for (ptrdiff_t i = 0; i < g; i += LANES) {
        Vec v = load(w + i), x = kind == MIN ? (v - u.zero) * u.inverse : kind == ASYM ? v * u.inverse + u.zero : v * u.inverse;
        x = x < all(f.lo) ? all(f.lo) : x;
        x = x > all(f.hi) ? all(f.hi) : x;
        Vec value = nearest(x), off = x - value;
        doubt |= off * off > all(0.2495f);  // 0.4995 squared
        *(LooseBytes *)(codes + i) = __builtin_convertvector(__builtin_convertvector(value, Ints), Bytes);
    }
    return none(doubt);
}

template <int kind>
static void encode_row(const Format &f, const Encode &a, ptrdiff_t row) {
    ptrdiff_t G = (a.K + a.g - 1) / a.g;
    const float *w = a.w + row * a.K;
    int8_t *codes = a.codes + row * a.K;
    for (ptrdiff_t group = 0; group < G; group++) {
        ptrdiff_t at = group * a.g, g = a.K - at < a.g ? a.K - at : a.g;
        Under under(a.scale[row * G + group], a.zero ? a.zero[row * G + group] : 0);
        if constexpr (kind != CODEBOOK)
            if (under.quick && g % LANES == 0 && encode_quick<kind>(f, w + at, g, under, codes + at)) continue;
        for (ptrdiff_t i = at; i < at + g; i += LANES)
            encode_few(f, w + i, at + g - i < LANES ? at + g - i : LANES, under, codes + i);
    }
}

static void encode(const Format &f, const Encode &a, ptrdiff_t first, ptrdiff_t last) {
    by_kind(f, [&](auto kind) {
        for (ptrdiff_t row = first; row < last; row++) encode_row<kind.value>(f, a, row);
    });
}

// The values that LANES codes stand for.
template <int kind>
static INLINE Vec values_of(const Format &f, const int8_t *codes) {
    Vec value{};
    if constexpr (kind == CODEBOOK) {
        for (int l = 0; l < LANES; l++) value[l] = f.value[codes[l] & 15];
        return value;
    }
    Ints k = __builtin_convertvector(__builtin_convertvector(*(const LooseBytes *)codes, Int16s), Ints);  // by steps: faster
    return __builtin_convertvector(kind == MIN ? k & 255 : k, Vec);
}

// One row's Σ u (w − decoded)² and Σ u w², added up by columns modulo MOST_LANES, then in halves.
struct RowLoss {
    static constexpr int PARTS = MOST_LANES / LANES;
    Vec lost[PARTS], whole[PARTS];

    // MOST_LANES columns.
    template <int kind>
    INLINE void add(const Format &f, const float *w, const float *u, const int8_t *codes, Vec s, Vec z) {
        for (int part = 0; part < PARTS; part++) {
            ptrdiff_t at = part * LANES;
            Vec v = load(w + at), value = values_of<kind>(f, codes + at);
            Vec e = v - (kind == ASYM ? (value - z) * s : kind == MIN ? value * s + z : value * s);
            lost[part] += e * e * load(u + at);
            whole[part] += v * v * load(u + at);
        }
    }

    // The last few of a row.
    template <int kind>
    void add_some(const Format &f, const float *w, const float *u, const int8_t *codes, ptrdiff_t n, Vec s, Vec z) {
        float some_w[MOST_LANES] = {}, some_u[MOST_LANES] = {};
        int8_t some[MOST_LANES] = {};
        for (ptrdiff_t i = 0; i < n; i++) some_w[i] = w[i], some_u[i] = u[i], some[i] = codes[i];
        add<kind>(f, some_w, some_u, some, s, z);
    }

    static float total(Vec (&parts)[PARTS]) {
        float x[MOST_LANES];
        for (int part = 0; part < PARTS; part++) store(x + part * LANES, parts[part]);
        return folded(x, MOST_LANES);
    }
};

template <int kind>
static void missed_in_row(const Format &f, const Missed &a, ptrdiff_t row) {
    ptrdiff_t G = (a.K + a.g - 1) / a.g;
    const float *w = a.w + row * a.K;
    const int8_t *codes = a.codes + row * a.K;
    RowLoss sums{};
    for (ptrdiff_t group = 0; group < G; group++) {
        ptrdiff_t i = group * a.g, end = i + a.g < a.K ? i + a.g : a.K;
        Vec s = all(a.scale[row * G + group]), z = all(a.zero ? a.zero[row * G + group] : 0);
        for (; i + MOST_LANES <= end; i += MOST_LANES) sums.add<kind>(f, w + i, a.weight + i, codes + i, s, z);
        if (i < end) sums.add_some<kind>(f, w + i, a.weight + i, codes + i, end - i, s, z);
    }
    a.lost[row] = RowLoss::total(sums.lost), a.whole[row] = RowLoss::total(sums.whole);
}

static void missed(const Format &f, const Missed &a, ptrdiff_t first, ptrdiff_t last) {
    by_kind(f, [&](auto kind) {
        for (ptrdiff_t row = first; row < last; row++) missed_in_row<kind.value>(f, a, row);
    });
}
