// The scale search, group by group, with LANES rows in a vector. Included after rounding.h.

// Sum of n = 2^k >= LANES numbers in halves; overwrites them.
static inline float folded(float *x, int n) {
    while (n > LANES) {
        n /= 2;
        for (int i = 0; i < n; i += LANES) store(x + i, load(x + i) + load(x + i + n));
    }
    while (n > 1) {
        n /= 2;
        for (int i = 0; i < n; i++) x[i] += x[i + n];
    }
    return x[0];
}

#define INLINE __attribute__((always_inline)) inline
#define EACH __attribute__((always_inline))  // a term of a sum

template <int kind>
struct Kind {
    static constexpr int value = kind;
};

// One group of g weights v [g, LANES] in LANES rows; importance u [g]; low, high: the range of each row, with 0 in it.
struct Group {
    float *v, *u;
    int g;
    Vec low, high, mean, total_uvv, total_uv, total_u;
};

// Sum in halves of term(0) to term(n - 1): the first half is added to the second, the first quarter of that to its second.
template <int n, int h = 1, class Term>
static INLINE auto halved(const Term &term, int i = 0) {
    if constexpr (h == n)
        return term(i);
    else
        return halved<n, 2 * h>(term, i) + halved<n, 2 * h>(term, i + h);
}

// The same for n = 16 · apart terms, of which the first g are there: those of i, i + h, i + 2 h and so on.
template <class Term>
static auto halved_far(const Term &term, int g, int apart, int i, int h) -> decltype(term(0)) {
    if (h < apart) return halved_far(term, g, apart, i, 2 * h) + halved_far(term, g, apart, i + h, 2 * h);
    return halved<16>([&](int k) EACH { return i + k * apart < g ? term(i + k * apart) : decltype(term(0)){}; });
}

// Sum in halves over a group.
template <class Term>
static INLINE auto folded(const Group &p, const Term &term) {
    if (p.g == 16) return halved<16>(term);
    if (p.g == 32) return halved<32>(term);
    int apart = 1;
    while (16 * apart < p.g) apart *= 2;
    return halved_far(term, p.g, apart, 0, 1);
}

// The range's own scale and zero, narrowed.
static void from_range(const Format &f, Group &p, float shrink, float factor, Vec &scale, Vec &zero) {
    if (f.zero == SYM) {
        scale = f.reach == 0 ? p.mean * shrink : (-p.low > p.high ? -p.low : p.high) * factor;
        if (f.turned) scale = p.high > -p.low ? -scale : scale;
        return;
    }
    Vec low = p.low * shrink, high = p.high * factor;
    scale = (high - low) / f.span;
    if (f.zero == MIN) {
        zero = low;
        return;
    }
    Vec first = all(f.first), last = all(f.hi);
    zero = f.lo - nearest(low / safe(scale));
    zero = zero < first ? first : zero;
    zero = zero > last ? last : zero;
}

// Sums over a group: of u (v - decoded)², and what least squares needs, u c², u c v, u c for the codes' values c.
struct Moments {
    Vec error, cc, cv, c1;
    INLINE Moments operator+(const Moments &o) const { return {error + o.error, cc + o.cc, cv + o.cv, c1 + o.c1}; }
};

// Those of the codes under a scale and zero; the first if it is wanted.
template <int kind, bool error>
static Moments moments_of(const Format &f, Group &p, Vec scale, Vec zero) {
    Vec inverse = 1 / safe(scale);
    return folded(p, [&](int i) EACH {
        Vec v = load(p.v + i * LANES), decoded, c = round_by<kind>(f, v, scale, inverse, zero, decoded), e = v - decoded;
        c = kind == ASYM ? c - zero : c;
        Vec uc = p.u[i] * c;
        return Moments{error ? e * e * p.u[i] : Vec{}, uc * c, uc * v, uc};
    });
}

// The error alone.
template <int kind>
static Vec error_of(const Format &f, Group &p, Vec scale, Vec zero) {
    Vec inverse = 1 / safe(scale);
    return folded(p, [&](int i) EACH {
        Vec v = load(p.v + i * LANES), decoded;
        round_by<kind>(f, v, scale, inverse, zero, decoded);
        Vec e = v - decoded;
        return e * e * p.u[i];
    });
}

// Replace scale and zero by those of least Σ u (v - decoded)² for the codes of these moments; keep them where there are none.
template <int kind>
static void least_squares(const Group &p, const Moments &m, Vec &scale, Vec &zero) {
    if constexpr (kind != MIN) {
        Vec solved = m.cv / safe(m.cc);
        scale = same_sign(solved, scale) & finite(solved) ? solved : scale;
        return;
    }
    Vec n = p.total_u, v1 = p.total_uv;
    Vec det = n * m.cc - m.c1 * m.c1;
    Vec solved = (n * m.cv - m.c1 * v1) / safe(det);
    Vec low = (v1 - solved * m.c1) / safe(n);
    low = low > 0 ? Vec{} : low;
    solved = low == 0 ? m.cv / safe(m.cc) : solved;
    Ints good = (det > 0) & (solved > 0) & finite(solved) & finite(low);
    scale = good ? solved : scale;
    zero = good ? low : zero;
}

// The error of the codes of these moments under another scale and zero.
template <int kind>
static Vec error_by(const Group &p, const Moments &m, Vec scale, Vec zero) {
    Vec lost = p.total_uvv + scale * (scale * m.cc - 2 * m.cv);
    return kind == MIN ? lost + zero * (zero * p.total_u - 2 * p.total_uv + 2 * scale * m.c1) : lost;
}

// The candidate of least error so far, in each row.
struct Best {
    Vec error, scale, zero;
    void meet(Vec e, Vec s, Vec z, bool first) {
        Ints better = first ? Ints{} == 0 : e < error;
        error = better ? e : error;
        scale = better ? s : scale;
        zero = better ? z : zero;
    }
};

// Numbers of two vectors whose places differ in the bit h change places: half of a transposition's step.
template <int h, int... LANE>
static INLINE void swap_places(Vec &a, Vec &b, std::integer_sequence<int, LANE...>) {
    Vec low = __builtin_shufflevector(a, b, (LANE & h ? LANE - h + LANES : LANE)...);
    b = __builtin_shufflevector(a, b, (LANE & h ? LANE + LANES : LANE + h)...);
    a = low;
}

// LANES vectors, [row, column] -> [column, row].
template <int h = LANES / 2>
static INLINE void transpose(Vec (&r)[LANES]) {
    if constexpr (h > 0) {
        for (int i = 0; i < LANES; i++)
            if (!(i & h)) swap_places<h>(r[i], r[i + h], std::make_integer_sequence<int, LANES>());
        transpose<h / 2>(r);
    }
}

// Rows [at, at + wide) of the group that begins at column `begin`.
static void read_group(Group &p, const float *w, const float *weight, ptrdiff_t K, ptrdiff_t at, int wide, ptrdiff_t begin,
                       ptrdiff_t g) {
    p.g = (int)(K - begin < g ? K - begin : g);
    int whole = wide == LANES ? p.g / LANES * LANES : 0;
    w += at * K + begin;
    for (int i = 0; i < whole; i += LANES) {
        Vec r[LANES];
        for (int l = 0; l < LANES; l++) r[l] = load(w + l * K + i);
        transpose(r);
        for (int l = 0; l < LANES; l++) store(p.v + (i + l) * LANES, r[l]);
    }
    for (int i = whole; i < p.g; i++)
        for (int l = 0; l < LANES; l++) p.v[i * LANES + l] = l < wide ? w[l * K + i] : 0;
    for (int i = 0; i < p.g; i++) p.u[i] = weight[begin + i];
}

// What the search needs of a group before it begins. Gives 0, or NaN for a row with a weight that is not finite.
static Vec measure(const Format &f, Group &p, bool energy) {
    Vec check{};
    p.low = p.high = Vec{};
    for (int i = 0; i < p.g; i++) {
        Vec v = load(p.v + i * LANES);
        p.low = v < p.low ? v : p.low;
        p.high = v > p.high ? v : p.high;
        check += v - v;
    }
    auto v = [&](int i) EACH { return load(p.v + i * LANES); };
    if (f.reach == 0 && f.zero == SYM) p.mean = folded(p, [&](int i) EACH { return magnitude(v(i)); }) / (float)p.g;
    if (energy) p.total_uvv = folded(p, [&](int i) EACH { return p.u[i] * v(i) * v(i); });
    if (f.zero == MIN) {
        p.total_u = folded(p, [&](int i) EACH { return all(p.u[i]); });
        p.total_uv = folded(p, [&](int i) EACH { return p.u[i] * v(i); });
    }
    return check;
}

// quick: ranges are compared by what their codes lose under the scale of least squares; nothing is rounded again.
template <int kind, bool quick>
static Best search_group(const Format &f, const Search &a, Group &p) {
    Best best{};
    auto as_stored = [&](Vec &scale, Vec &zero) EACH {
        scale = stored_scale(scale, f.encoding);
        if (kind == MIN) zero = stored(zero, f.encoding, false);
    };
    for (ptrdiff_t step = 0; step < a.steps; step++) {
        Vec scale{}, zero{};
        from_range(f, p, a.shrink[step], a.factor[step], scale, zero);
        as_stored(scale, zero);
        Moments m = moments_of<kind, !quick>(f, p, scale, zero);
        if (!quick) best.meet(m.error, scale, zero, step == 0);
        least_squares<kind>(p, m, scale, zero);
        as_stored(scale, zero);
        Vec error = quick ? error_by<kind>(p, m, scale, zero) : error_of<kind>(f, p, scale, zero);
        best.meet(error, scale, zero, quick && step == 0);
    }
    return best;
}

static Group group_in(float *scratch, ptrdiff_t g) {
    Group p{};
    p.v = scratch, p.u = scratch + g * LANES;
    return p;
}

// Call body(group of LANES rows, first row, rows that exist, its place among the G groups of a row) for every group.
template <class Args, class Body>
static void each_group(const Args &a, float *scratch, ptrdiff_t first, ptrdiff_t last, Body body) {
    Group p = group_in(scratch, a.g);
    for (ptrdiff_t at = first; at < last; at += LANES) {
        int wide = (int)(last - at < LANES ? last - at : LANES);
        for (ptrdiff_t begin = 0; begin < a.K; begin += a.g) {
            read_group(p, a.w, a.weight, a.K, at, wide, begin, a.g);
            body(p, at, wide, begin / a.g);
        }
    }
}

// Call body(kind) with the kind of a format as a constant.
template <class Body>
static void by_kind(const Format &f, const Body &body) {
    if (f.levels)
        body(Kind<CODEBOOK>{});
    else if (f.zero == SYM)
        body(Kind<SYM>{});
    else if (f.zero == ASYM)
        body(Kind<ASYM>{});
    else
        body(Kind<MIN>{});
}

static void search(const Format &f, const Search &a, float *scratch, ptrdiff_t first, ptrdiff_t last) {
    ptrdiff_t G = (a.K + a.g - 1) / a.g;
    by_kind(f, [&](auto kind) {
        each_group(a, scratch, first, last, [&](Group &p, ptrdiff_t at, int wide, ptrdiff_t group) {
            Vec check = measure(f, p, a.quick);
            Best best = a.quick ? search_group<kind.value, true>(f, a, p) : search_group<kind.value, false>(f, a, p);
            for (int l = 0; l < wide; l++) {
                a.scale[(at + l) * G + group] = best.scale[l] + check[l];
                if (a.zero) a.zero[(at + l) * G + group] = best.zero[l];
            }
        });
    });
}
