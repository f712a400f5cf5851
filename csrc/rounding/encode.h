// Round to nearest under given scales, row by row, and the errors of that. Included after search.h.

typedef int16_t Int16s __attribute__((vector_size(2 * LANES)));

// Whether no lane is set.
static INLINE bool none(Ints x) {
    struct { uint32_t word[LANES / 4]; } some;
    Bytes narrow = __builtin_convertvector(x, Bytes);
    __builtin_memcpy(&some, &narrow, LANES);
    uint32_t any = 0;
    for (uint32_t word : some.word) any |= word;
    return any == 0;
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

// Rows of bfloat16 as float32.
static void widen(const uint16_t *from, float *to, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i += LANES) {
        int wide = (int)(n - i < LANES ? n - i : LANES);
        put(to + i, some(from + i, wide), wide);
    }
}

// The values of LANES codes.
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

    // LANES columns: weights, their importance, and the values that their codes stand for.
    template <int kind>
    INLINE void add(int part, Vec v, Vec u, Vec value, Vec s, Vec z) {
        Vec e = v - (kind == ASYM ? (value - z) * s : kind == MIN ? value * s + z : value * s);
        lost[part] += e * e * u;
        whole[part] += v * v * u;
    }

    // MOST_LANES columns.
    template <int kind>
    INLINE void add(const Format &f, const float *w, const float *u, const int8_t *codes, Vec s, Vec z) {
        for (int part = 0, at = 0; part < PARTS; part++, at += LANES)
            add<kind>(part, load(w + at), load(u + at), values_of<kind>(f, codes + at), s, z);
    }

    // The n columns of a group.
    template <int kind>
    void add(const Format &f, const float *w, const float *u, const int8_t *codes, ptrdiff_t n, Vec s, Vec z) {
        ptrdiff_t i = 0;
        for (; i + MOST_LANES <= n; i += MOST_LANES) add<kind>(f, w + i, u + i, codes + i, s, z);
        if (i == n) return;
        float some_w[MOST_LANES] = {}, some_u[MOST_LANES] = {};
        int8_t some[MOST_LANES] = {};
        for (int k = 0; i < n; i++, k++) some_w[k] = w[i], some_u[k] = u[i], some[k] = codes[i];
        add<kind>(f, some_w, some_u, some, s, z);
    }

    static float total(Vec (&parts)[PARTS]) {
        float x[MOST_LANES];
        for (int part = 0; part < PARTS; part++) store(x + part * LANES, parts[part]);
        return folded(x, MOST_LANES);
    }
};

// The codes of a group of whole MOST_LANES, without dividing: a quotient is w times the inverse, but for its last bits. False
// if those might decide for some weight, near the middle between two codes. loss: what is added to, if it counts.
template <int kind, bool counts>
static INLINE bool encode_quick(const Format &f, const float *w, const float *importance, ptrdiff_t g, const Under &u,
                                int8_t *codes, RowLoss &loss) {
    Ints doubt{};
    for (ptrdiff_t i = 0; i < g; i += MOST_LANES)
        for (int part = 0; part < RowLoss::PARTS; part++) {
            ptrdiff_t at = i + part * LANES;
            Vec v = load(w + at), x = kind == MIN ? (v - u.zero) * u.inverse : kind == ASYM ? v * u.inverse + u.zero : v * u.inverse;
            x = x < all(f.lo) ? all(f.lo) : x;
            x = x > all(f.hi) ? all(f.hi) : x;
            Vec value = nearest(x), off = x - value;
            doubt |= off * off > all(0.2495f);  // 0.4995 squared
            *(LooseBytes *)(codes + at) = __builtin_convertvector(__builtin_convertvector(value, Ints), Bytes);
            if (counts) loss.add<kind>(part, v, load(importance + at), value, u.scale, u.zero);
        }
    return none(doubt);
}

template <int kind, bool counts>
static void encode_row(const Format &f, const Encode &a, ptrdiff_t row) {
    ptrdiff_t G = (a.K + a.g - 1) / a.g;
    const float *w = a.w + row * a.K;
    int8_t *codes = a.codes + row * a.K;
    RowLoss loss{};
    for (ptrdiff_t group = 0; group < G; group++) {
        ptrdiff_t at = group * a.g, g = a.K - at < a.g ? a.K - at : a.g;
        Under under(a.scale[row * G + group], a.zero ? a.zero[row * G + group] : 0);
        const float *u = counts ? a.weight + at : nullptr;
        if constexpr (kind != CODEBOOK) {
            RowLoss more = loss;
            if (under.quick && g % MOST_LANES == 0 && encode_quick<kind, counts>(f, w + at, u, g, under, codes + at, more)) {
                loss = more;
                continue;
            }
        }
        for (ptrdiff_t i = at; i < at + g; i += LANES)
            encode_few(f, w + i, at + g - i < LANES ? at + g - i : LANES, under, codes + i);
        if (counts) loss.add<kind>(f, w + at, u, codes + at, g, under.scale, under.zero);
    }
    if (counts) a.lost[row] = RowLoss::total(loss.lost), a.whole[row] = RowLoss::total(loss.whole);
}

static void encode(const Format &f, const Encode &a, ptrdiff_t first, ptrdiff_t last) {
    by_kind(f, [&](auto kind) {
        for (ptrdiff_t row = first; row < last; row++)
            a.lost ? encode_row<kind.value, true>(f, a, row) : encode_row<kind.value, false>(f, a, row);
    });
}

template <int kind>
static void missed_in_row(const Format &f, const Missed &a, ptrdiff_t row) {
    ptrdiff_t G = (a.K + a.g - 1) / a.g;
    const float *w = a.w + row * a.K;
    const int8_t *codes = a.codes + row * a.K;
    RowLoss loss{};
    for (ptrdiff_t group = 0; group < G; group++) {
        ptrdiff_t at = group * a.g, n = a.K - at < a.g ? a.K - at : a.g;
        Vec s = all(a.scale[row * G + group]), z = all(a.zero ? a.zero[row * G + group] : 0);
        loss.add<kind>(f, w + at, a.weight + at, codes + at, n, s, z);
    }
    a.lost[row] = RowLoss::total(loss.lost), a.whole[row] = RowLoss::total(loss.whole);
}

static void missed(const Format &f, const Missed &a, ptrdiff_t first, ptrdiff_t last) {
    by_kind(f, [&](auto kind) {
        for (ptrdiff_t row = first; row < last; row++) missed_in_row<kind.value>(f, a, row);
    });
}
