// Round to nearest under scales that are given, row by row, and what that loses. Included behind search.h.

// The codes of n <= LANES weights of one group.
static inline void encode_few(const Format &f, const float *w, ptrdiff_t n, Vec scale, Vec zero, int8_t *codes) {
    Vec v{}, decoded;
    Bytes found;
    if (n == LANES)
        v = load(w);
    else
        for (ptrdiff_t i = 0; i < n; i++) v[i] = w[i];
    found = codes_of(f, round_to(f, v, scale, safe(scale), zero, decoded));
    if (n == LANES)
        *(LooseBytes *)codes = found;
    else
        for (ptrdiff_t i = 0; i < n; i++) codes[i] = found[i];
}

static void encode(const Format &f, const Encode &a, ptrdiff_t first, ptrdiff_t last) {
    ptrdiff_t G = (a.K + a.g - 1) / a.g;
    for (ptrdiff_t group = first * G; group < last * G; group++) {
        ptrdiff_t begin = group % G * a.g, end = begin + a.g < a.K ? begin + a.g : a.K, row = group / G * a.K;
        Vec scale = all(a.scale[group]), zero = all(a.zero ? a.zero[group] : 0);
        for (ptrdiff_t i = begin; i < end; i += LANES)
            encode_few(f, a.w + row + i, end - i < LANES ? end - i : LANES, scale, zero, a.codes + row + i);
    }
}

// The values that LANES codes stand for.
static inline Vec values_of(const Format &f, const int8_t *codes) {
    Vec value{};
    if (f.levels) {
        for (int l = 0; l < LANES; l++) value[l] = f.value[codes[l] & 15];
        return value;
    }
    Ints k = __builtin_convertvector(*(const LooseBytes *)codes, Ints);
    return __builtin_convertvector(f.zero == MIN ? k & 255 : k, Vec);
}

// One row's Σ u (w − decoded)² and Σ u w², added up by columns modulo MOST_LANES, then in halves.
struct RowLoss {
    float lost[MOST_LANES], whole[MOST_LANES];

    void add(const Format &f, const Missed &a, ptrdiff_t at, ptrdiff_t column, ptrdiff_t n, float s, float z) {
        float w[LANES] = {}, u[LANES] = {};
        int8_t codes[LANES] = {};
        for (ptrdiff_t i = 0; i < n; i++) w[i] = a.w[at + i], u[i] = a.weight[column + i], codes[i] = a.codes[at + i];
        add_all(f, w, u, codes, column % MOST_LANES, s, z);
    }

    void add_all(const Format &f, const float *w, const float *u, const int8_t *codes, ptrdiff_t to, float s, float z) {
        Vec v = load(w), value = values_of(f, codes);
        Vec e = v - (f.zero == SYM ? value * s : f.zero == ASYM ? (value - z) * s : value * s + z);
        store(lost + to, load(lost + to) + e * e * load(u));
        store(whole + to, load(whole + to) + v * v * load(u));
    }
};

static void missed(const Format &f, const Missed &a, ptrdiff_t first, ptrdiff_t last) {
    ptrdiff_t G = (a.K + a.g - 1) / a.g;
    for (ptrdiff_t row = first; row < last; row++) {
        RowLoss sums{};
        for (ptrdiff_t group = 0; group < G; group++) {
            ptrdiff_t end = group * a.g + a.g < a.K ? group * a.g + a.g : a.K;
            float s = a.scale[row * G + group], z = a.zero ? a.zero[row * G + group] : 0;
            for (ptrdiff_t i = group * a.g; i < end; i += LANES) {
                ptrdiff_t at = row * a.K + i;
                if (end - i < LANES)
                    sums.add(f, a, at, i, end - i, s, z);
                else
                    sums.add_all(f, a.w + at, a.weight + i, a.codes + at, i % MOST_LANES, s, z);
            }
        }
        a.lost[row] = folded(sums.lost, MOST_LANES), a.whole[row] = folded(sums.whole, MOST_LANES);
    }
}
